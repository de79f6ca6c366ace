// Step rows turned on their side: what each sequence did, in the order of steps.
//
// A step row lists its sequences; a timeline draws a sequence's steps. Rows are regrouped in chunks
// of 256 steps, and a chunk again only when one of its rows is another object than before (arrived,
// fetched, or taken anew after a rewind). So a drawing touches the lanes that it draws, and no others.

const CHUNK = 256;
const MAX_CHUNKS = 256; // beyond, those out of view are forgotten

function regroup(chunk) {
  const lanes = new Map(); // slot to {start, end} in `at` and `what`
  let total = 0;
  for (const row of chunk.rows) {
    if (!row) continue;
    for (let i = 0; i < row.entries.length; i += 2) {
      const lane = lanes.get(row.entries[i]);
      if (lane) lane.end += 1;
      else lanes.set(row.entries[i], { start: 0, end: 1 });
    }
    total += row.entries.length >> 1;
  }
  let start = 0;
  for (const lane of lanes.values()) {
    const count = lane.end;
    lane.start = lane.end = start;
    start += count;
  }
  chunk.at = new Uint8Array(total); // step - base
  chunk.what = new Uint32Array(total);
  chunk.codes = 0;
  for (let offset = 0; offset < CHUNK; offset++) {
    const row = chunk.rows[offset];
    if (!row) continue;
    chunk.budgets[offset] = row.budget;
    for (let i = 0; i < row.entries.length; i += 2) {
      const lane = lanes.get(row.entries[i]);
      chunk.at[lane.end] = offset;
      chunk.what[lane.end++] = row.entries[i + 1];
      chunk.codes |= 1 << codeOf(row.entries[i + 1]);
    }
  }
  chunk.lanes = lanes;
  chunk.isStale = false;
}

export function createLanes() {
  const chunks = new Map(); // step / CHUNK, rounded down, to a chunk
  const firstSteps = new Map(); // slot to the first step that it was seen in

  function* inView(from, to) {
    for (let index = Math.floor(from / CHUNK); index <= Math.floor(to / CHUNK); index++) {
      const chunk = chunks.get(index);
      if (chunk?.lanes) yield chunk;
    }
  }

  return {
    // Take in the rows of steps [from, to], the newest first, for about `milliseconds`. Whether that
    // was enough; if not, call again.
    sync(steps, from, to, milliseconds = Infinity) {
      const deadline = performance.now() + milliseconds;
      let hasRegrouped = false; // one chunk at least, so that calls come to an end
      for (let index = Math.floor(to / CHUNK); index >= Math.floor(from / CHUNK); index--) {
        const base = index * CHUNK;
        let chunk = chunks.get(index);
        if (!chunk) {
          chunk = { base, rows: new Array(CHUNK), budgets: new Float64Array(CHUNK), lanes: null, isStale: true };
          chunks.set(index, chunk);
        }
        // The whole chunk, so that one half in view is not regrouped anew when it moves.
        for (let offset = 0; offset < CHUNK; offset++) {
          const step = base + offset;
          const row = step < steps.first || step > steps.last ? undefined : steps.get(step);
          if (chunk.rows[offset] === row) continue;
          chunk.rows[offset] = row;
          chunk.isStale = true;
        }
        if (!chunk.isStale) continue;
        if (hasRegrouped && performance.now() > deadline) return false;
        hasRegrouped = true;
        regroup(chunk);
        for (const [slot, lane] of chunk.lanes) {
          const step = base + chunk.at[lane.start];
          if (!(firstSteps.get(slot) <= step)) firstSteps.set(slot, step);
        }
      }
      if (chunks.size > MAX_CHUNKS) {
        for (const index of chunks.keys()) {
          if ((index + 1) * CHUNK <= from || index * CHUNK > to) chunks.delete(index);
        }
      }
      return true;
    },

    // The slots that did anything in [from, to], by their first step.
    slots(from, to) {
      const found = new Set();
      for (const chunk of inView(from, to)) {
        const isInside = chunk.base >= from && chunk.base + CHUNK - 1 <= to;
        for (const [slot, { start, end }] of chunk.lanes) {
          let i = start;
          if (!isInside) {
            while (i < end && chunk.base + chunk.at[i] < from) i++;
            if (i === end || chunk.base + chunk.at[i] > to) continue;
          }
          found.add(slot);
        }
      }
      return [...found].sort((a, b) => firstSteps.get(a) - firstSteps.get(b) || a - b);
    },

    // What a slot did in [from, to], a chunk at a time: entries start to end, of which entry i is
    // what[i] in step base + at[i], and budgets[at[i]] that step's token budget. Arrays and no call
    // an entry, because a drawing goes through hundreds of thousands.
    *spans(slot, from, to) {
      for (const { base, at, what, budgets, lanes } of inView(from, to)) {
        const lane = lanes.get(slot);
        if (!lane) continue;
        let { start, end } = lane;
        while (start < end && base + at[start] < from) start++;
        while (start < end && base + at[end - 1] > to) end--;
        yield { base, at, what, budgets, start, end };
      }
    },

    // A bit for each code in the chunks of [from, to].
    codes(from, to) {
      let codes = 0;
      for (const chunk of inView(from, to)) codes |= chunk.codes;
      return codes;
    },
  };
}
