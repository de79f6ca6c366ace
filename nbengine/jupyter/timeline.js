// The step timeline: one line a sequence, one column a step, on a canvas between names and values.
//
// createTimeline(…) returns {element, update(data), destroy()} and knows nothing of the kernel: data
// comes in whole, what the user does goes out as callbacks. In one module it follows dom.js,
// redraw.js, step_axis.js, entries.js and lanes.js.
//
//   data = {steps, names, cursor, selected, isLive}
//     steps     {first, last, get(step)}; a row is {step, time, seconds, phases, numTokens, budget,
//               numSampled, failed, entries, …}; for `entries` see entries.js
//     names     Map of slot to {id, request, colour}
//     cursor    a step, or null: the newest
//     selected  a sequence's id, or null
//     isLive    whether the engine steps by itself now
//   onCursor(step | null), onSelect(id | null), onMissing(from, to), and onRange(from, to): the steps
//   in view, for the charts; onRange(null, null) when they are the newest that fit (defaultRange).
//
// Where steps are narrower than pixels, what shares a pixel is drawn over each other, and events stay.
//
// Invariant: what is drawn is of `data` and the view alone (the zoom, the scroll); nothing is kept of
// earlier drawings but the names' nodes.

const MIN_LINES = 6;
const MAX_LINES = 18; // with more, lines scroll
const SPARE_LINES = 5; // drawn above and below, so that scrolling does not show an edge
const RULER = 24;
const FAILURE = "#d55e00"; // dashboard.css has it too
const MIN_SPAN = 8; // steps, at the closest zoom
const FRAME_BUDGET_MS = 8; // for regrouping rows that came in
const TOLD = 8; // sequences that a screen reader is told of, of one step

const PHASES = ["schedule", "prepare", "execute", "commit"];

