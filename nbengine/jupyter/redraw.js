// When a canvas is drawn, how sharp, and in which colours. For every view on a canvas; it knows
// nothing of what they draw.
//
// Invariant: at most one drawing a frame, whatever asks for it (data, size, theme, pointer), and
// none after destroy().

// Call draw(isChanged) in the next frame after schedule(), and after a change of the element's size or
// colour, which is what isChanged says. The element's style must say `transition: color 1ms`: then its end tells of
// any change of theme, whoever makes it and however late its style sheet comes. The pixel ratio is
// read at each drawing (fitCanvas).
export function createRedraw(element, draw) {
  let pending = 0;
  let isChanged = true;
  let isOver = false;
  const frame = () => {
    pending = 0;
    const changed = isChanged;
    isChanged = false;
    draw(changed);
  };
  const schedule = () => {
    if (!pending && !isOver) pending = requestAnimationFrame(frame);
  };
  const change = () => {
    isChanged = true;
    schedule();
  };
  const themed = (event) => event.propertyName === "color" && change();
  const resized = new ResizeObserver(change);
  resized.observe(element);
  element.addEventListener("transitionend", themed);
  return {
    schedule,
    destroy() {
      isOver = true;
      cancelAnimationFrame(pending);
      resized.disconnect();
      element.removeEventListener("transitionend", themed);
    },
  };
}

// The canvas's context, empty, in CSS pixels, with as many pixels as the screen has.
export function fitCanvas(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

const hatches = new Map(); // colour and pixel ratio to a tile

// A fill of diagonal lines in a colour, on the screen's own pixels.
export function hatch(context, colour) {
  const ratio = window.devicePixelRatio || 1;
  const key = `${colour} ${ratio}`;
  let tile = hatches.get(key);
  if (!tile) {
    if (hatches.size > 256) hatches.clear(); // themes and zooms that are gone
    const side = Math.round(5 * ratio);
    tile = document.createElement("canvas");
    tile.width = tile.height = side;
    const lines = tile.getContext("2d");
    lines.strokeStyle = colour;
    lines.lineWidth = 1.1 * ratio;
    for (const shift of [-side, 0, side]) {
      lines.moveTo(shift - 1, side + 1);
      lines.lineTo(shift + side + 1, -1);
    }
    lines.stroke();
    hatches.set(key, tile);
  }
  const pattern = context.createPattern(tile, "repeat");
  pattern.setTransform(new DOMMatrix().scale(1 / ratio));
  return pattern;
}

// A function of a palette and an ink (the text's colour) that gives the palette's colours, each
// mixed with ink until a thin line of it stands out from the page (WCAG's contrast 3, on a page
// that is taken for white when the ink is dark, and for near black when it is light).
export function createLegible() {
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  // Drawn and read back, because a computed colour may be in any notation that CSS has.
  const rgb = (colour) => {
    probe.clearRect(0, 0, 1, 1);
    probe.fillStyle = colour;
    probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data.subarray(0, 3)];
  };
  const linear = (c) => (c <= 10 ? c / 3294 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) =>
    0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  let known = { ink: null, palette: null, colours: [] };
  return (palette, ink) => {
    if (known.ink === ink && known.palette === palette) return known.colours;
    const inkRgb = rgb(ink);
    const page = luminance(inkRgb) > 0.4 ? 0.012 : 1;
    const contrast = (colour) => {
      const l = luminance(colour);
      return (Math.max(l, page) + 0.05) / (Math.min(l, page) + 0.05);
    };
    const colours = palette.map((colour) => {
      let mixed = rgb(colour);
      for (let i = 0; i < 8 && contrast(mixed) < 3; i++) {
        mixed = mixed.map((c, k) => Math.round(c + 0.12 * (inkRgb[k] - c)));
      }
      return `rgb(${mixed.join(" ")})`;
    });
    known = { ink, palette, colours };
    return colours;
  };
}
