// Charts under the timeline: what each step of the view came to, as strips that share its steps, its
// cursor and its margins.
//
// createCharts(…) returns {element, update(data), destroy()}; `data` is the timeline's, with `range`:
// [from, to] as its onRange told, or null for the newest steps that fit. In one module it follows
// dom.js, redraw.js, step_axis.js, entries.js and timeline.js.
//
// A strip has one scale. So output and prefill, which differ by orders of magnitude, are two strips
// and not two lines of one. Solid is what computes or is held, hatched what waits or is cached, as in
// the timeline and the block map.

const STRIP = 40; // a strip's height, in CSS pixels
const RATE_SECONDS = 0.5; // a rate is of the steps that began in this time before a step's end
const HIT_STEPS = 128; // a hit rate is of this many steps
const MAX_LEAD = 4096; // steps looked at before those in view, for windows that reach back

// Figures of steps [from, to] by name, as arrays with NaN where there is none. `prefills` keeps a
// row's prefill tokens, which take a walk over its entries.
export function stepFigures(steps, from, to, prefills = new WeakMap()) {
  const names = ["output", "prefill", "held", "cached", "free", "hitRate", "running", "waiting"];
  const figures = Object.fromEntries(names.map((name) => [name, new Float64Array(to - from + 1).fill(NaN)]));
  const prefillOf = (row) => {
    let total = prefills.get(row);
    if (total === undefined) {
      total = 0;
      for (let i = 1; i < row.entries.length; i += 2) {
        if (codeOf(row.entries[i]) === PREFILL) total += countOf(row.entries[i]);
      }
      prefills.set(row, total);
    }
    return total;
  };
  // How far back the windows of the first step in view reach.
  let start = Math.max(steps.first, from - HIT_STEPS);
  const since = (steps.get(from)?.time ?? 0) - RATE_SECONDS;
  while (start > steps.first && start > from - MAX_LEAD && steps.get(start - 1)?.time >= since) start--;

  let window = []; // rows that rates are of, from `oldest` on
  let oldest = 0;
  let [numSampled, numPrefill] = [0, 0];
  const lookups = []; // rows that looked up tokens
  let oldestLookup = 0;
  let [numHit, numLookedUp] = [0, 0];
  for (let step = start; step <= Math.min(to, steps.last); step++) {
    while (oldestLookup < lookups.length && lookups[oldestLookup].step <= step - HIT_STEPS) {
      numHit -= lookups[oldestLookup].numHitTokens;
      numLookedUp -= lookups[oldestLookup++].numLookedUp;
    }
    const row = steps.get(step);
    // Nothing is averaged over rows that are not here, nor over a clock that went back.
    if (!row || row.time < window.at(-1)?.time) {
      window = [];
      oldest = numSampled = numPrefill = 0;
    }
    if (!row) continue;
    const end = row.time + row.seconds;
    window.push(row);
    numSampled += row.numSampled;
    numPrefill += prefillOf(row);
    while (oldest < window.length - 1 && window[oldest].time < end - RATE_SECONDS) {
      numSampled -= window[oldest].numSampled;
      numPrefill -= prefillOf(window[oldest++]);
    }
    if (row.numLookedUp) {
      lookups.push(row);
      numHit += row.numHitTokens;
      numLookedUp += row.numLookedUp;
    }
    const i = step - from;
    if (i < 0) continue;
    const seconds = end - window[oldest].time;
    const numBlocks = row.numHeld + row.numCached + row.numFree;
    if (seconds > 0) {
      figures.output[i] = numSampled / seconds;
      figures.prefill[i] = numPrefill / seconds;
    }
    if (numLookedUp > 0) figures.hitRate[i] = numHit / numLookedUp;
    figures.held[i] = row.numHeld / numBlocks;
    figures.cached[i] = row.numCached / numBlocks;
    figures.free[i] = row.numFree / numBlocks;
    figures.running[i] = row.numRunning;
    figures.waiting[i] = row.numWaiting;
  }
  return figures;
}

const percent = (share) => `${Math.round(100 * share)}%`;

// line: a figure as a line; stack: figures on top of each other, as far as they have a texture.
// most: the scale's end, or null for a round number above all that is in view, `least` or more.
const STRIPS = [
  { title: "Output", unit: "tokens/s", line: "output", most: null, least: 10, values: [["output", grouped, "tokens a second"]] },
  { title: "Prefill", unit: "tokens/s", line: "prefill", most: null, least: 10, values: [["prefill", grouped, "tokens a second"]] },
  {
    title: "KV blocks", unit: "share of all", stack: [["held", "solid"], ["cached", "hatched"]], most: 1,
    values: [["held", percent, "held"], ["cached", percent, "cached"], ["free", percent, "free"]],
  },
  { title: "Prefix hits", unit: "of lookups", line: "hitRate", most: 1, values: [["hitRate", percent, "of tokens looked up"]] },
  {
    title: "Queues", unit: "sequences", stack: [["running", "solid"], ["waiting", "hatched"]], most: null, least: 4,
    values: [["running", grouped, "running"], ["waiting", grouped, "waiting"]],
  },
];