const milliseconds = (seconds) => `${(seconds * 1000).toFixed(seconds < 0.1 ? 1 : 0)} ms`;
export function createTimeline({ palette, onCursor, onSelect, onMissing, onRange = () => {} }) {
  // ---------------------------------------------------------------- elements
  const summary = h("div", { class: "nbe-tl-summary" });
  const live = h("button", { class: "nbe-tl-live", type: "button", "aria-pressed": "true", title: "Follow the newest step (Esc)" }, "Live");
  const ruler = h("canvas", { class: "nbe-tl-ruler", "aria-hidden": "true" });
  const plot = h("canvas", {
    class: "nbe-tl-plot",
    tabindex: "0",
    role: "slider",
    "aria-label": "Step timeline",
    "aria-orientation": "horizontal",
  });
  const lines = h("div", { class: "nbe-tl-lines" }, plot);
  const scroller = h("div", { class: "nbe-tl-scroller", tabindex: "-1" }, lines);
  const chip = h("span", { class: "nbe-tl-chip" });
  const cursorMark = h("div", { class: "nbe-tl-cursor", "aria-hidden": "true" }, chip);
  const brushMark = h("div", { class: "nbe-tl-brush", "aria-hidden": "true" });
  const tip = h("div", { class: "nbe-tl-tip", role: "tooltip" });
  const empty = h("div", { class: "nbe-tl-empty" });
  const thumb = h("div", { class: "nbe-tl-thumb" });
  const track = h("div", { class: "nbe-tl-track", "aria-hidden": "true" }, thumb);
  const view = h("div", { class: "nbe-tl-view" }, ruler, scroller, track, cursorMark, brushMark, empty, tip);
  const legend = h("div", { class: "nbe-tl-legend", "aria-hidden": "true" });
  const rareKeys = new Map();
  for (const [code, word, shape, isRare] of LEGEND) {
    const key = h("span", { class: "nbe-tl-key" });
    key.innerHTML = `<svg width="20" height="14" viewBox="0 0 20 14">${shape}</svg>`; // of this file, not of data
    key.append(word);
    if (isRare) rareKeys.set(code, key);
    legend.append(key);
  }
  legend.append(h("span", { class: "nbe-tl-hint" }, "drag the steps' numbers or Ctrl + wheel to zoom, arrow keys to move"));
  const element = h("div", { class: "nbe-tl" }, h("div", { class: "nbe-tl-head" }, summary, live), view, legend);

  // ---------------------------------------------------------------- state
  let data = { steps: null, names: new Map(), cursor: null, selected: null, isLive: false };
  let cursor = null; // as the user moved it, until the owner says another
  let selected = null;
  let wanted; // a cursor that the owner was not told of yet
  let revealed = true; // whether the cursor was brought into view since it moved
  // The zoom. from: the first step in view, null to follow the newest. span: how many steps, null for
  // as many as fit, Infinity for all. Both may have a fraction, so that small wheel turns add up.
  const zoom = { from: null, span: null };
  let told = ""; // the last onRange, as text
  let axis = null;
  let layout = { left: 0, plotWidth: 1 };
  let slots = []; // sequences in view, from the top
  let tallest = MIN_LINES;
  let hover = null; // {x, y} in the plot's pixels from the lines' corner
  let gesture = null; // what a pressed pointer does: "scrub", "brush", "pan"
  let brush = null; // {start, end} in pixels of the plot
  let isRowFollowing = true; // lines scroll with the running sequences until the user scrolls
  let scrolledTo = 0; // where we scrolled to
  const labels = new Map(); // slot to {row, button, swatch, name, value}
  const lanes = createLanes();
  const ask = createAsker(onMissing);
  const legible = createLegible();
  const redraw = createRedraw(element, frame);

  const nameOf = (slot) => data.names.get(slot)?.id ?? `#${slot}`;
  const colourOf = (slot) => (data.names.get(slot)?.colour ?? 0) % palette.length;
  const cursorStep = () =>
    cursor === null ? data.steps.last : clamp(cursor, data.steps.first, data.steps.last);
  const isFollowing = () => cursor === null && zoom.from === null;

  // ---------------------------------------------------------------- the view
  function range() {
    const { steps } = data;
    if (zoom.from === null && zoom.span === null) return defaultRange(steps, layout.plotWidth);
    const fit = defaultSpan(layout.plotWidth);
    const most = Math.max(steps.last - steps.first + 1, zoom.span === Infinity ? 1 : fit);
    const span = clamp(Math.round(zoom.span ?? fit), Math.min(MIN_SPAN, most), most);
    const newest = Math.max(steps.first, steps.last - span + 1);
    const from = zoom.from === null ? newest : clamp(Math.round(zoom.from), steps.first, newest);
    return [from, from + span - 1];
  }

  // What else the user does before the next frame is meant on the new axis.
  function zoomed() {
    axis = createAxis(range(), layout.plotWidth);
    stale();
  }

  // Show `span` steps, with the step at `x` (in pixels of the plot) staying where it is.
  function zoomTo(span, x) {
    const { steps } = data;
    const total = steps.last - steps.first + 1;
    const share = x / layout.plotWidth;
    const from = zoom.from ?? axis.from;
    const step = from + share * (zoom.span === null || zoom.span === Infinity ? axis.to - axis.from + 1 : zoom.span);
    zoom.span = clamp(span, Math.min(MIN_SPAN, total), total);
    zoom.from = clamp(step - share * zoom.span, steps.first, Math.max(steps.first, steps.last - zoom.span + 1));
    const showsNewest = Math.round(zoom.from + zoom.span) > steps.last;
    if (zoom.span >= total) zoom.span = Infinity;
    if (cursor === null && showsNewest) zoom.from = null;
    zoomed();
  }

  function zoomBy(factor, x) {
    zoomTo((zoom.span === null || zoom.span === Infinity ? axis.to - axis.from + 1 : zoom.span) * factor, x);
  }

  // Move the view by some steps. Whether there was anywhere to go.
  function panBy(numSteps) {
    const { steps } = data;
    const span = axis.to - axis.from + 1;
    const newest = Math.max(steps.first, steps.last - span + 1);
    const before = clamp(zoom.from ?? newest, steps.first, newest);
    const after = clamp(before + numSteps, steps.first, newest);
    if (after === before) return false;
    zoom.from = cursor === null && after === newest ? null : after;
    zoomed();
    return true;
  }

  function follow(zoomOut) {
    zoom.from = null;
    if (zoomOut) zoom.span = null;
    isRowFollowing = true;
    moveCursor(null);
  }

  function moveCursor(step) {
    if (step === null) zoom.from = null;
    else zoom.from ??= axis.from; // a view that slid on would take the cursor away
    revealed = false;
    cursor = wanted = step;
    stale();
  }

  // Bring the cursor into view: by as little as can be when it is near, to the middle when it is not.
  function reveal() {
    if (revealed || !hasSteps(data.steps)) return;
    revealed = true;
    if (cursor === null) return;
    const [from, to] = range();
    zoom.from ??= from;
    const step = cursorStep();
    const span = to - from + 1;
    const margin = Math.floor(span / 12);
    if (step >= from && step <= to) return;
    if (step < from - span || step > to + span) zoom.from = step - span / 2;
    else zoom.from = step < from ? step - margin : step + margin - span + 1;
  }

  let isStale = true;
  function stale() {
    isStale = true;
    redraw.schedule();
  }

  function select(id) {
    selected = id;
    onSelect(id);
    stale();
  }

  function selectNeighbour(move) {
    if (!slots.length) return;
    const at = slots.findIndex((slot) => nameOf(slot) === selected);
    const top = Math.ceil(scroller.scrollTop / LINE);
    const next = at < 0 ? (move > 0 ? Math.min(top, slots.length - 1) : slots.length - 1) : at + move;
    if (next < 0 || next >= slots.length) return;
    const y = next * LINE;
    const height = scroller.clientHeight;
    if (y < scroller.scrollTop) scroller.scrollTop = y;
    else if (y + LINE > scroller.scrollTop + height) scroller.scrollTop = y + LINE - height;
    select(nameOf(slots[next]));
  }

  // ---------------------------------------------------------------- a frame
  function frame(isChanged) {
    // The owner may answer with update(), which asks for another frame; this one draws its answer.
    if (wanted !== undefined) {
      const step = wanted;
      wanted = undefined;
      onCursor(step);
    }
    if (!view.clientWidth) return;
    layout = stepMargins(view.clientWidth);
    element.style.setProperty("--nbe-tl-left", `${layout.left}px`);
    element.style.setProperty("--nbe-tl-plot", `${layout.plotWidth}px`);
    if (!hasSteps(data.steps)) {
      paintEmpty();
      return;
    }
    // A pointer that only moves changes nothing on the canvas.
    if (isStale || isChanged) paint();
    placeMarks();
  }

  function paint() {
    isStale = false;
    reveal();
    const [from, to] = range();
    axis = createAxis([from, to], layout.plotWidth);
    const isDefault = zoom.from === null && zoom.span === null;
    const now = isDefault ? "" : `${from} ${to}`;
    if (now !== told) {
      told = now;
      isDefault ? onRange(null, null) : onRange(from, to);
    }
    ask(data.steps, from, to);
    const isComplete = lanes.sync(data.steps, Math.max(from, data.steps.first), Math.min(to, data.steps.last), FRAME_BUDGET_MS);
    placeLines(lanes.slots(from, Math.min(to, data.steps.last)));
    paintRuler();
    paintPlot();
    tell();
    if (!isComplete) stale();
  }

  function paintEmpty() {
    axis = null;
    placeLines([]);
    for (const { row } of labels.values()) row.remove();
    labels.clear();
    fitCanvas(ruler, layout.plotWidth, RULER);
    fitCanvas(plot, layout.plotWidth, scroller.clientHeight);
    setText(empty, "No step yet. Each step that the engine takes becomes a column here.");
    setText(summary, "no step yet");
    for (const node of [cursorMark, brushMark, tip, track]) node.hidden = true;
    empty.hidden = false;
    live.setAttribute("aria-pressed", String(isFollowing()));
    for (const [name, value] of [["valuemin", 0], ["valuemax", 0], ["valuenow", 0], ["valuetext", "no step yet"]]) {
      plot.setAttribute(`aria-${name}`, value);
    }
    for (const key of rareKeys.values()) key.hidden = true;
  }

  // Which lines there are, how high the view is, and how far it is scrolled.
  function placeLines(next) {
    const top = Math.floor(scroller.scrollTop / LINE);
    const anchor = slots[top];
    slots = next;
    // It only ever grows: a page that jumps while one watches it is worse than some empty lines.
    tallest = Math.max(tallest, Math.min(MAX_LINES, slots.length));
    const height = tallest * LINE;
    scroller.style.height = `${height}px`;
    lines.style.height = `${Math.max(height, slots.length * LINE)}px`;
    let target = scroller.scrollTop;
    const moved = anchor === undefined ? -1 : slots.indexOf(anchor);
    if (moved >= 0 && moved !== top) target += (moved - top) * LINE;
    if (isRowFollowing && isFollowing()) target = runningInView(target, height) ?? target;
    target = clamp(target, 0, Math.max(0, slots.length * LINE - height));
    if (target !== scroller.scrollTop) {
      scrolledTo = target;
      scroller.scrollTop = target;
      scrolledTo = scroller.scrollTop;
    }
  }

  // Where to scroll so that the sequences that computed in the newest step are in view.
  function runningInView(scrollTop, height) {
    if (slots.length * LINE <= height) return null;
    const row = data.steps.get(data.steps.last);
    if (!row) return null;
    const running = new Set();
    for (let i = 0; i < row.entries.length; i += 2) {
      const code = codeOf(row.entries[i + 1]);
      if (code === PREFILL || code === DECODE) running.add(row.entries[i]);
    }
    const isRunning = (slot) => running.has(slot);
    const first = slots.findIndex(isRunning);
    if (first < 0) return null;
    const last = slots.findLastIndex(isRunning);
    if (first * LINE >= scrollTop && (last + 1) * LINE <= scrollTop + height) return null;
    // As much of what was above as there is place for.
    return Math.min(first * LINE, Math.max(0, (last + 2) * LINE - height));
  }

  // ---------------------------------------------------------------- drawing
  function paintRuler() {
    const context = fitCanvas(ruler, layout.plotWidth, RULER);
    const style = getComputedStyle(ruler);
    context.font = `${style.fontSize} ${style.fontFamily}`;
    context.fillStyle = style.color;
    context.textAlign = "center";
    context.textBaseline = "middle";
    const { width, columnWidth } = axis;
    for (const step of axisTicks(axis)) {
      const x = axis.x(step) + columnWidth / 2;
      const text = grouped(step);
      const half = context.measureText(text).width / 2;
      if (x + half > width + 4) continue;
      context.globalAlpha = 0.62;
      context.fillText(text, Math.max(half, x), RULER / 2 - 1);
      context.globalAlpha = 0.3;
      context.fillRect(Math.round(x - 0.5), RULER - 4, 1, 4);
    }
  }

  function paintPlot() {
    const height = scroller.clientHeight;
    const firstLine = Math.max(0, Math.floor(scroller.scrollTop / LINE) - SPARE_LINES);
    const endLine = Math.min(slots.length, Math.ceil((scroller.scrollTop + height) / LINE) + SPARE_LINES);
    const top = firstLine * LINE;
    const canvasHeight = Math.max(endLine * LINE, Math.min(height, lines.clientHeight)) - top;
    plot.style.top = `${top}px`;
    const context = fitCanvas(plot, axis.width, canvasHeight);
    const ink = getComputedStyle(plot).color;
    const colours = legible(palette, ink);
    const hatches = colours.map((colour) => hatch(context, colour));
    paintGround(context, canvasHeight, ink);
    const edges = new Float64Array(axis.to - axis.from + 2);
    for (let i = 0; i < edges.length; i++) edges[i] = axis.x(axis.from + i);
    const newest = Math.min(axis.to, data.steps.last);
    for (let line = firstLine; line < endLine; line++) {
      const slot = slots[line];
      const colour = colourOf(slot);
      const spans = lanes.spans(slot, axis.from, newest);
      const looks = { colour: colours[colour], hatching: hatches[colour], ink };
      paintLane(context, spans, axis, edges, line * LINE - top + LINE / 2, axis.x(newest + 1), looks);
    }
    placeLabels(firstLine, endLine, colours);
  }

  // Behind the lines: labels' guides, failed steps, steps that the page lacks.
  function paintGround(context, height, ink) {
    context.fillStyle = ink;
    context.globalAlpha = 0.07;
    for (const step of axisTicks(axis)) {
      context.fillRect(Math.round(axis.x(step) + axis.columnWidth / 2 - 0.5), 0, 1, height);
    }
    const { steps } = data;
    let missing = null;
    const end = Math.min(axis.to, steps.last) + 1;
    for (let step = Math.max(axis.from, steps.first); step <= end; step++) {
      const row = step < end ? steps.get(step) : null;
      if (row === undefined) missing ??= step;
      else if (missing !== null) {
        context.globalAlpha = 0.06;
        context.fillRect(axis.x(missing), 0, axis.x(step) - axis.x(missing), height);
        missing = null;
      }
      if (row?.failed) {
        context.save();
        context.fillStyle = FAILURE;
        context.globalAlpha = 0.22;
        context.fillRect(axis.x(step), 0, Math.max(2, axis.x(step + 1) - axis.x(step)), height);
        context.restore();
      }
    }
    context.globalAlpha = 1;
  }

  // ---------------------------------------------------------------- names and values
  function placeLabels(firstLine, endLine, colours) {
    const shown = new Set(slots.slice(firstLine, endLine));
    for (const [slot, { row }] of labels) {
      if (shown.has(slot)) continue;
      row.remove();
      labels.delete(slot);
    }
    const entries = new Map();
    const row = data.steps.get(cursorStep());
    for (let i = 0; row && i < row.entries.length; i += 2) {
      const word = row.entries[i + 1];
      const heaviest = entries.get(row.entries[i]) ?? 0;
      if (WEIGHT[codeOf(word)] > WEIGHT[codeOf(heaviest)]) entries.set(row.entries[i], word);
    }
    for (let line = firstLine; line < endLine; line++) {
      const slot = slots[line];
      let label = labels.get(slot);
      if (!label) labels.set(slot, (label = makeLabel(slot)));
      const id = nameOf(slot);
      setText(label.name, id);
      label.button.title = id;
      label.swatch.style.background = colours[colourOf(slot)];
      label.row.style.top = `${line * LINE}px`;
      const isSelected = id === selected;
      label.row.classList.toggle("nbe-tl-selected", isSelected);
      label.button.setAttribute("aria-pressed", String(isSelected));
      const word = entries.get(slot);
      setText(label.value, word === undefined ? "" : VALUES[codeOf(word)]?.(grouped(countOf(word))) ?? "");
      label.row.classList.toggle("nbe-tl-idle", word === undefined);
    }
  }

  function makeLabel(slot) {
    const swatch = h("i", { class: "nbe-tl-swatch" });
    const name = h("span", { class: "nbe-tl-name" });
    // Out of the tab order: the arrow keys go through sequences.
    const button = h("button", { class: "nbe-tl-label", type: "button", tabindex: "-1" }, swatch, name);
    button.addEventListener("click", () => select(nameOf(slot) === selected ? null : nameOf(slot)));
    const value = h("span", { class: "nbe-tl-value" });
    const row = h("div", { class: "nbe-tl-line" }, button, value);
    row.style.height = `${LINE}px`;
    lines.append(row);
    return { row, button, swatch, name, value };
  }

  // ---------------------------------------------------------------- cursor, brush, tip
  function placeMarks() {
    const { steps } = data;
    const step = cursorStep();
    const isIn = step >= axis.from && step <= axis.to;
    cursorMark.hidden = !isIn;
    if (isIn) {
      const x = axis.x(step);
      const width = Math.max(1, axis.x(step + 1) - x);
      cursorMark.style.width = `${width}px`;
      cursorMark.style.transform = `translateX(${layout.left + x}px)`;
      cursorMark.classList.toggle("nbe-tl-thin", width < 4);
      setText(chip, grouped(step));
      const half = 4 + 3.4 * chip.textContent.length; // nearly, without a layout
      const centre = x + width / 2;
      chip.style.marginLeft = `${clamp(centre, half, axis.width - half) - centre}px`;
    }
    brushMark.hidden = brush === null || Math.abs(brush.end - brush.start) < 4;
    if (brush) {
      brushMark.style.left = `${layout.left + Math.min(brush.start, brush.end)}px`;
      brushMark.style.width = `${Math.abs(brush.end - brush.start)}px`;
    }
    const total = Math.max(steps.last, axis.to) - steps.first + 1;
    track.hidden = axis.to - axis.from + 1 >= total;
    thumb.style.left = `${(100 * (axis.from - steps.first)) / total}%`;
    thumb.style.width = `${(100 * (axis.to - axis.from + 1)) / total}%`;
    empty.hidden = slots.length > 0;
    if (!slots.length) setText(empty, "No sequence in these steps.");
    placeTip();
  }

  function placeTip() {
    const step = hover && axis.stepAt(hover.x);
    tip.hidden = !hover || gesture === "pan" || gesture === "brush" || step > data.steps.last;
    if (tip.hidden) return;
    // Where columns are narrower than a pixel, the tip tells of all steps of the pixel.
    const last = clamp(axis.stepAt(hover.x + 1) - 1, step, data.steps.last);
    const slot = slots[Math.floor(hover.y / LINE)];
    const head = h("b", {}, step === last ? `step ${grouped(step)}` : `steps ${grouped(step)} to ${grouped(last)}`);
    const rows = [h("div", {}, head, ` ${stepFacts(step, last)}`)];
    if (slot !== undefined) {
      const swatch = h("i", { class: "nbe-tl-swatch" });
      swatch.style.background = labels.get(slot)?.swatch.style.background ?? "";
      rows.push(h("div", {}, swatch, h("b", {}, nameOf(slot)), ` ${laneFacts(slot, step, last)}`));
    }
    const row = data.steps.get(step);
    if (step === last && row?.phases) {
      const phases = PHASES.map((name, i) => `${name} ${(row.phases[i] * 1000).toFixed(1)}`).join(" · ");
      rows.push(h("small", {}, `${phases} ms`));
    }
    tip.replaceChildren(...rows);
    const x = layout.left + hover.x;
    const y = RULER + hover.y - scroller.scrollTop;
    const isLeft = x + 14 + tip.offsetWidth > view.clientWidth;
    tip.style.left = `${Math.max(0, isLeft ? x - 14 - tip.offsetWidth : x + 14)}px`;
    tip.style.top = `${y + 16}px`;
  }

  function stepFacts(step, last) {
    if (step !== last) return "";
    const row = data.steps.get(step);
    if (!row) return "is not on this page yet";
    const failed = row.failed ? " · taken back" : "";
    return `${grouped(row.numTokens)} of ${grouped(row.budget)} tokens · ${milliseconds(row.seconds)}${failed}`;
  }

  function laneFacts(slot, step, last) {
    const totals = new Map();
    for (const { what, start, end } of lanes.spans(slot, step, last)) {
      for (let i = start; i < end; i++) {
        const code = codeOf(what[i]);
        totals.set(code, (totals.get(code) ?? 0) + countOf(what[i]));
      }
    }
    if (!totals.size) return "nothing";
    return [...totals].map(([code, n]) => DETAILS[code]?.(n) ?? entryText(code, n)).join(", ");
  }

  // ---------------------------------------------------------------- in words
  function tell() {
    const { steps } = data;
    const step = cursorStep();
    plot.setAttribute("aria-valuemin", steps.first);
    plot.setAttribute("aria-valuemax", steps.last);
    plot.setAttribute("aria-valuenow", step);
    plot.setAttribute("aria-valuetext", valueText(step));
    live.setAttribute("aria-pressed", String(isFollowing()));
    live.classList.toggle("nbe-tl-on", Boolean(data.isLive));
    const facts = [`step ${grouped(step)}`];
    const row = steps.get(step);
    if (row) facts.push(stepFacts(step, step));
    setText(summary, facts.join(" · "));
    const codes = lanes.codes(axis.from, axis.to);
    for (const [code, key] of rareKeys) key.hidden = !(codes & (1 << code));
  }

  function valueText(step) {
    const row = data.steps.get(step);
    if (!row) return `step ${step}: not on this page yet`;
    const parts = new Map();
    for (let i = 0; i < row.entries.length; i += 2) {
      const slot = row.entries[i];
      if (!parts.has(slot)) parts.set(slot, []);
      parts.get(slot).push(entryText(codeOf(row.entries[i + 1]), countOf(row.entries[i + 1])));
    }
    if (!parts.size) return `step ${step}: no sequence`;
    const isSelected = ([slot]) => nameOf(slot) === selected;
    const found = [...parts];
    const ordered = [...found.filter(isSelected), ...found.filter((part) => !isSelected(part))];
    const told = ordered.slice(0, TOLD).map(([slot, texts]) => `${nameOf(slot)} ${texts.join(" and ")}`);
    if (ordered.length > TOLD) told.push(`and ${ordered.length - TOLD} more`);
    return `step ${step}${row.failed ? ", taken back" : ""}: ${told.join(", ")}`;
  }

  // ---------------------------------------------------------------- pointer
  const plotX = (event) => event.clientX - view.getBoundingClientRect().left - layout.left;

  function scrub(event) {
    const step = axis.stepAt(clamp(plotX(event), 0, axis.width - 0.01));
    const next = step > data.steps.last ? null : Math.max(step, data.steps.first);
    if (next !== cursor) moveCursor(next);
  }

  function pointAt(event) {
    hover = { x: clamp(plotX(event), 0, layout.plotWidth - 0.01), y: event.clientY - lines.getBoundingClientRect().top };
    redraw.schedule();
  }

  function press(event, kind) {
    if (event.button !== 0 || !axis) return false;
    gesture = kind;
    event.currentTarget.setPointerCapture(event.pointerId);
    return true;
  }

  plot.addEventListener("pointerdown", (event) => {
    if (press(event, "scrub")) scrub(event);
  });
  plot.addEventListener("pointermove", (event) => {
    if (!axis) return;
    if (gesture === "scrub") scrub(event);
    pointAt(event);
  });
  plot.addEventListener("pointerleave", () => {
    hover = null;
    redraw.schedule();
  });

  ruler.addEventListener("pointerdown", (event) => {
    if (press(event, "brush")) brush = { start: plotX(event), end: plotX(event) };
  });
  ruler.addEventListener("mousedown", (event) => {
    event.preventDefault(); // the keys are the plot's: Escape ends a brush
    plot.focus({ preventScroll: true });
  });
  ruler.addEventListener("pointermove", (event) => {
    if (gesture !== "brush") return;
    brush.end = clamp(plotX(event), 0, axis.width - 0.01);
    redraw.schedule();
  });
  ruler.addEventListener("pointerup", (event) => {
    if (gesture !== "brush" || !axis) return;
    const from = axis.stepAt(Math.min(brush.start, brush.end));
    const to = Math.min(axis.stepAt(Math.max(brush.start, brush.end)), data.steps.last);
    if (Math.abs(brush.end - brush.start) < 4) scrub(event);
    else if (to >= from) {
      zoom.span = Math.max(MIN_SPAN, to - from + 1);
      zoom.from = (from + to + 1 - zoom.span) / 2;
      zoomed();
    }
  });

  let panStart = null;
  track.addEventListener("pointerdown", (event) => {
    if (!press(event, "pan")) return;
    const box = track.getBoundingClientRect();
    const { steps } = data;
    const total = Math.max(steps.last, axis.to) - steps.first + 1;
    // Beside the thumb, the view comes to the pointer first.
    const step = steps.first + ((event.clientX - box.left) / box.width) * total;
    if (step < axis.from || step > axis.to + 1) panBy(step - (axis.from + axis.to + 1) / 2);
    panStart = { x: event.clientX, from: zoom.from ?? axis.from, perPixel: total / box.width };
  });
  track.addEventListener("pointermove", (event) => {
    if (gesture !== "pan") return;
    const target = panStart.from + (event.clientX - panStart.x) * panStart.perPixel;
    panBy(target - (zoom.from ?? axis.from));
  });

  for (const node of [plot, ruler, track]) {
    for (const kind of ["pointerup", "pointercancel", "lostpointercapture"]) {
      node.addEventListener(kind, () => {
        gesture = brush = null;
        redraw.schedule();
      });
    }
  }

  view.addEventListener("dblclick", (event) => {
    if (event.target === plot || event.target === ruler) follow(true);
  });

  view.addEventListener(
    "wheel",
    (event) => {
      if (!axis) return;
      const unit = event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? 1 : 16;
      if (event.ctrlKey || event.metaKey) {
        event.preventDefault();
        zoomBy(Math.exp(clamp(event.deltaY * unit, -100, 100) * 0.004), clamp(plotX(event), 0, axis.width));
        return;
      }
      // Sideways always pans. Upright pans where it can scroll nothing here and one has zoomed;
      // otherwise it is the page's.
      const isSideways = Math.abs(event.deltaX) > Math.abs(event.deltaY);
      const scrollsLines = scroller.scrollHeight > scroller.clientHeight;
      if (!isSideways && (zoom.span === null || scrollsLines)) return;
      const delta = (isSideways ? event.deltaX : event.deltaY) * unit;
      if (panBy(delta / axis.columnWidth)) event.preventDefault();
    },
    { passive: false },
  );

  scroller.addEventListener("scroll", () => {
    if (scroller.scrollTop !== scrolledTo) isRowFollowing = false;
    scrolledTo = scroller.scrollTop;
    stale();
  });

  // ---------------------------------------------------------------- keys
  function moveBy(numSteps) {
    const { first, last } = data.steps;
    const next = cursorStep() + numSteps;
    if (next > last) moveCursor(null);
    else moveCursor(Math.max(first, next));
  }

  const middleOfCursor = () => clamp(axis.x(cursorStep()) + axis.columnWidth / 2, 0, axis.width);
  const KEYS = {
    ArrowLeft: (event) => moveBy(event.shiftKey ? -10 : -1),
    ArrowRight: (event) => moveBy(event.shiftKey ? 10 : 1),
    PageUp: () => moveBy(-10),
    PageDown: () => moveBy(10),
    Home: () => moveCursor(data.steps.first),
    End: () => follow(false),
    ArrowUp: () => selectNeighbour(-1),
    ArrowDown: () => selectNeighbour(1),
    "+": () => zoomBy(1 / 1.5, middleOfCursor()),
    "=": () => zoomBy(1 / 1.5, middleOfCursor()),
    "-": () => zoomBy(1.5, middleOfCursor()),
  };
  plot.addEventListener("keydown", (event) => {
    const act = event.key === "Escape" ? () => follow(true) : KEYS[event.key];
    if (!act || !axis || event.ctrlKey || event.metaKey || event.altKey) return;
    // The notebook has its own use for these keys.
    event.preventDefault();
    event.stopPropagation();
    if (event.key === "Escape" && gesture === "brush") gesture = brush = null;
    else act(event);
    redraw.schedule();
  });

  live.addEventListener("click", () => follow(true));

  redraw.schedule();
  return {
    element,
    update(next) {
      data = next;
      if (!hasSteps(next.steps)) axis = null; // nothing to point at
      selected = next.selected ?? null;
      // What the user does now is newer than what the owner heard of.
      if (wanted === undefined && gesture !== "scrub") {
        const step = next.cursor ?? null;
        if (step !== cursor) {
          if (step === null) zoom.from = null;
          cursor = step;
          revealed = false;
        }
      }
      stale();
    },
    destroy() {
      redraw.destroy();
      element.remove();
    },
  };
}
