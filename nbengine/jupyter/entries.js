// What a sequence did in a step: an entry's codes, its words and its looks, for the timeline and its
// legend. The charts count by the codes. In one module it follows step_axis.js.
//
// An entry is a pair of words: a slot (a sequence's number on this page), and code << 24 | n.
//
// Kinds differ in shape and not only in colour: prefill is a bar as high as its share of the token
// budget, decode a thin line, waiting hatched, preemption a triangle over a cut, a prefix hit a ringed
// dot, the end a cap.

export const PREFILL = 1; // n tokens computed
export const DECODE = 2; // n tokens
export const WAIT = 3; // n tokens wanted, none computed
export const PREEMPTED = 4; // n tokens lost
export const FINISHED = 5;
export const HIT = 6; // n tokens taken from the prefix cache on admission
export const SWAPPED = 7; // preempted to host memory
export const REWOUND = 8;
export const ADDED = 9; // it arrived

export const codeOf = (word) => word >>> 24;
export const countOf = (word) => word & 0xffffff;

const LINE = 18; // a sequence's height, in CSS pixels

// ---------------------------------------------------------------- words

const plural = (n, word) => `${grouped(n)} ${word}${n === 1 ? "" : "s"}`;

// One entry in words, as after a sequence's name.
function entryText(code, n) {
  switch (code) {
    case PREFILL: return `prefill ${n}`;
    case DECODE: return `decode ${n}`;
    case WAIT: return "waits";
    case PREEMPTED: return `preempted, ${plural(n, "token")} lost`;
    case FINISHED: return "finished";
    case HIT: return `prefix hit ${n}`;
    case SWAPPED: return "swapped out";
    case REWOUND: return "rewound";
    case ADDED: return "arrived";
    default: return `did ${code}`;
  }
}

// What matters most of several entries, for the few letters of the values' column.
const WEIGHT = [0, 5, 4, 2, 8, 6, 1, 7, 9, 0.5];

// Of the values' column: what fits it.
const VALUES = {
  [PREFILL]: (n) => `prefill ${n}`,
  [DECODE]: (n) => (n === "1" ? "decode" : `decode ${n}`),
  [WAIT]: () => "waits",
  [PREEMPTED]: () => "preempted",
  [FINISHED]: () => "finished",
  [HIT]: (n) => `hit ${n}`,
  [SWAPPED]: () => "swapped out",
  [REWOUND]: () => "rewound",
  [ADDED]: () => "arrived",
};

// Of the tip, whose sums may be of several steps.
const DETAILS = {
  [PREFILL]: (n) => `prefill of ${plural(n, "token")}`,
  [DECODE]: (n) => `decode of ${plural(n, "token")}`,
  [WAIT]: (n) => `waits, with ${plural(n, "token")} to compute`,
  [PREEMPTED]: (n) => `preempted: ${plural(n, "token")} lost`,
  [HIT]: (n) => `${plural(n, "token")} from the prefix cache`,
};

// code, word, picture, whether it is shown only when there is one in view
const LEGEND = [
  [PREFILL, "prefill, by share of budget", '<path d="M2 5h4v4h-4zM7 3h4v8h-4zM12 1h4v12h-4z" fill="currentColor"/>'],
  [DECODE, "decode", '<path d="M1 5.5h18v3h-18z" fill="currentColor"/>'],
  [WAIT, "waits", '<path d="M1 11l8-8M6 11l8-8M11 11l8-8" stroke="currentColor" fill="none"/>'],
  [HIT, "prefix hit", '<circle cx="10" cy="7" r="2.4" fill="currentColor"/>'],
  [FINISHED, "finished", '<path d="M1 5.5h13v3h-13zM16 1h2v12h-2z" fill="currentColor"/>'],
  [PREEMPTED, "preempted", '<path d="M6 3.5h8l-4 7z" fill="currentColor"/>', true],
  [SWAPPED, "swapped out", '<path d="M6.5 3.5h7l-3.5 6.5z" stroke="currentColor" fill="none"/>', true],
  [REWOUND, "rewound", '<path d="M6 7l7-4.5v9z" fill="currentColor"/>', true],
];

// ---------------------------------------------------------------- looks

