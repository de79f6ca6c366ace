// The block map on a canvas: one cell a KV block, coloured by the sequence that holds it.
//
// createBlockMap({palette}) returns {element, update(blocks), destroy()}. It knows nothing of the
// kernel: a page test can drive it alone. Kinds differ in shape too: a held block is solid (the
// last one of a sequence filled as far as it is used), a shared one carries a white diagonal, a
// cached one is hatched, a free one is an outline. A block that was just taken is ringed for a
// moment.

const GAP = 1;
const MIN_CELL = 3;
const MAX_CELL = 32;
const MAP_HEIGHT = 230;
const RING_MS = 450;
const MAX_RINGED = 2048; // with more blocks, a ring is a speck that costs a redrawing

// {owner, refs, fill, kind} arrays by block id, from every sequence's table in turn.
// kind: 0 free, 1 cached, 2 held, 3 shared.
export function blockStates({ numBlocks, blockSize, running, tables, cached }) {
  const owner = new Int32Array(numBlocks).fill(-1);
  const refs = new Uint16Array(numBlocks);
  const fill = new Float32Array(numBlocks).fill(1);
  const kind = new Uint8Array(numBlocks);
  for (const block of cached) kind[block] = 1;
  let start = 0;
  running.forEach(([, , length, used], index) => {
    for (let i = start; i < start + length; i++) {
      const block = tables[i];
      if (owner[block] < 0) owner[block] = index;
      refs[block] += 1;
      kind[block] = refs[block] > 1 ? 3 : 2;
      if (i === start + length - 1) fill[block] = refs[block] > 1 ? 1 : used / blockSize;
    }
    start += length;
  });
  return { owner, refs, fill, kind };
}

