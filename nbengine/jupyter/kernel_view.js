// The kernel view: one CUDA block, barrier by barrier. Threads stand in a grid, a row a warp; every
// tensor is a grid of its elements, lit in the colour of the warp that touches them. An element that
// is read is filled, one that is written is framed too, and one of several warps is of the page's ink.
//
// createKernelView({facts, accesses, palette, onPhase}) returns {element, update({phase, thread,
// line}), destroy()}. It knows nothing of the kernel that holds the notebook: a page test can drive
// it alone. `facts` and `accesses` are `KernelTrace.facts()`, parsed, and `.packed()`.

const WARP_SIZE = 32;
const FIELDS = 6; // of an access: thread, tensor, first, count, is write, line
const NOBODY = -1;
const SEVERAL = -2;
const MAX_SHOWN_BLOCKS = 64;
const MAX_CELLS = 1 << 16;
const FOLD = 256; // a long row goes on in the next one

// What is touched in a phase: for each tensor (by its number) {warps, written, reads, writes}.
// warps[element] is a warp, NOBODY or SEVERAL. `only` may name a thread and a line.
export function touched(facts, accesses, phase, only = {}) {
  const start = phase ? facts.phases[phase - 1].end : 0;
  const tensors = new Map();
  const threads = new Set();
  const lines = new Map();
  for (let i = start; i < facts.phases[phase].end; i++) {
    const [thread, tensor, first, count, isWrite, line] = accesses.subarray(i * FIELDS, (i + 1) * FIELDS);
    if (only.thread != null && thread !== only.thread) continue;
    if (only.line != null && line !== only.line) continue;
    let found = tensors.get(tensor);
    if (!found) {
      const size = facts.tensors[tensor].shape.reduce((a, b) => a * b, 1);
      found = { warps: new Int16Array(size).fill(NOBODY), written: new Uint8Array(size), reads: 0, writes: 0 };
      tensors.set(tensor, found);
    }
    const warp = Math.floor(thread / WARP_SIZE);
    for (let e = first; e < first + count; e++) {
      found.warps[e] = found.warps[e] === NOBODY || found.warps[e] === warp ? warp : SEVERAL;
      if (isWrite) found.written[e] = 1;
    }
    if (isWrite) found.writes += count;
    else found.reads += count;
    threads.add(thread);
    const at = `${line} ${tensor}`;
    lines.set(at, (lines.get(at) ?? 0) + count);
  }
  return { tensors, threads, lines };
}

// The place of an element in a shape, row by row.
export function placeOf(element, shape) {
  const place = [];
  for (let i = shape.length - 1; i >= 0; i--) {
    place.unshift(element % shape[i]);
    element = Math.floor(element / shape[i]);
  }
  return place;
}

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

// A canvas of cells, each an element or several. paint(cells) gives [colour or null, is framed] of a
// cell's elements; `onPoint(element or null)` hears where the pointer is.
function createGrid({ columns, size, perCell = 1, side, rule = 0, onPoint, onPick }) {
  const canvas = node("canvas", { role: "img" });
  const cells = Math.ceil(size / perCell);
  const rows = Math.ceil(cells / columns);
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(columns * side * ratio);
  canvas.height = Math.round(rows * side * ratio);
  canvas.style.width = `${columns * side}px`;
  canvas.style.height = `${rows * side}px`;
  const at = (event) => {
    const column = Math.floor(event.offsetX / side);
    const cell = Math.floor(event.offsetY / side) * columns + column;
    return column < columns && cell < cells ? cell * perCell : null;
  };
  canvas.addEventListener("pointermove", (event) => onPoint(at(event)));
  canvas.addEventListener("pointerleave", () => onPoint(null));
  if (onPick) canvas.addEventListener("click", (event) => onPick(at(event)));
  return {
    canvas,
    draw(paint) {
      const context = canvas.getContext("2d");
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.clearRect(0, 0, columns * side, rows * side);
      const ink = getComputedStyle(canvas).color; // read at every drawing: the theme may change
      const gap = side > 4 ? 1 : 0;
      for (let cell = 0; cell < cells; cell++) {
        const [x, y] = [(cell % columns) * side, Math.floor(cell / columns) * side];
        const [colour, isFramed] = paint(cell * perCell, Math.min(size, (cell + 1) * perCell));
        context.globalAlpha = colour === null ? 0.1 : 1;
        context.fillStyle = colour === null || colour === "ink" ? ink : colour;
        context.fillRect(x, y, side - gap, side - gap);
        if (isFramed) {
          context.strokeStyle = ink;
          context.lineWidth = side > 4 ? 1.5 : 1;
          context.strokeRect(x + 0.5, y + 0.5, side - gap - 1, side - gap - 1);
        }
      }
      context.globalAlpha = 0.6;
      context.fillStyle = ink;
      for (let row = rule; rule && row < rows; row += rule) context.fillRect(0, row * side, columns * side, 1);
      context.globalAlpha = 1;
    },
  };
}