// The next round number: a scale that changes rarely, and wastes a third of its height at most.
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((n) => n * power).find((n) => n >= value * 0.999999);
}

export function createCharts({ palette, onCursor, onMissing }) {
  // ---------------------------------------------------------------- elements
  const chip = h("span", { class: "nbe-tl-chip nbe-ch-chip" });
  const cursorMark = h("div", { class: "nbe-ch-mark nbe-ch-cursor", "aria-hidden": "true" });
  const hoverMark = h("div", { class: "nbe-ch-mark nbe-ch-hover", "aria-hidden": "true" }, chip);
  const strips = STRIPS.map((strip) => {
    const canvas = h("canvas", { class: "nbe-ch-plot", role: "img", "aria-label": strip.title });
    const texts = strip.values.map(([, , word]) => {
      const number = h("b");
      // One value alone needs no word: its strip has a title.
      return { number, line: h("div", {}, number, strip.values.length > 1 ? h("span", {}, ` ${word}`) : "") };
    });
    const values = h("div", { class: `nbe-ch-values${texts.length > 1 ? "" : " nbe-ch-single"}` }, ...texts.map(({ line }) => line));
    const scale = h("i", { class: "nbe-ch-scale" }); // where the strip's top is
    const title = h("div", { class: "nbe-ch-title" }, scale, h("span", {}, strip.title), h("small", {}, strip.unit));
    return { ...strip, canvas, texts, scale, row: h("div", { class: "nbe-ch-strip" }, title, canvas, values) };
  });
  const view = h("div", { class: "nbe-ch-view" }, ...strips.map(({ row }) => row), cursorMark, hoverMark);
  const element = h("div", { class: "nbe-ch", role: "group", "aria-label": "Charts of steps" }, view);

  // ---------------------------------------------------------------- state
  let data = { steps: null, cursor: null, range: null };
  let cursor = null;
  let wanted; // a cursor that the owner was not told of yet
  let axis = null;
  let layout = { left: 0, plotWidth: 1 };
  let figures = null;
  let hover = null; // x in pixels of the plot
  let isPressed = false;
  let isStale = true;
  const prefills = new WeakMap();
  const ask = createAsker(onMissing);
  const legible = createLegible();
  const redraw = createRedraw(element, frame);

  const cursorStep = () =>
    cursor === null ? data.steps.last : clamp(cursor, data.steps.first, data.steps.last);

  function frame(isChanged) {
    if (wanted !== undefined) {
      const step = wanted;
      wanted = undefined;
      onCursor(step);
    }
    if (!view.clientWidth) return;
    layout = stepMargins(view.clientWidth);
    element.style.setProperty("--nbe-tl-left", `${layout.left}px`);
    element.style.setProperty("--nbe-tl-plot", `${layout.plotWidth}px`);
    if (isStale || isChanged) {
      isStale = false;
      measure();
      paint();
    }
    placeMarks();
  }

  function measure() {
    axis = figures = null;
    if (!hasSteps(data.steps)) return;
    const [from, to] = data.range ?? defaultRange(data.steps, layout.plotWidth);
    axis = createAxis([from, to], layout.plotWidth);
    ask(data.steps, from, to);
    figures = stepFigures(data.steps, from, to, prefills);
  }

  // ---------------------------------------------------------------- drawing
  function paint() {
    const ink = getComputedStyle(element).color;
    const colour = legible(palette, ink)[0];
    for (const strip of strips) {
      const context = fitCanvas(strip.canvas, layout.plotWidth, STRIP);
      strip.scale.hidden = !axis || layout.left < 100; // no place
      const base = STRIP - 1;
      context.fillStyle = ink;
      context.globalAlpha = 0.18;
      context.fillRect(0, base, layout.plotWidth, 1);
      context.globalAlpha = 0.07;
      for (const step of axis ? axisTicks(axis) : []) {
        context.fillRect(Math.round(axis.x(step) + axis.columnWidth / 2 - 0.5), 0, 1, base);
      }
      context.globalAlpha = 1;
      if (!axis) continue;
      const columns = columnsOf(strip.line ? [strip.line] : strip.stack.map(([name]) => name));
      let highest = 0;
      for (const { values } of columns) highest = Math.max(highest, values.reduce((sum, value) => sum + value, 0));
      const most = strip.most ?? roundUp(Math.max(strip.least, highest));
      const y = (value) => base - (value / most) * (base - 3);
      if (strip.line) paintLine(context, columns, y, base, colour);
      else paintStack(context, columns, y, strip.stack, colour);
      if (strip.most === null) setText(strip.scale, grouped(most));
    }
  }

  // Figures by column of the screen: of one step, or the mean of those that share a pixel.
  function columnsOf(names) {
    const columns = [];
    const end = Math.min(axis.to, data.steps.last) - axis.from + 1;
    for (let i = 0, next; i < end; i = next) {
      const x = axis.x(axis.from + i);
      next = i + 1;
      while (next < end && axis.x(axis.from + next) === x) next++;
      const values = names.map((name) => mean(figures[name], i, next));
      if (values.every(Number.isFinite)) columns.push({ x, right: axis.x(axis.from + next), values });
    }
    return columns;
  }

  function mean(values, start, end) {
    let [sum, count] = [0, 0];
    for (let i = start; i < end; i++) {
      if (values[i] !== values[i]) continue;
      sum += values[i];
      count += 1;
    }
    return sum / count;
  }

  function paintLine(context, columns, y, base, colour) {
    const line = new Path2D();
    const area = new Path2D();
    let runs = 0;
    for (let i = 0; i < columns.length; ) {
      let end = i + 1;
      while (end < columns.length && columns[end].x === columns[end - 1].right) end++;
      // From edge to edge, so that a step alone is seen too.
      const points = [
        [columns[i].x, y(columns[i].values[0])],
        ...columns.slice(i, end).map(({ x, right, values }) => [(x + right) / 2, y(values[0])]),
        [columns[end - 1].right, y(columns[end - 1].values[0])],
      ];
      area.moveTo(points[0][0], base);
      points.forEach(([px, py], k) => {
        k ? line.lineTo(px, py) : line.moveTo(px, py);
        area.lineTo(px, py);
      });
      area.lineTo(points.at(-1)[0], base);
      runs += 1;
      i = end;
    }
    if (!runs) return;
    context.fillStyle = context.strokeStyle = colour;
    context.globalAlpha = 0.13;
    context.fill(area);
    context.globalAlpha = 1;
    context.lineWidth = 1.5;
    context.lineJoin = "round";
    context.stroke(line);
  }

  function paintStack(context, columns, y, layers, colour) {
    layers.forEach(([, texture], layer) => {
      const path = new Path2D();
      for (const { x, right, values } of columns) {
        let below = 0;
        for (let k = 0; k < layer; k++) below += values[k];
        const top = y(below + values[layer]);
        path.rect(x, top, right - x, y(below) - top);
      }
      context.fillStyle = texture === "solid" ? colour : hatch(context, colour);
      context.globalAlpha = texture === "solid" ? 0.65 : 0.7;
      context.fill(path);
    });
    context.globalAlpha = 1;
  }

  // ---------------------------------------------------------------- cursor and values
  function placeMarks() {
    cursorMark.hidden = hoverMark.hidden = true;
    let step = null;
    if (axis) {
      step = cursorStep();
      place(cursorMark, step);
      const under = hover === null ? null : axis.stepAt(hover);
      if (under !== null && under >= data.steps.first && under <= data.steps.last) {
        step = under;
        if (!isPressed) place(hoverMark, under);
        setText(chip, `step ${grouped(under)}`);
      }
    }
    for (const { title, canvas, values, texts } of strips) {
      const found = values.map(([name, format, word]) => {
        const value = step === null ? NaN : valueAt(name, step);
        return Number.isFinite(value) ? [format(value), word] : ["–", word];
      });
      found.forEach(([text], i) => setText(texts[i].number, text));
      const told = found.map(([text, word]) => (text === "–" ? `${word} unknown` : `${text} ${word}`)).join(", ");
      const label = step === null ? `${title}: no step yet` : `${title} at step ${step}: ${told}`;
      if (canvas.getAttribute("aria-label") !== label) canvas.setAttribute("aria-label", label);
    }
  }

  function valueAt(name, step) {
    if (step >= axis.from && step <= axis.to) return figures[name][step - axis.from];
    return stepFigures(data.steps, step, step, prefills)[name][0]; // the cursor is out of view
  }

  function place(mark, step) {
    if (step < axis.from || step > axis.to) return;
    mark.hidden = false;
    mark.style.transform = `translateX(${layout.left + (axis.x(step) + axis.x(step + 1)) / 2}px)`;
  }

  // ---------------------------------------------------------------- pointer
  function follow(event) {
    const x = event.clientX - view.getBoundingClientRect().left - layout.left;
    hover = x < 0 || x >= layout.plotWidth ? null : x;
    redraw.schedule();
    if (!isPressed || !axis) return;
    const step = axis.stepAt(clamp(x, 0, layout.plotWidth - 0.01));
    const next = step > data.steps.last ? null : Math.max(step, data.steps.first);
    if (next === cursor) return;
    cursor = wanted = next;
  }

  for (const { canvas } of strips) {
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !axis) return;
      isPressed = true;
      canvas.setPointerCapture(event.pointerId);
      follow(event);
    });
    canvas.addEventListener("pointermove", follow);
    for (const kind of ["pointerup", "pointercancel", "lostpointercapture"]) {
      canvas.addEventListener(kind, () => {
        isPressed = false;
        redraw.schedule();
      });
    }
    canvas.addEventListener("pointerleave", () => {
      hover = null;
      redraw.schedule();
    });
  }

  redraw.schedule();
  return {
    element,
    update(next) {
      data = next;
      if (wanted === undefined && !isPressed) cursor = next.cursor ?? null;
      isStale = true;
      redraw.schedule();
    },
    destroy() {
      redraw.destroy();
      element.remove();
    },
  };
}