export function createBlockMap({ palette }) {
  const element = document.createElement("div");
  element.className = "nbe-map";
  const canvas = document.createElement("canvas");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  const readout = document.createElement("div");
  readout.className = "nbe-readout";
  readout.setAttribute("aria-live", "polite");
  element.append(canvas, readout);

  let blocks = null;
  let states = null;
  let grid = null;
  let cursor = -1; // the block that the pointer or the arrow keys are on
  let highlighted = null; // a sequence whose blocks stand out
  const rung = new Map(); // block to the time when it was taken
  let pending = 0;

  // The blocks of the highlighted sequence, or null when none is.
  function standingOut() {
    let start = 0;
    for (const [id, , length] of blocks.running) {
      if (id === highlighted) return new Set(blocks.tables.subarray(start, start + length));
      start += length;
    }
    return null;
  }

  const names = (block) => {
    const found = [];
    let start = 0;
    for (const [id, , length] of blocks.running) {
      if (blocks.tables.subarray(start, start + length).includes(block)) found.push(id);
      start += length;
    }
    return found;
  };

  function describe(block) {
    const kind = states.kind[block];
    if (kind === 0) return `block ${block}: free`;
    if (kind === 1) {
      const rank = blocks.cached.indexOf(block);
      return `block ${block}: cached, held by nobody, ${rank === 0 ? "next" : `${rank} others before it`} to be evicted`;
    }
    const used = Math.round(states.fill[block] * blocks.blockSize);
    const holders = names(block).join(", ");
    const refs = states.refs[block];
    return `block ${block}: held by ${holders}; ${refs} ${refs === 1 ? "reference" : "references"}; ${used} of ${blocks.blockSize} slots used`;
  }

  function layOut() {
    const width = Math.max(160, element.clientWidth);
    const ideal = Math.floor(Math.sqrt((width * MAP_HEIGHT) / blocks.numBlocks));
    const cell = Math.min(MAX_CELL, Math.max(MIN_CELL, ideal));
    const columns = Math.max(1, Math.floor(width / cell));
    const rows = Math.ceil(blocks.numBlocks / columns);
    return { cell, columns, rows, width: columns * cell, height: rows * cell };
  }

  function draw() {
    pending = 0;
    if (!blocks || !element.clientWidth) return;
    grid = layOut();
    const ratio = window.devicePixelRatio || 1;
    const [w, h] = [Math.round(grid.width * ratio), Math.round(grid.height * ratio)];
    if (canvas.width !== w || canvas.height !== h) {
      canvas.width = w;
      canvas.height = h;
      canvas.style.width = `${grid.width}px`;
      canvas.style.height = `${grid.height}px`;
    }
    const { cell, columns } = grid;
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, grid.width, grid.height);
    // The theme is read at every drawing: it may change, and is not always set at the first.
    const ink = getComputedStyle(canvas).color;
    const side = cell - (cell > 6 ? 2 * GAP : GAP);
    const left = (block) => (block % columns) * cell + (cell - side) / 2;
    const top = (block) => Math.floor(block / columns) * cell + (cell - side) / 2;
    paintIdle(context, ink, side, left, top);
    paintHeld(context, side, left, top);
    if (side >= 15) paintLabels(context, ink, side, left, top);
    paintRings(context, ink, side, left, top);
    if (cursor >= 0 && cursor < blocks.numBlocks) {
      context.strokeStyle = ink;
      context.lineWidth = 2;
      context.strokeRect(left(cursor), top(cursor), side, side);
      readout.textContent = describe(cursor);
    } else {
      readout.textContent = "";
    }
    if (rung.size) schedule();
  }

  // Free and cached blocks; as paths, because a call a block is slow for many blocks.
  function paintIdle(context, ink, side, left, top) {
    const free = new Path2D();
    const cached = new Path2D();
    const stride = Math.max(3, side / 3);
    for (let block = 0; block < blocks.numBlocks; block++) {
      const kind = states.kind[block];
      if (kind > 1) continue;
      const [x, y] = [left(block), top(block)];
      const path = kind === 1 ? cached : free;
      if (side < 7) {
        path.rect(x, y, side, side);
        continue;
      }
      path.rect(x + 0.5, y + 0.5, side - 1, side - 1);
      for (let d = stride; kind === 1 && d < 2 * side; d += stride) {
        path.moveTo(x + Math.max(0, d - side), y + Math.min(side, d));
        path.lineTo(x + Math.min(side, d), y + Math.max(0, d - side));
      }
    }
    context.lineWidth = 1;
    context.fillStyle = context.strokeStyle = ink;
    context.globalAlpha = side < 7 ? 0.1 : 0.18;
    side < 7 ? context.fill(free) : context.stroke(free);
    context.globalAlpha = 0.55;
    side < 7 ? context.fill(cached) : context.stroke(cached);
    context.globalAlpha = 1;
  }

  function paintHeld(context, side, left, top) {
    const chosen = standingOut();
    const shared = new Path2D();
    let start = 0;
    blocks.running.forEach(([, colour, length], index) => {
      context.fillStyle = palette[colour];
      for (const block of blocks.tables.subarray(start, start + length)) {
        if (states.owner[block] !== index) continue;
        const [x, y, full] = [left(block), top(block), states.fill[block]];
        const ink = chosen !== null && !chosen.has(block) ? 0.15 : 1;
        context.globalAlpha = full < 1 && side >= 7 ? 0.3 * ink : ink;
        context.fillRect(x, y, side, side);
        if (full < 1 && side >= 7) {
          context.globalAlpha = ink;
          context.fillRect(x, y + side * (1 - full), side, side * full);
        }
        if (states.kind[block] === 3) {
          shared.moveTo(x, y + side);
          shared.lineTo(x + side, y);
        }
      }
      start += length;
    });
    context.globalAlpha = 1;
    context.strokeStyle = "#fff";
    context.lineWidth = Math.max(1, side / 6);
    context.stroke(shared);
  }

  function paintLabels(context, ink, side, left, top) {
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (let block = 0; block < blocks.numBlocks; block++) {
      if (states.kind[block] !== 2) continue;
      const label = blocks.running[states.owner[block]][0].replace(/^req-/, "");
      if (label.length > 4) continue;
      const size = Math.min(12, (side * 0.5 * 3) / Math.max(3, label.length + 0.5));
      context.font = `600 ${size}px system-ui, sans-serif`;
      context.fillStyle = states.fill[block] < 0.6 ? ink : "#fff";
      context.fillText(label, left(block) + side / 2, top(block) + side / 2 + 0.5);
    }
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

  function schedule() {
    if (!pending) pending = requestAnimationFrame(draw);
  }

  function point(block) {
    cursor = block;
    schedule();
  }

  canvas.addEventListener("pointermove", (event) => {
    if (!grid) return;
    const column = Math.floor(event.offsetX / grid.cell);
    const block = Math.floor(event.offsetY / grid.cell) * grid.columns + column;
    point(column < grid.columns && block < blocks.numBlocks ? block : -1);
  });
  canvas.addEventListener("pointerleave", () => point(-1));
  canvas.addEventListener("blur", () => point(-1));
  canvas.addEventListener("keydown", (event) => {
    if (!grid) return;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -grid.columns, ArrowDown: grid.columns };
    const move = moves[event.key];
    if (move === undefined) return;
    event.preventDefault();
    const next = cursor < 0 ? 0 : cursor + move;
    if (next >= 0 && next < blocks.numBlocks) point(next);
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
    // blocks: {numBlocks, blockSize, running: [[id, colour, length of table, slots used in its
    // last block]], tables: Uint32Array, cached: Uint32Array}
    update(next) {
      const before = states;
      blocks = next;
      states = blockStates(next);
      if (before && before.kind.length === states.kind.length && !calm && next.numBlocks <= MAX_RINGED) {
        const now = performance.now();
        for (let block = 0; block < next.numBlocks; block++) {
          if (states.kind[block] >= 2 && before.kind[block] < 2) rung.set(block, now);
        }
      }
      let shared = 0;
      let held = 0;
      for (const kind of states.kind) {
        held += kind >= 2;
        shared += kind === 3;
      }
      canvas.setAttribute(
        "aria-label",
        `KV blocks: ${held} held, ${shared} of them shared, ${next.cached.length} cached, ` +
          `${next.numBlocks - held - next.cached.length} free, of ${next.numBlocks}. ` +
          "Arrow keys tell about single blocks.",
      );
      schedule();
    },
    highlight(id) {
      highlighted = id;
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