export function createKernelView({ facts, accesses, palette, onPhase = () => {} }) {
  const colourOf = (warp) => palette[warp % palette.length];
  const numPhases = facts.phases.length;
  const chosen = { phase: 0, thread: null, line: null };
  let now = null;

  const nameOfBlock = (block) => facts.blockNames?.[block] ?? block;
  const holdersOf = (block) =>
    facts.tables.flatMap((table, sequence) => {
      const logical = table.indexOf(block);
      return logical < 0 ? [] : [{ sequence, logical }];
    });

  // ---------------------------------------------------------------- controls
  const slider = node("input", { type: "range", min: "0", max: String(numPhases - 1), step: "1", "aria-label": "Phase" });
  const button = (label, name, act) => node("button", { type: "button", "aria-label": name, title: name, onclick: act }, label);
  const status = node("div", { class: "nbk-status", role: "status" });
  const detail = node("div", { class: "nbk-detail", role: "region", "aria-label": "Detail" });
  const lines = node("ul", { class: "nbk-lines", "aria-label": "Lines of this phase" });
  const element = node(
    "div",
    { class: "nbk", tabindex: "0", role: "group", "aria-label": "Kernel view: left and right step through the phases, up and down through the threads, Escape shows all threads" },
    node("div", { class: "nbk-title" }, facts.title),
    node(
      "div",
      { class: "nbk-bar" },
      button("◀", "Previous phase", () => go({ phase: chosen.phase - 1 })),
      slider,
      button("▶", "Next phase", () => go({ phase: chosen.phase + 1 })),
      status,
    ),
  );
  slider.addEventListener("input", () => go({ phase: Number(slider.value) }));

  // ---------------------------------------------------------------- threads
  const numWarps = Math.ceil(facts.numThreads / WARP_SIZE);
  const threads = createGrid({
    columns: Math.min(WARP_SIZE, facts.numThreads),
    size: facts.numThreads,
    side: numWarps > 16 ? 8 : 12,
    onPoint: (thread) => tell(thread == null ? null : aboutThread(thread)),
    onPick: (thread) => go({ thread: thread === chosen.thread ? null : thread }),
  });
  const legend = node("div", { class: "nbk-legend" });
  for (let warp = 0; warp < Math.min(numWarps, palette.length); warp++) {
    const swatch = node("i", { class: "nbk-swatch" });
    swatch.style.background = colourOf(warp);
    legend.append(node("span", {}, swatch, `warp ${warp}`));
  }
  const several = node("i", { class: "nbk-swatch nbk-several" });
  legend.append(node("span", {}, several, "several warps"), node("span", {}, "filled: read; framed: written"));

  // ---------------------------------------------------------------- block tables
  const tables = node("div", { class: "nbk-tables" });
  const links = []; // [block, its element]
  facts.tables.forEach((table, sequence) => {
    const row = node("div", { class: "nbk-table", role: "list", "aria-label": `Block table of sequence ${sequence}` });
    row.append(node("span", { class: "nbk-name" }, `sequence ${sequence}, ${plural(facts.seqLens[sequence], "token")}`));
    table.forEach((block, logical) => {
      const link = node("span", { class: "nbk-link", role: "listitem" }, `${logical} → block ${nameOfBlock(block)}`);
      links.push([block, link]);
      row.append(link);
    });
    tables.append(row);
  });

  // ---------------------------------------------------------------- tensors
  // Of each grid: its tensor, the element that it begins with, and the grid.
  const grids = [];
  const captions = [];
  const figures = facts.tensors.map((tensor, index) => {
    const caption = node("figcaption");
    captions.push(caption);
    const figure = node("figure", { "aria-label": tensor.name }, caption);
    const size = tensor.shape.reduce((a, b) => a * b, 1);
    const point = (start) => (element) => tell(element == null ? null : aboutElement(index, start + element));
    if (tensor.isCache) {
      const [, heads, slots, dims] = tensor.shape;
      const perBlock = heads * slots * dims;
      const shelf = node("div", { class: "nbk-blocks" });
      const shown = blocksOf(index, perBlock);
      for (const block of shown.slice(0, MAX_SHOWN_BLOCKS)) {
        const grid = createGrid({ columns: dims, size: perBlock, side: dims > 128 ? 2 : 3, rule: heads > 1 ? slots : 0, onPoint: point(block * perBlock) });
        grids.push({ tensor: index, start: block * perBlock, grid });
        shelf.append(node("div", { class: "nbk-block" }, node("div", { class: "nbk-name" }, titleOfBlock(block, slots)), grid.canvas));
      }
      if (shown.length > MAX_SHOWN_BLOCKS) shelf.append(node("div", {}, `and ${shown.length - MAX_SHOWN_BLOCKS} more blocks`));
      figure.append(shelf);
    } else {
      const perCell = Math.ceil(size / MAX_CELLS);
      const last = tensor.shape.at(-1) ?? 1;
      const columns = Math.min(perCell > 1 || last > FOLD || tensor.shape.length < 2 ? FOLD : last, Math.max(1, Math.ceil(size / perCell)));
      const grid = createGrid({ columns, size, perCell, side: columns > 128 ? 3 : columns > 64 ? 5 : 8, onPoint: point(0) });
      grids.push({ tensor: index, start: 0, grid });
      figure.append(node("div", { class: "nbk-scroll" }, grid.canvas));
    }
    return figure;
  });

  // The blocks of a cache that some sequence has or some phase touches, in the order of the tables.
  function blocksOf(tensor, perBlock) {
    const found = new Set(facts.tables.flat());
    for (let i = 0; i < accesses.length; i += FIELDS) {
      if (accesses[i + 1] === tensor) found.add(Math.floor(accesses[i + 2] / perBlock));
    }
    return [...found];
  }

  function titleOfBlock(block, slots) {
    const held = holdersOf(block).map(({ sequence, logical }) => {
      const end = Math.min(facts.seqLens[sequence], (logical + 1) * slots) - 1;
      return `tokens ${logical * slots}–${end} of sequence ${sequence}`;
    });
    return `block ${nameOfBlock(block)}: ${held.join(", ") || "of no sequence"}`;
  }

  // ---------------------------------------------------------------- words
  function wordsOf(tensor, element) {
    const { name, shape, isCache } = facts.tensors[tensor];
    const place = placeOf(element, shape);
    if (!isCache) return `${name}[${place.join(", ")}]`;
    const [block, head, slot, dim] = place;
    const tokens = holdersOf(block).map(({ sequence, logical }) => `token ${logical * shape[2] + slot} of sequence ${sequence}`);
    return `${name}: block ${nameOfBlock(block)}, head ${head}, slot ${slot}${tokens.length ? ` (${tokens.join(", ")})` : ""}, dim ${dim}`;
  }

  function aboutElement(tensor, element) {
    const found = new Map();
    const start = chosen.phase ? facts.phases[chosen.phase - 1].end : 0;
    for (let i = start; i < facts.phases[chosen.phase].end; i++) {
      const [thread, of, first, count, isWrite, line] = accesses.subarray(i * FIELDS, (i + 1) * FIELDS);
      if (of !== tensor || element < first || element >= first + count) continue;
      const what = `${isWrite ? "written" : "read"} at line ${line}`;
      if (!found.has(what)) found.set(what, new Set());
      found.get(what).add(thread);
    }
    const by = [...found].map(([what, by]) => `${what} by ${namesOf([...by])}`);
    return `${wordsOf(tensor, element)}: ${by.join("; ") || "not touched in this phase"}`;
  }

  const namesOf = (threads) =>
    threads.length > 4 ? `${plural(threads.length, "thread")}` : `thread ${threads.map((t) => `${t} (warp ${Math.floor(t / WARP_SIZE)})`).join(", ")}`;

  function aboutThread(thread) {
    const mine = touched(facts, accesses, chosen.phase, { thread });
    const parts = [...mine.tensors].map(([tensor, { reads, writes, warps }]) => {
      const did = [reads && `reads ${plural(reads, "element")}`, writes && `writes ${plural(writes, "element")}`].filter(Boolean).join(" and ");
      return `${did} of ${facts.tensors[tensor].name}, first ${wordsOf(tensor, warps.findIndex((warp) => warp !== NOBODY))}`;
    });
    const who = `thread ${thread} (warp ${Math.floor(thread / WARP_SIZE)}, lane ${thread % WARP_SIZE})`;
    return `${who}: ${parts.join("; ") || "touches no tensor in this phase"}`;
  }

  function tell(words) {
    detail.textContent = words ?? (chosen.thread == null ? "Point at a thread or an element." : aboutThread(chosen.thread));
  }

  // ---------------------------------------------------------------- drawing
  function draw() {
    const { tensors } = now;
    // A thread that does nothing in the phase is pale; the chosen one is framed.
    const active = chosen.thread == null && chosen.line == null ? now.threads : touched(facts, accesses, chosen.phase, { line: chosen.line }).threads;
    threads.draw((thread) => [active.has(thread) ? colourOf(Math.floor(thread / WARP_SIZE)) : null, thread === chosen.thread]);
    for (const { tensor, start, grid } of grids) {
      const found = tensors.get(tensor);
      grid.draw((first, end) => {
        if (!found) return [null, false];
        let [warp, isWritten] = [NOBODY, false];
        for (let e = start + first; e < start + end; e++) {
          if (found.warps[e] === NOBODY) continue;
          warp = warp === NOBODY || warp === found.warps[e] ? found.warps[e] : SEVERAL;
          isWritten ||= found.written[e] === 1;
        }
        return [warp === NOBODY ? null : warp === SEVERAL ? "ink" : colourOf(warp), isWritten];
      });
    }
  }

  function describe() {
    const { phase } = chosen;
    const { barrierLine } = facts.phases[phase];
    const until = barrierLine ? `, to the barrier at line ${barrierLine}` : "";
    slider.value = String(phase);
    slider.setAttribute("aria-valuetext", `phase ${phase + 1} of ${numPhases}`);
    status.textContent = `phase ${phase + 1} of ${numPhases}${until}: ${plural(now.threads.size, "thread")} at work`;
    threads.canvas.setAttribute("aria-label", `Threads: ${facts.numThreads}, of which ${now.threads.size} touch memory in this phase`);
    facts.tensors.forEach((tensor, index) => {
      const found = now.tensors.get(index);
      const count = (test) => (found ? found.warps.reduce((n, warp, e) => n + (warp !== NOBODY && test(e)), 0) : 0);
      const written = count((e) => found.written[e]);
      const touchedHere = count(() => true);
      const place = tensor.isShared ? "shared memory" : `${tensor.dtype} [${tensor.shape.join(", ")}]`;
      captions[index].textContent = `${tensor.name}, ${place}: ${plural(touchedHere, "element")} touched, ${written.toLocaleString("en")} written`;
      figures[index].classList.toggle("nbk-idle", !touchedHere);
    });
    const lit = new Set();
    facts.tensors.forEach((tensor, index) => {
      const found = tensor.isCache && now.tensors.get(index);
      const perBlock = tensor.shape.slice(1).reduce((a, b) => a * b, 1);
      if (found) found.warps.forEach((warp, e) => warp !== NOBODY && lit.add(Math.floor(e / perBlock)));
    });
    for (const [block, link] of links) {
      link.classList.toggle("nbk-lit", lit.has(block));
      link.setAttribute("aria-current", String(lit.has(block)));
    }
    describeLines();
    tell(null);
  }

  function describeLines() {
    const focused = lines.contains(document.activeElement) ? document.activeElement.dataset.line : null;
    const all = touched(facts, accesses, chosen.phase, { thread: chosen.thread }).lines;
    const byLine = new Map();
    for (const [at, count] of all) {
      const [line, tensor] = at.split(" ").map(Number);
      if (!byLine.has(line)) byLine.set(line, []);
      byLine.get(line).push(`${facts.tensors[tensor].name} ${count.toLocaleString("en")}`);
    }
    lines.replaceChildren(
      ...[...byLine].sort(([a], [b]) => a - b).map(([line, what]) => {
        const pressed = chosen.line === line;
        const label = line ? `line ${line}` : "line unknown";
        const pick = node("button", { type: "button", "data-line": line, "aria-pressed": String(pressed), onclick: () => go({ line: pressed ? null : line }) }, label);
        return node("li", {}, pick, node("code", {}, facts.lines[line] ?? ""), node("span", { class: "nbk-name" }, what.join(", ")));
      }),
    );
    // The focus stays where it was, or in the view.
    if (focused !== null) (lines.querySelector(`[data-line="${focused}"]`) ?? element).focus();
  }

  // ---------------------------------------------------------------- moving
  // What the user asks for; a new phase is told to whoever made the view.
  function go(next) {
    const before = chosen.phase;
    update(next);
    if (chosen.phase !== before) onPhase(chosen.phase);
  }

  function update({ phase = chosen.phase, thread = chosen.thread, line = phase === chosen.phase ? chosen.line : null }) {
    const bounded = Math.max(0, Math.min(numPhases - 1, phase));
    Object.assign(chosen, { phase: bounded, thread, line: bounded === chosen.phase ? line : null });
    now = touched(facts, accesses, chosen.phase, { thread: chosen.thread, line: chosen.line });
    element.dataset.phase = String(chosen.phase);
    element.dataset.thread = chosen.thread == null ? "" : String(chosen.thread);
    describe();
    draw();
  }

  element.addEventListener("keydown", (event) => {
    const onSlider = event.target === slider;
    const thread = chosen.thread ?? -1;
    const moves = {
      ArrowLeft: () => go({ phase: chosen.phase - 1 }),
      ArrowRight: () => go({ phase: chosen.phase + 1 }),
      Home: () => go({ phase: 0 }),
      End: () => go({ phase: numPhases - 1 }),
      ArrowDown: () => go({ thread: Math.min(facts.numThreads - 1, thread + 1) }),
      ArrowUp: () => go({ thread: Math.max(0, thread - 1) }),
      Escape: () => go({ thread: null, line: null }),
    };
    if (!moves[event.key] || (onSlider && event.key !== "Escape")) return;
    event.preventDefault();
    event.stopPropagation();
    moves[event.key]();
  });

  element.append(
    node("div", { class: "nbk-top" }, node("div", {}, threads.canvas, legend), tables),
    detail,
    ...figures,
    lines,
  );
  let pending = 0;
  const redraw = () => {
    cancelAnimationFrame(pending);
    pending = requestAnimationFrame(draw);
  };
  const themed = new MutationObserver(redraw);
  themed.observe(document.body, { attributes: true });
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", redraw);
  update({});

  return {
    element,
    update,
    destroy() {
      cancelAnimationFrame(pending);
      themed.disconnect();
      scheme.removeEventListener("change", redraw);
    },
  };
}

function render({ model, el }) {
  el.dataset.lmSuppressShortcuts = "true"; // the notebook's keys are not for our view
  const { buffer, byteOffset, byteLength } = model.get("accesses");
  const view = createKernelView({
    facts: JSON.parse(model.get("facts")),
    // Copied: a buffer out of a message need not be aligned.
    accesses: new Int32Array(buffer.slice(byteOffset, byteOffset + byteLength)),
    palette: model.get("palette"),
    onPhase(phase) {
      model.set("phase", phase);
      model.save_changes();
    },
  });
  const follow = () => view.update({ phase: model.get("phase") });
  model.on("change:phase", follow);
  el.append(view.element);
  follow(); // after it is in the page: the ink is read from there
  return () => {
    model.off("change:phase", follow);
    view.destroy();
  };
}

export default { render };
