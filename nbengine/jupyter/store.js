// What the page knows of the engine, from messages of differences (`frame.Feed` makes them).
//
// createStore() returns {apply(content, buffers), now(), ...}. It draws nothing and sends nothing.
// `live` is the engine now, `past` an earlier step that the cursor is on; a view draws `now()`,
// whichever of them is looked at.

const ROW_NUMBERS = 18; // of a step: see cells.encode_steps
const MAX_STEPS_KEPT = 20000;

function typed(Type, view) {
  // Copied: a buffer out of a message need not be aligned.
  const { buffer, byteOffset, byteLength } = view;
  return new Type(buffer.slice(byteOffset, byteOffset + byteLength));
}

// Step rows by number; those that the page has not been sent are missing.
function createSteps() {
  const rows = new Map();
  const steps = { first: 1, last: 0, get: (step) => rows.get(step) };

  steps.add = (numbers, entries) => {
    let start = 0;
    let same; // the entries of the step before
    for (let at = 0; at < numbers.length; at += ROW_NUMBERS) {
      const n = numbers.subarray(at, at + ROW_NUMBERS);
      const phases = [n[2], n[3], n[4], n[5]];
      const end = start + 2 * Math.max(0, n[17]);
      rows.set(n[0], {
        step: n[0],
        time: n[1],
        phases,
        seconds: phases[0] + phases[1] + phases[2] + phases[3],
        numTokens: n[6],
        budget: n[7],
        numSampled: n[8],
        numHitTokens: n[9],
        numLookedUp: n[10],
        numHeld: n[11],
        numCached: n[12],
        numFree: n[13],
        numRunning: n[14],
        numWaiting: n[15],
        failed: n[16] > 0,
        entries: n[17] < 0 ? same : entries.slice(start, end),
      });
      same = rows.get(n[0]).entries;
      start = end;
    }
  };

  // What the kernel's history holds now; what it has dropped, or cut off, goes here too.
  steps.bound = (first, last) => {
    if (last < steps.last) for (let step = last + 1; step <= steps.last; step++) rows.delete(step);
    steps.first = first;
    steps.last = last;
    if (rows.size > MAX_STEPS_KEPT) {
      for (const step of rows.keys()) {
        if (rows.size <= MAX_STEPS_KEPT) break;
        rows.delete(step);
      }
    }
  };
  steps.clear = () => rows.clear();
  return steps;
}

function createStore() {
  const names = new Map(); // slot -> {id, request, colour}
  const steps = createSteps();
  const rows = new Map(); // sequence id -> row of the queues
  const store = { names, steps, live: null, past: null, cursor: null, selected: null, seq: 0, num_answered: 0 };
  let cells = new Uint32Array(0);

  function learn(list) {
    for (const [slot, id, colour] of list) {
      names.set(slot, { id, request: id.split("#")[0], colour });
    }
  }

  function applyLive(live, buffers) {
    const [numbers, entries, blocks, tails, table] = buffers;
    if (live.is_whole) {
      cells = typed(Uint32Array, blocks);
      rows.clear();
    } else {
      const pairs = typed(Uint32Array, blocks);
      for (let i = 0; i < pairs.length; i += 2) cells[pairs[i]] = pairs[i + 1];
    }
    if (live.is_fresh) names.clear(); // numbers stand for other sequences now
    learn(live.names);
    if (live.is_cut || live.is_fresh) steps.clear();
    steps.add(typed(Float64Array, numbers), typed(Uint32Array, entries));
    steps.bound(live.first_step, live.step);
    for (const row of live.rows) rows.set(row.id, { ...rows.get(row.id), ...row });
    const present = new Set(live.order);
    for (const id of rows.keys()) if (!present.has(id)) rows.delete(id);
    store.live = {
      ...live,
      record: live.record ?? (live.is_cut ? "" : (store.live?.record ?? "")),
      sequences: live.order.map((id) => rows.get(id)),
      cells,
      tails: typed(Uint32Array, tails),
      table: typed(Uint32Array, table),
    };
  }

  // False: the message builds on one that was lost.
  store.apply = (content, buffers) => {
    const { live } = content;
    if (!live.is_fresh && content.seq !== store.seq + 1) return false;
    store.seq = content.seq;
    applyLive(live, buffers);
    let at = 5;
    if (content.steps) {
      learn(content.steps.names);
      steps.add(typed(Float64Array, buffers[at]), typed(Uint32Array, buffers[at + 1]));
      at += 2;
    }
    if (content.past) {
      learn(content.past.names);
      store.past = {
        ...content.past,
        sequences: content.past.rows,
        cells: typed(Uint32Array, buffers[at]),
        tails: typed(Uint32Array, buffers[at + 1]),
        table: typed(Uint32Array, buffers[at + 2]),
      };
    }
    for (const key of ["cursor", "selected", "block", "notice", "explanation", "kernels", "num_answered"]) {
      store[key] = content[key];
    }
    return true;
  };

  // The moment that is looked at. While the cursor's own is on its way, the last one stays.
  store.now = () => (store.cursor !== null && store.past ? store.past : store.live);
  return store;
}
