// Made-up steps for the pages of tests and benchmarks: a small scheduler over requests drawn by a
// seed, in the shape that the timeline and the charts take.

const [PREFILL, DECODE, WAIT, PREEMPTED, FINISHED, HIT] = [1, 2, 3, 4, 5, 6];

export function randomOf(seed) {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

// {steps, names}. `rate`: requests that arrive a step.
export function makeSteps({ numSteps, seats = 6, budget = 64, numBlocks = 96, rate = 0.06, seed = 1, maxOutput = 90, stepMs = 14 }) {
  const random = randomOf(seed);
  const rows = new Map();
  const names = new Map();
  const running = [];
  const waiting = [];
  let numCached = 0;
  let time = 0;
  const blocksOf = (seq) => Math.ceil(seq.computed / 16);
  for (let step = 0; step < numSteps; step++) {
    while (random() < rate || (step === 0 && names.size < 3)) {
      const slot = names.size;
      names.set(slot, { id: `req-${slot}`, request: `req-${slot}`, colour: slot % 16 });
      const prompt = 20 + Math.floor(random() ** 2 * 260);
      waiting.push({ slot, prompt, total: prompt + 5 + Math.floor(random() * maxOutput), computed: 0, known: prompt });
    }
    const entries = [];
    const add = (seq, code, n) => entries.push(seq.slot, ((code << 24) | n) >>> 0);
    const row = { step, time, budget, numSampled: 0, numHitTokens: 0, numLookedUp: 0, failed: false };
    let left = budget;
    const held = () => running.reduce((sum, seq) => sum + blocksOf(seq), 0);
    if (held() > numBlocks - 8 && running.length > 1) {
      const seq = running.pop();
      add(seq, PREEMPTED, seq.computed);
      seq.computed = 0;
      waiting.unshift(seq);
    } else {
      while (waiting.length && running.length < seats && held() + Math.ceil(waiting[0].known / 16) < numBlocks - 10) {
        const seq = waiting.shift();
        const hit = random() < 0.5 ? Math.floor((seq.known * random()) / 16) * 16 : 0;
        if (hit) add(seq, HIT, hit);
        row.numHitTokens += hit;
        row.numLookedUp += seq.known;
        seq.computed = Math.min(hit, seq.known - 1);
        running.push(seq);
      }
    }
    for (const seq of [...running]) {
      const n = Math.min(left, seq.known - seq.computed);
      if (!n) {
        add(seq, WAIT, seq.known - seq.computed);
        continue;
      }
      add(seq, seq.computed + 1 < seq.known || seq.computed < seq.prompt ? PREFILL : DECODE, n);
      left -= n;
      seq.computed += n;
      if (seq.computed < seq.known) continue;
      row.numSampled += 1;
      seq.known += 1;
      if (seq.known <= seq.total) continue;
      add(seq, FINISHED, 0);
      running.splice(running.indexOf(seq), 1);
      numCached += blocksOf(seq);
    }
    for (const seq of waiting) add(seq, WAIT, seq.known - seq.computed);
    row.numTokens = budget - left;
    row.seconds = (stepMs * (0.6 + row.numTokens / budget) * (0.95 + 0.1 * random())) / 1000;
    row.phases = [0.02, 0.04, 0.9, 0.04].map((share) => share * row.seconds);
    row.numHeld = held();
    numCached = Math.min(numCached, numBlocks - row.numHeld);
    row.numCached = numCached;
    row.numFree = numBlocks - row.numHeld - numCached;
    row.numRunning = running.length;
    row.numWaiting = waiting.length;
    row.entries = Uint32Array.from(entries);
    time += row.seconds * 1.02;
    rows.set(step, row);
  }
  return { steps: storeOf(rows), names };
}

// `numSequences` that decode in every step: the most that a step can hold.
export function makeFullSteps({ numSteps, numSequences }) {
  const rows = new Map();
  const names = new Map();
  for (let slot = 0; slot < numSequences; slot++) {
    names.set(slot, { id: `req-${slot}`, request: `req-${slot}`, colour: slot % 16 });
  }
  const random = randomOf(7);
  for (let step = 0; step < numSteps; step++) {
    const entries = new Uint32Array(2 * numSequences);
    for (let slot = 0; slot < numSequences; slot++) {
      const kind = random();
      const [code, n] = kind < 0.9 ? [DECODE, 1] : kind < 0.95 ? [PREFILL, 64] : [WAIT, 10];
      entries[2 * slot] = slot;
      entries[2 * slot + 1] = (code << 24) | n;
    }
    rows.set(step, {
      step, time: step * 0.01, seconds: 0.01, phases: [0.001, 0.001, 0.007, 0.001],
      numTokens: 1000, budget: 2048, numSampled: 230, numHitTokens: 64, numLookedUp: 128,
      numHeld: 500 + (step % 200), numCached: 100, numFree: 400 - (step % 200),
      numRunning: numSequences, numWaiting: step % 9, failed: false, entries,
    });
  }
  return { steps: storeOf(rows), names };
}

export function storeOf(rows) {
  const numbers = [...rows.keys()];
  return {
    first: numbers[0],
    last: numbers.at(-1),
    get: (step) => rows.get(step),
    rows,
  };
}
