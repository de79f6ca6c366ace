// The block map on a canvas: one cell a KV block, coloured by the sequence that holds it.
//
// createBlockMap({palette, onPoint, onPick}) returns {element, update(blocks), highlight(id),
// destroy()}. It knows nothing of the kernel: a page test can drive it alone. Kinds differ in shape
// too: a held block is solid (the last one of a sequence filled as far as it is used), a shared one
// carries a white diagonal, a cached one is hatched, a free one is an outline. A block that was just
// taken is ringed for a moment; the table of a selected sequence is lit, and threaded in order.
// Beyond some thousand blocks the cells become pixels of an image, of which only those that changed
// are painted: 100,000 blocks stay smooth.

const GAP = 1;
const MIN_CELL = 3;
const MAX_CELL = 32;
const DENSE_CELL = 7; // from here down cells are pixels
const MAP_HEIGHT = 230;
const RING_MS = 450;
const MAX_RINGED = 2048; // with more blocks, a ring is a speck that costs a redrawing
const FREE = 0;
const CACHED = 1;
const HELD = 2;
const SHARED = 3;

const kindOf = (cell) => cell & 3;
const refsOf = (cell) => (cell >> 2) & 255;
const slotOf = (cell) => cell >>> 10;

export function createBlockMap({ palette, onPoint = () => {}, onPick = () => {} }) {
  const canvas = h("canvas", { tabindex: 0, role: "img" });
  const readout = h("div", { class: "nbe-readout", "aria-live": "polite" });
  const element = h("div", {}, h("div", { class: "nbe-map" }, canvas), readout);
  const scroller = element.firstElementChild;

  let blocks = null;
  let grid = null;
  let cursor = -1; // the block that the pointer or the arrow keys are on
  let hovered = null; // a sequence whose blocks stand out
  let fills = new Map(); // last block of a sequence -> slots in use
  let place = new Map(); // block of the selected table -> its index there
  let image = null; // {data, pixels, drawn, layer, key}: what dense cells are painted into
  const rung = new Map(); // block to the time when it was taken
  let kinds = null; // of every block, as last told
  let pending = 0;

  const nameOf = (slot) => blocks.names.get(slot)?.id ?? "?";
  const colourOf = (slot) => palette[blocks.names.get(slot)?.colour ?? 0];

  function describe(block) {
    const cell = blocks.cells[block];
    const known = blocks.details?.block === block && blocks.details.step === blocks.step ? blocks.details : null;
    const parts = [];
    switch (kindOf(cell)) {
      case FREE:
        parts.push("free");
        break;
      case CACHED: {
        const rank = known?.to_be_evicted_after;
        parts.push("cached, held by nobody");
        if (rank != null) parts.push(rank === 0 ? "next to be evicted" : `${rank} others are evicted before it`);
        break;
      }
      default: {
        const refs = refsOf(cell);
        const holders = known?.holders.length ? known.holders.join(", ") : nameOf(slotOf(cell)) + (refs > 1 ? " and others" : "");
        const used = fills.get(block) ?? blocks.blockSize;
        parts.push(`held by ${holders}`, `${refs} ${refs === 1 ? "reference" : "references"}`, `${used} of ${blocks.blockSize} slots used`);
      }
    }
    if (known?.hash) parts.push(`hash ${known.hash.slice(0, 8)}`);
    if (known?.since !== undefined) {
      const age = blocks.step - known.since;
      parts.push(`so since step ${known.since} (${age} ${age === 1 ? "step" : "steps"})`);
    }
    return `block ${block}: ${parts.join("; ")}`;
  }

  function layOut() {
    const count = blocks.cells.length;
    const width = Math.max(160, element.clientWidth);
    const ideal = Math.floor(Math.sqrt((width * MAP_HEIGHT) / count));
    const cell = Math.min(MAX_CELL, Math.max(MIN_CELL, ideal));
    const columns = Math.max(1, Math.floor(width / cell));
    const rows = Math.ceil(count / columns);
    return { cell, columns, rows, width: columns * cell, height: rows * cell };
  }

  function draw() {
    pending = 0;
    if (!blocks || !element.clientWidth) return;
    grid = layOut();
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(grid.width * ratio), Math.round(grid.height * ratio)];
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
      canvas.style.width = `${grid.width}px`;
      canvas.style.height = `${grid.height}px`;
    }
    const context = canvas.getContext("2d");
    // The theme is read at every drawing: it may change, and is not always set at the first.
    const ink = getComputedStyle(canvas).color;
    const { cell, columns } = grid;
    const side = cell - (cell > 6 ? 2 * GAP : GAP);
    const left = (block) => (block % columns) * cell + (cell - side) / 2;
    const top = (block) => Math.floor(block / columns) * cell + (cell - side) / 2;
    if (cell < DENSE_CELL) {
      context.setTransform(1, 0, 0, 1, 0, 0);
      paintDense(context, ink, ratio);
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
    } else {
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.clearRect(0, 0, grid.width, grid.height);
      paintIdle(context, ink, side, left, top);
      paintHeld(context, side, left, top);
      if (side >= 15) paintLabels(context, ink, side, left, top);
      paintRings(context, ink, side, left, top);
    }
    paintThread(context, ink, cell, left, top, side);
    if (cursor >= 0 && cursor < blocks.cells.length) {
      context.strokeStyle = ink;
      context.lineWidth = 2;
      context.strokeRect(left(cursor) - 0.5, top(cursor) - 0.5, side + 1, side + 1);
      setText(readout, describe(cursor));
    } else {
      setText(readout, "");
    }
    if (rung.size) schedule();
  }

  // ---------------------------------------------------------------- many blocks: pixels

  function paintDense(context, ink, ratio) {
    const { cell, columns } = grid;
    const { cells } = blocks;
    const key = [canvas.width, canvas.height, ink, ratio, cells.length].join();
    if (!image || image.key !== key) {
      const data = context.createImageData(canvas.width, canvas.height);
      const layer = new OffscreenCanvas(canvas.width, canvas.height);
      image = { key, data, pixels: new Uint32Array(data.data.buffer), drawn: null, layer };
    }
    const { pixels, drawn, data, layer } = image;
    const rgb = channels(context, ink);
    const size = Math.max(2, Math.round(cell * ratio) - 1);
    const [white, transparent] = [pack([255, 255, 255], 255), 0];
    const colours = new Map();
    let [lowest, highest] = [canvas.height, 0];
    for (let block = 0; block < cells.length; block++) {
      const value = cells[block];
      if (drawn !== null && drawn[block] === value) continue;
      const kind = kindOf(value);
      let solid = pack(rgb, 24);
      let mark = solid;
      if (kind === CACHED) {
        solid = transparent;
        mark = pack(rgb, 150);
      } else if (kind >= HELD) {
        const slot = slotOf(value);
        solid = colours.get(slot) ?? pack(channels(context, colourOf(slot)), 255);
        colours.set(slot, solid);
        mark = kind === SHARED ? white : solid;
      }
      const x0 = Math.round((block % columns) * cell * ratio);
      const y0 = Math.round(Math.floor(block / columns) * cell * ratio);
      for (let y = 0; y < size; y++) {
        let at = (y0 + y) * canvas.width + x0;
        for (let x = 0; x < size; x++) pixels[at++] = x + y === size - 1 ? mark : solid;
      }
      lowest = Math.min(lowest, y0);
      highest = Math.max(highest, y0 + size);
    }
    image.drawn = cells.slice();
    const numRows = Math.max(0, highest - lowest);
    if (numRows) layer.getContext("2d").putImageData(data, 0, 0, 0, lowest, canvas.width, numRows);
    canvas.dataset.painted = numRows;
    const chosen = standingOut();
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.globalAlpha = chosen === null ? 1 : 0.18;
    context.drawImage(layer, 0, 0);
    context.globalAlpha = 1;
    if (chosen !== null) paintChosen(context, chosen, size, ratio);
  }

  // Over the dimmed image, by colour: a call a block is slow for many.
  function paintChosen(context, chosen, size, ratio) {
    const { cell, columns } = grid;
    const paths = new Map();
    const shared = new Path2D();
    blocks.cells.forEach((value, block) => {
      const slot = slotOf(value);
      if (kindOf(value) < HELD || !chosen(block, slot)) return;
      const x = Math.round((block % columns) * cell * ratio);
      const y = Math.round(Math.floor(block / columns) * cell * ratio);
      const colour = colourOf(slot);
      if (!paths.has(colour)) paths.set(colour, new Path2D());
      paths.get(colour).rect(x, y, size, size);
      if (kindOf(value) === SHARED) {
        shared.moveTo(x, y + size);
        shared.lineTo(x + size, y);
      }
    });
    for (const [colour, path] of paths) {
      context.fillStyle = colour;
      context.fill(path);
    }
    context.strokeStyle = "#fff";
    context.lineWidth = 1;
    context.stroke(shared);
  }

  const known = new Map();
  function channels(context, colour) {
    if (!known.has(colour)) {
      context.fillStyle = colour;
      const text = context.fillStyle; // #rrggbb, or rgba(...)
      known.set(
        colour,
        text.startsWith("#")
          ? [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16))
          : text.match(/[\d.]+/g).slice(0, 3).map(Number),
      );
    }
    return known.get(colour);
  }
  const pack = ([r, g, b], alpha) => ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0; // little-endian

  // Whether a block belongs to what is looked at; null when nothing is.
  function standingOut() {
    if (hovered !== null) {
      const lit = new Set();
      for (const [slot, { id }] of blocks.names) if (id === hovered) lit.add(slot);
      return (_, slot) => lit.has(slot);
    }
    if (blocks.selected !== null && place.size) return (block) => place.has(block);
    return null;
  }

  // ---------------------------------------------------------------- some blocks: shapes

  // Free and cached blocks; as paths, because a call a block is slow for many blocks.
  function paintIdle(context, ink, side, left, top) {
    const free = new Path2D();
    const cached = new Path2D();
    const stride = Math.max(3, side / 3);
    blocks.cells.forEach((value, block) => {
      const kind = kindOf(value);
      if (kind > CACHED) return;
      const [x, y] = [left(block), top(block)];
      const path = kind === CACHED ? cached : free;
      path.rect(x + 0.5, y + 0.5, side - 1, side - 1);
      for (let d = stride; kind === CACHED && d < 2 * side; d += stride) {
        path.moveTo(x + Math.max(0, d - side), y + Math.min(side, d));
        path.lineTo(x + Math.min(side, d), y + Math.max(0, d - side));
      }
    });
    context.lineWidth = 1;
    context.strokeStyle = ink;
    context.globalAlpha = 0.18;
    context.stroke(free);
    context.globalAlpha = 0.55;
    context.stroke(cached);
    context.globalAlpha = 1;
  }

  function paintHeld(context, side, left, top) {
    const chosen = standingOut();
    const shared = new Path2D();
    blocks.cells.forEach((value, block) => {
      const kind = kindOf(value);
      if (kind < HELD) return;
      const slot = slotOf(value);
      const [x, y] = [left(block), top(block)];
      const full = kind === SHARED ? 1 : (fills.get(block) ?? blocks.blockSize) / blocks.blockSize;
      const ink = chosen === null || chosen(block, slot) ? 1 : 0.15;
      context.fillStyle = colourOf(slot);
      context.globalAlpha = full < 1 ? 0.3 * ink : ink;
      context.fillRect(x, y, side, side);
      if (full < 1) {
        context.globalAlpha = ink;
        context.fillRect(x, y + side * (1 - full), side, side * full);
      }
      if (kind === SHARED) {
        shared.moveTo(x, y + side);
        shared.lineTo(x + side, y);
      }
    });
    context.globalAlpha = 1;
    context.strokeStyle = "#fff";
    context.lineWidth = Math.max(1, side / 6);
    context.stroke(shared);
  }

  function paintLabels(context, ink, side, left, top) {
    const chosen = standingOut();
    context.textAlign = "center";
    context.textBaseline = "middle";
    blocks.cells.forEach((value, block) => {
      const index = place.get(block);
      if (kindOf(value) !== HELD && index === undefined) return;
      const label = index !== undefined ? String(index) : nameOf(slotOf(value)).replace(/^req-/, "");
      if (label.length > 4) return;
      const size = Math.min(12, (side * 0.5 * 3) / Math.max(3, label.length + 0.5));
      const used = fills.get(block) ?? blocks.blockSize;
      context.font = `600 ${size}px system-ui, sans-serif`;
      context.globalAlpha = chosen === null || chosen(block, slotOf(value)) ? 1 : 0.3;
      context.fillStyle = used / blocks.blockSize < 0.6 ? ink : "#fff";
      context.fillText(label, left(block) + side / 2, top(block) + side / 2 + 0.5);
    });
    context.globalAlpha = 1;
  }

  function paintRings(context, ink, side, left, top) {
    const now = performance.now();
    context.strokeStyle = ink;
    context.lineWidth = 2;
    for (const [block, takenAt] of rung) {
      const age = (now - takenAt) / RING_MS;
      if (age >= 1) rung.delete(block);
      else {
        context.globalAlpha = 1 - age;
        context.strokeRect(left(block), top(block), side, side);
      }
    }
    context.globalAlpha = 1;
  }

  // The selected table, block after block.
  function paintThread(context, ink, cell, left, top, side) {
    if (place.size < 2) return;
    context.beginPath();
    for (const block of place.keys()) context.lineTo(left(block) + side / 2, top(block) + side / 2);
    context.strokeStyle = ink;
    context.lineWidth = cell < DENSE_CELL ? 1 : 1.5;
    context.globalAlpha = 0.45;
    context.setLineDash([4, 3]);
    context.stroke();
    context.setLineDash([]);
    context.globalAlpha = 1;
  }

  function schedule() {
    if (!pending) pending = requestAnimationFrame(draw);
  }

  function point(block) {
    if (block === cursor) return;
    cursor = block;
    onPoint(block < 0 ? null : block);
    schedule();
  }

  function blockAt(event) {
    if (!grid) return -1;
    const column = Math.floor(event.offsetX / grid.cell);
    const block = Math.floor(event.offsetY / grid.cell) * grid.columns + column;
    return column < grid.columns && block >= 0 && block < blocks.cells.length ? block : -1;
  }

  canvas.addEventListener("pointermove", (event) => point(blockAt(event)));
  canvas.addEventListener("pointerleave", () => point(-1));
  canvas.addEventListener("blur", () => point(-1));
  canvas.addEventListener("click", (event) => {
    const block = blockAt(event);
    if (block >= 0) onPick(block);
  });
  canvas.addEventListener("keydown", (event) => {
    if (!grid) return;
    if (event.key === "Enter" && cursor >= 0) {
      event.preventDefault();
      onPick(cursor);
      return;
    }
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -grid.columns, ArrowDown: grid.columns };
    const move = moves[event.key];
    if (move === undefined) return;
    event.preventDefault();
    const next = cursor < 0 ? 0 : cursor + move;
    if (next >= 0 && next < blocks.cells.length) {
      point(next);
      const y = Math.floor(next / grid.columns) * grid.cell;
      if (y < scroller.scrollTop) scroller.scrollTop = y;
      if (y + grid.cell > scroller.scrollTop + scroller.clientHeight) {
        scroller.scrollTop = y + grid.cell - scroller.clientHeight;
      }
    }
  });

  const resized = new ResizeObserver(schedule);
  resized.observe(element);
  const themed = new MutationObserver(schedule);
  themed.observe(document.body, { attributes: true });
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", schedule);
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

  return {
    element,
    // blocks: {cells: Uint32Array (kind | references << 2 | slot << 10), names: Map of slot to
    // {id, colour}, blockSize, step, tails: Uint32Array of pairs (last block of a sequence, slots in
    // use), selected: an id or null, table: Uint32Array, its blocks in order, details: of one block}
    update(next) {
      const before = blocks?.cells.length === next.cells.length ? kinds : null;
      blocks = next;
      fills = new Map();
      for (let i = 0; i < next.tails.length; i += 2) fills.set(next.tails[i], next.tails[i + 1]);
      place = new Map();
      if (next.selected !== null) next.table.forEach((block, index) => place.set(block, index));
      const now = performance.now();
      const rings = before !== null && !calm && next.cells.length <= MAX_RINGED;
      kinds = new Uint8Array(next.cells.length);
      const counts = [0, 0, 0, 0];
      for (let block = 0; block < kinds.length; block++) {
        const kind = kindOf(next.cells[block]);
        kinds[block] = kind;
        counts[kind] += 1;
        if (rings && kind >= HELD && before[block] < HELD) rung.set(block, now);
      }
      canvas.setAttribute(
        "aria-label",
        `KV blocks: ${counts[HELD] + counts[SHARED]} held, ${counts[SHARED]} of them shared, ` +
          `${counts[CACHED]} cached, ${counts[FREE]} free, of ${kinds.length}. ` +
          "Arrow keys tell about single blocks, Enter shows their tokens.",
      );
      schedule();
    },
    highlight(id) {
      hovered = id;
      schedule();
    },
    destroy() {
      cancelAnimationFrame(pending);
      resized.disconnect();
      themed.disconnect();
      scheme.removeEventListener("change", schedule);
    },
  };
}