// One sequence. Entries of a kind that touch become one rectangle, so that a long life costs no
// more than a short one. `spans` are the lane's (see lanes.js), `edges` the axis's x of each step in
// view and of the one after, `newestX` where the newest step ends, `hatching` a fill, `ink` the text's colour.
function paintLane(context, spans, axis, edges, middle, newestX, { colour, hatching, ink }) {
  const gap = axis.columnWidth >= 5 ? 1 : 0; // between the bars of neighbouring chunks
  const marks = []; // x, code
  const lastMark = [];
  const waits = new Path2D();
  const solid = new Path2D();
  // The rectangles that may still grow: of waiting, of decoding, of prefill.
  let [waitX, waitEnd, decodeX, decodeEnd, barX, barEnd, barHeight] = [0, 0, 0, 0, 0, 0, 0];
  const flushBar = () => barEnd > barX && solid.rect(barX, middle - barHeight / 2, barEnd - barX - gap, barHeight);
  const flushDecode = () => decodeEnd > decodeX && solid.rect(decodeX, middle - 1.5, decodeEnd - decodeX, 3);
  const flushWait = () => waitEnd > waitX && waits.rect(waitX, middle - 4, waitEnd - waitX, 8);
  // Who has arrived, or lost its blocks, waits until it computes; of those only the head of the queue
  // has an entry that says so.
  let idleX = null;
  const endIdle = (x) => {
    if (idleX !== null && x > idleX) waits.rect(idleX, middle - 4, x - idleX, 8);
    idleX = null;
  };
  for (const { base, at, what, budgets, start, end } of spans) {
    for (let i = start; i < end; i++) {
      const column = base + at[i] - axis.from;
      const x = edges[column];
      const right = Math.max(edges[column + 1], x + 1);
      const code = codeOf(what[i]);
      if (code === DECODE || code === PREFILL || code === FINISHED) endIdle(x);
      if (code === ADDED || code === PREEMPTED || code === SWAPPED || code === REWOUND) idleX = x;
      if (code === WAIT && idleX !== null) continue;
      if (code === DECODE) {
        if (x > decodeEnd) {
          flushDecode();
          decodeX = x;
        }
        decodeEnd = right;
      } else if (code === WAIT) {
        if (x > waitEnd) {
          flushWait();
          waitX = x;
        }
        waitEnd = right;
      } else if (code === PREFILL) {
        const height = 5 + (LINE - 8) * Math.min(1, countOf(what[i]) / budgets[at[i]]);
        if (x < barEnd) barHeight = Math.max(barHeight, height); // the same pixel
        else if (gap || x > barEnd || height !== barHeight) {
          flushBar();
          [barX, barHeight] = [x, height];
        }
        barEnd = right;
      } else {
        // Events are what one looks for, so they stay at any zoom; but not ten on one spot.
        const spot = code === FINISHED ? right : x;
        if (lastMark[code] !== undefined && spot - lastMark[code] < 3) continue;
        lastMark[code] = spot;
        marks.push(spot, code);
      }
    }
  }
  endIdle(newestX);
  flushBar();
  flushDecode();
  flushWait();
  context.globalAlpha = 0.85;
  context.fillStyle = hatching;
  context.fill(waits);
  context.globalAlpha = 1;
  context.fillStyle = colour;
  context.fill(solid);
  for (let i = 0; i < marks.length; i += 2) paintMark(context, marks[i + 1], marks[i], axis.columnWidth, middle, colour, ink);
}

// An event. It is cut out of what lies below it, which fits a page of any colour.
function paintMark(context, code, x, columnWidth, middle, colour, ink) {
  const cut = (path) => {
    context.globalCompositeOperation = "destination-out";
    context.beginPath();
    path();
    context.fill();
    context.globalCompositeOperation = "source-over";
  };
  context.fillStyle = colour;
  if (code === FINISHED) {
    if (columnWidth >= 3) cut(() => context.rect(x - 3, middle - 6, 4, 12));
    context.fillRect(x - 2, middle - 6, 2, 12);
    return;
  }
  if (code === ADDED) {
    context.fillRect(x, middle - 5, 1, 10);
    return;
  }
  if (code === HIT) {
    const centre = x + Math.max(3.5, Math.min(columnWidth / 2, 4));
    cut(() => context.arc(centre, middle, 3.6, 0, 2 * Math.PI));
    context.beginPath();
    context.arc(centre, middle, 2.2, 0, 2 * Math.PI);
    context.fill();
    return;
  }
  // Preempted, swapped out, rewound: a triangle in ink over a cut through the line.
  if (columnWidth >= 3) cut(() => context.rect(x - 1, middle - LINE / 2, 8, LINE));
  context.beginPath();
  if (code === REWOUND) {
    context.moveTo(x, middle);
    context.lineTo(x + 6, middle - 4);
    context.lineTo(x + 6, middle + 4);
  } else {
    context.moveTo(x - 0.5, middle - 3.5);
    context.lineTo(x + 6.5, middle - 3.5);
    context.lineTo(x + 3, middle + 3.5);
  }
  context.closePath();
  context.fillStyle = context.strokeStyle = ink;
  context.lineWidth = 1;
  code === SWAPPED ? context.stroke() : context.fill();
}
