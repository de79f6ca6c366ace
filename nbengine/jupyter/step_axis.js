// The axis that the timeline and the charts share: which steps are in view, where each lies between
// the two margins, and which of them the page lacks. Both lay themselves out by it, so that one
// step is one vertical line through all of them.
//
// A store of steps is {first, last, get(step)}: the numbers that exist, and the row of a step if
// the page has it.

const STEP_PX = 8; // a column's width while nothing is zoomed
const ASK_GAP = 256; // two stretches of missing rows nearer than this are asked for as one

export const hasSteps = (steps) =>
  steps != null && steps.first != null && steps.last != null && steps.last >= steps.first;

export const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

const GROUPED = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
export const grouped = (n) => GROUPED.format(n);

// Margins for names (left) and values (right), in CSS pixels, and what is left between them.
export function stepMargins(width) {
  const [left, right] = width >= 560 ? [104, 104] : width >= 360 ? [72, 90] : [56, 90];
  return { left, right, plotWidth: Math.max(1, width - left - right) };
}

// How many steps a plot shows while nothing is zoomed.
export const defaultSpan = (plotWidth) => Math.max(8, Math.floor(plotWidth / STEP_PX));

// The newest steps that fit, as [from, to]. While there are fewer, `to` is still to come: columns
// fill up from the left and keep their width.
export function defaultRange(steps, plotWidth) {
  const span = defaultSpan(plotWidth);
  const from = Math.max(steps.first, steps.last - span + 1);
  return [from, from + span - 1];
}

// x(step): the left edge of its column, on a whole device pixel; where columns are narrower than a
// CSS pixel, on one of those: finer, one could not tell them apart. stepAt(x): not clamped.
export function createAxis([from, to], width) {
  const columnWidth = width / (to - from + 1);
  const ratio = columnWidth < 1 ? 1 : window.devicePixelRatio || 1;
  return {
    from,
    to,
    width,
    columnWidth,
    x: (step) => Math.round((step - from) * columnWidth * ratio) / ratio,
    stepAt: (x) => from + Math.floor(x / columnWidth),
  };
}

// Step numbers for labels, round and at least `gap` pixels apart.
export function axisTicks({ from, to, columnWidth }, gap = 64) {
  let every = 10 ** Math.ceil(Math.log10(Math.max(1, gap / columnWidth)));
  if (every >= 10 && (every / 5) * columnWidth >= gap) every /= 5;
  else if (every >= 10 && (every / 2) * columnWidth >= gap) every /= 2;
  const ticks = [];
  for (let step = Math.ceil(from / every) * every; step <= to; step += every) ticks.push(step);
  return ticks;
}

// A function of the steps in view that calls onMissing(from, to) for stretches of rows that the page
// lacks. A row is asked for once, and again only if it was out of view in between.
export function createAsker(onMissing) {
  let asked = new Set();
  return (steps, from, to) => {
    const still = new Set();
    let start = null;
    let end = null;
    for (let step = Math.max(from, steps.first); step <= Math.min(to, steps.last); step++) {
      if (steps.get(step) !== undefined) continue;
      still.add(step);
      if (asked.has(step)) continue;
      if (start !== null && step - end > ASK_GAP) {
        onMissing(start, end);
        start = null;
      }
      start ??= step;
      end = step;
    }
    asked = still;
    if (start !== null) onMissing(start, end);
  };
}
