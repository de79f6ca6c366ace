// The queues: a row for each unfinished sequence, with its progress, speed and reason to wait.
//
// createQueues({palette, onWhy, onAbort, onSelect, onHover}) returns {element, update(data)}. data:
// {sequences, finished, selected, isPast, numMore}.

function createQueues({ palette, onWhy, onAbort, onSelect, onHover }) {
  const headers = ["request", "state", "tokens", "first token", "tokens/s", "blocks", "text", ""];
  const live = h("tbody");
  const ended = h("tbody", { class: "nbe-ended" });
  const nobody = h("div", { class: "nbe-empty" });
  const more = h("div", { class: "nbe-empty" });
  const element = h(
    "section",
    { class: "nbe-requests", "aria-label": "Requests", tabindex: 0 },
    h("table", {}, h("thead", {}, h("tr", {}, ...headers.map((t) => h("th", { scope: "col" }, t)))), live, ended),
    nobody,
    more,
  );

  const swatch = (colour) => h("i", { class: "nbe-swatch", style: `background:${palette[colour]}` });
  const seconds = (s) => (s === null ? "" : s < 1 ? `${Math.round(1000 * s)} ms` : `${s.toFixed(1)} s`);
  const speed = (v) => (v === null ? "" : v < 10 ? v.toFixed(1) : String(Math.round(v)));

  let hovered = null;
  function hover(id) {
    hovered = id;
    onHover(id);
  }

  function makeRow(item) {
    const id = item.id;
    return h(
      "tr",
      { onpointerenter: () => hover(id), onpointerleave: () => hover(null) },
      h(
        "th",
        { scope: "row" },
        h(
          "button",
          {
            type: "button",
            class: "nbe-name",
            "aria-pressed": "false",
            title: `Show the blocks of ${id} in the order of its table`,
            onclick: (event) => onSelect(event.currentTarget.getAttribute("aria-pressed") === "true" ? null : id),
          },
          swatch(item.colour),
          id,
        ),
      ),
      h("td", { class: "nbe-state" }),
      h(
        "td",
        { class: "nbe-tokens" },
        h("div", { class: "nbe-progress", role: "progressbar", "aria-label": `${id}: tokens computed`, "aria-valuemin": 0 }, h("i"), h("b")),
        h("small"),
      ),
      h("td", { class: "nbe-number" }),
      h("td", { class: "nbe-number" }),
      h("td", { class: "nbe-number" }),
      h("td", { class: "nbe-text" }, h("div", {}, h("span"))),
      h(
        "td",
        { class: "nbe-actions" },
        h("button", { type: "button", class: "nbe-small", title: `Why is ${id} where it is?`, "aria-label": `Why ${id}`, onclick: () => onWhy(id) }, "?"),
        h("button", { type: "button", class: "nbe-small", title: `Abort ${id}`, "aria-label": `Abort ${id}`, onclick: () => onAbort(item.request) }, "✕"),
      ),
    );
  }

  function updateRow(row, item, { selected, isPast }) {
    const [name, state, tokens, ttft, rate, blocks, text, actions] = row.children;
    row.className = `nbe-${item.status}`;
    const isSelected = selected === item.id;
    row.classList.toggle("nbe-selected", isSelected);
    name.firstElementChild.setAttribute("aria-pressed", isSelected);
    setText(state, item.status);
    state.title = item.num_preemptions ? `preempted ${item.num_preemptions} times` : "";
    const [progress, numbers] = tokens.children;
    progress.setAttribute("aria-valuemax", item.max_tokens);
    progress.setAttribute("aria-valuenow", item.num_computed);
    const [promptPart, outputPart] = progress.children;
    const share = (n) => `${(100 * n) / item.max_tokens}%`;
    promptPart.style.width = share(Math.min(item.num_prompt, item.num_computed));
    outputPart.style.width = share(Math.max(0, item.num_computed - item.num_prompt));
    outputPart.style.background = palette[item.colour];
    promptPart.style.background = palette[item.colour];
    const output = item.num_tokens - item.num_prompt;
    const prefill = item.num_computed < item.num_prompt ? `${item.num_computed}/` : "";
    const hit = item.num_cached ? ` (${item.num_cached} cached)` : "";
    setText(numbers, `${prefill}${item.num_prompt}${hit} + ${output}`);
    setText(ttft, seconds(item.ttft));
    setText(rate, speed(item.speed));
    setText(blocks, String(item.num_blocks));
    const line = text.firstElementChild.firstElementChild;
    setText(line, item.text.replace(/\s+/g, " "));
    if (item.why) line.append(h("em", {}, (item.text ? " · " : "") + item.why));
    for (const button of actions.children) button.disabled = isPast;
  }

  const makeEnded = (item) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, swatch(item.colour), item.id),
      h("td", { class: "nbe-state" }, `finished (${item.reason})`),
      h("td", { class: "nbe-tokens" }, h("small", {}, `${item.num_prompt}${item.num_cached ? ` (${item.num_cached} cached)` : ""} + ${item.num_output}`)),
      h("td", { class: "nbe-number" }, seconds(item.ttft)),
      h("td", { class: "nbe-number" }, speed(item.speed)),
      h("td", { class: "nbe-number" }),
      h("td", { class: "nbe-text", colspan: 2 }, h("div", {}, h("span", {}, item.text))),
    );

  return {
    element,
    update(data) {
      const { sequences, finished, isPast } = data;
      reconcile(live, sequences, (item) => item.id, makeRow, (row, item) => updateRow(row, item, data));
      // A row that goes away under the pointer is left by nobody.
      if (hovered !== null && !sequences.some((item) => item.id === hovered)) hover(null);
      reconcile(ended, isPast ? [] : finished, (item) => item.id, makeEnded, () => {});
      nobody.hidden = sequences.length + (isPast ? 0 : finished.length) > 0;
      setText(nobody, isPast ? "No requests then." : "No requests. Type a prompt above, or call engine.add_request(…).");
      setText(more, data.numMore > 0 ? `and ${data.numMore} more` : "");
    },
  };
}
