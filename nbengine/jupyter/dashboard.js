// The dashboard's page: controls, queues, block map, step log. It follows block_map.js in one
// module. It draws the latest frame when the browser paints, acknowledges it, and sends what the
// user asks for as messages; it decides nothing.

// An element with attributes, properties (those that start with a dot) and children.
function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith(".")) node[name.slice(1)] = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// Make `parent`'s children those of `items`, by key, changing only what differs: a button keeps
// its focus, and a selection survives, while rows around it come and go.
function reconcile(parent, items, keyOf, make, update) {
  const old = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let node = old.get(key);
    if (node) old.delete(key);
    else {
      node = make(item);
      node.dataset.key = key;
    }
    update(node, item);
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
  }
  for (const node of old.values()) node.remove();
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function uint32(view) {
  // Copied: a buffer out of a message need not be aligned.
  const { buffer, byteOffset, byteLength } = view;
  return new Uint32Array(buffer.slice(byteOffset, byteOffset + byteLength));
}

function render({ model, el }) {
  const palette = model.get("palette");
  const send = (type, fields = {}) => model.send({ type, ...fields });
  el.dataset.lmSuppressShortcuts = "true"; // the notebook's keys are not for our inputs

  // ---------------------------------------------------------------- controls
  const button = (label, title, act) =>
    h("button", { type: "button", title, onclick: act, class: "nbe-button" }, label);
  const step = button("Step", "Take one step", () => send("step", { n: 1 }));
  const steps = button("Step ×10", "Take ten steps", () => send("step", { n: 10 }));
  const run = button("Run", "Step in the background until paused", () => send("run"));
  const pause = button("Pause", "Stop stepping in the background", () => send("pause"));
  const mode = h("span", { class: "nbe-mode", role: "status" });
  const facts = h("span", { class: "nbe-facts" });
  const bar = h(
    "div",
    { class: "nbe-bar", role: "toolbar", "aria-label": "Engine controls" },
    step, steps, run, pause, mode, facts,
  );

  const prompt = h("input", { type: "text", placeholder: "Add a request…", "aria-label": "Prompt", class: "nbe-prompt" });
  const maxTokens = h("input", { type: "number", min: 1, step: 1, ".value": "64", "aria-label": "max_tokens", title: "max_tokens" });
  const temperature = h("input", { type: "number", min: 0, step: 0.1, ".value": "0.7", "aria-label": "temperature", title: "temperature" });
  const chat = h("input", { type: "checkbox", ".checked": true });
  const form = h(
    "form",
    {
      class: "nbe-add",
      "aria-label": "Add a request",
      onsubmit: (event) => {
        event.preventDefault();
        send("add", {
          prompt: prompt.value,
          max_tokens: maxTokens.valueAsNumber,
          temperature: temperature.valueAsNumber,
          chat: chat.checked,
        });
        prompt.value = "";
      },
    },
    prompt,
    h("label", {}, "tokens ", maxTokens),
    h("label", {}, "temperature ", temperature),
    h("label", { title: "Through the model's chat template" }, chat, " chat"),
    h("button", { type: "submit", class: "nbe-button" }, "Add"),
  );
  // JupyterLab keeps Enter from submitting a form.
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  const notice = h("div", { class: "nbe-notice", role: "alert", ".hidden": true });

  // ---------------------------------------------------------------- requests
  const live = h("tbody");
  const ended = h("tbody", { class: "nbe-ended" });
  const requests = h(
    "section",
    { class: "nbe-requests", "aria-label": "Requests", tabindex: 0 },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, ...["request", "state", "tokens", "blocks", "text", ""].map((t) => h("th", { scope: "col" }, t)))),
      live,
      ended,
    ),
  );
  const nobody = h("div", { class: "nbe-empty" }, "No requests. Type a prompt above, or call engine.add_request(…).");
  const more = h("div", { class: "nbe-empty" });
  requests.append(nobody, more);
  const reasons = h("div", { role: "status" });
  const explanation = h(
    "div",
    { class: "nbe-why", ".hidden": true },
    reasons,
    h("button", { type: "button", class: "nbe-small", "aria-label": "Close the explanation", onclick: () => send("why", { id: null }) }, "✕"),
  );

  function makeRow(item) {
    const id = item.id;
    return h(
      "tr",
      { onpointerenter: () => map.highlight(id), onpointerleave: () => map.highlight(null) },
      h("th", { scope: "row" }, h("i", { class: "nbe-swatch", style: `background:${palette[item.colour]}` }), id),
      h("td", { class: "nbe-state" }),
      h(
        "td",
        { class: "nbe-tokens" },
        h("div", { class: "nbe-progress", role: "progressbar", "aria-label": `${id}: tokens computed`, "aria-valuemin": 0 }, h("i"), h("b")),
        h("small"),
      ),
      h("td", { class: "nbe-number" }),
      h("td", { class: "nbe-text" }, h("div", {}, h("span"))),
      h(
        "td",
        { class: "nbe-actions" },
        h("button", { type: "button", class: "nbe-small", title: `Why is ${id} where it is?`, "aria-label": `Why ${id}`, onclick: () => send("why", { id }) }, "?"),
        h("button", { type: "button", class: "nbe-small", title: `Abort ${id}`, "aria-label": `Abort ${id}`, onclick: () => send("abort", { id: item.request }) }, "✕"),
      ),
    );
  }

  function updateRow(row, item) {
    const [, state, tokens, blocks, text] = row.children;
    row.className = `nbe-${item.status}`;
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
    setText(blocks, String(item.num_blocks));
    const line = text.firstElementChild.firstElementChild;
    setText(line, item.text);
    if (item.why) line.append(h("em", {}, (item.text ? " · " : "") + item.why));
  }

  const makeEnded = (item) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, h("i", { class: "nbe-swatch", style: `background:${palette[item.colour]}` }), item.id),
      h("td", { class: "nbe-state" }, `finished (${item.reason})`),
      h("td", { class: "nbe-tokens" }, h("small", {}, `${item.num_prompt}${item.num_cached ? ` (${item.num_cached} cached)` : ""} + ${item.num_output}`)),
      h("td", { class: "nbe-number" }),
      h("td", { class: "nbe-text", colspan: 2 }, h("div", {}, h("span", {}, item.text))),
    );

  // ---------------------------------------------------------------- blocks
  const map = createBlockMap({ palette });
  const counts = h("span", { class: "nbe-counts" });
  const blocks = h(
    "section",
    { "aria-label": "KV blocks" },
    h("h4", {}, "KV blocks ", counts),
    map.element,
    h(
      "div",
      { class: "nbe-legend" },
      h("span", {}, h("i", { class: "nbe-key nbe-key-held" }), "held"),
      h("span", {}, h("i", { class: "nbe-key nbe-key-shared" }), "shared"),
      h("span", {}, h("i", { class: "nbe-key nbe-key-cached" }), "cached"),
      h("span", {}, h("i", { class: "nbe-key nbe-key-free" }), "free"),
    ),
  );

  // ---------------------------------------------------------------- steps
  const log = h("tbody");
  const steplog = h(
    "section",
    { class: "nbe-log", "aria-label": "Step log", tabindex: 0 },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, ...["step", "token budget", "ms", "events"].map((t) => h("th", { scope: "col" }, t)))),
      log,
    ),
  );
  const makeStep = (item) =>
    h(
      "tr",
      { class: item.failed ? "nbe-failed" : "" },
      h("td", {}, String(item.step)),
      h(
        "td",
        {},
        h(
          "div",
          { class: "nbe-budget", role: "img", "aria-label": `${item.num_tokens} of ${item.budget} tokens` },
          ...item.parts.map(([colour, n, id]) =>
            h("i", {
              title: `${id || "others"}: ${n} ${n === 1 ? "token" : "tokens"}`,
              style: `flex:${n} 0 2px;max-width:${Math.max(2, (100 * n) / item.budget)}%;background:${colour < 0 ? "currentColor" : palette[colour]}`,
            }),
          ),
        ),
        h("small", {}, `${item.num_tokens}/${item.budget}`),
      ),
      h("td", {}, item.ms.toFixed(1)),
      h("td", {}, item.events.join("; ")),
    );

  const root = h(
    "div",
    { class: "nbe" },
    bar, form, notice,
    h("h4", {}, "Requests"),
    requests, explanation,
    h("div", { class: "nbe-columns" }, blocks, h("div", {}, h("h4", {}, "Steps"), steplog)),
  );
  el.append(root);

  // ---------------------------------------------------------------- frames
  let pending = 0;
  let drawn = 0;

  function draw() {
    pending = 0;
    const text = model.get("state");
    if (!text) return;
    const state = JSON.parse(text);
    const tables = uint32(model.get("tables"));
    const cached = uint32(model.get("cached"));

    setText(mode, state.is_running ? "running" : "paused");
    mode.classList.toggle("nbe-on", state.is_running);
    setText(
      facts,
      `step ${state.step} · ${state.policy} · ${state.num_running} running, ${state.num_waiting} waiting · ${state.tokens_per_second.toFixed(0)} tokens/s`,
    );
    root.dataset.step = state.step;
    root.dataset.answered = state.num_answered;
    root.dataset.running = state.is_running;
    run.setAttribute("aria-pressed", state.is_running);

    notice.hidden = !state.notice;
    if (state.notice && notice.dataset.text !== state.notice.text) {
      notice.dataset.text = state.notice.text;
      notice.replaceChildren(
        h("span", {}, state.notice.text),
        state.notice.detail ? h("details", {}, h("summary", {}, "traceback"), h("pre", {}, state.notice.detail)) : null ?? "",
      );
    }
    if (!state.notice) notice.dataset.text = "";

    reconcile(live, state.sequences, (item) => item.id, makeRow, updateRow);
    reconcile(ended, state.finished, (item) => `${item.id}`, makeEnded, () => {});
    nobody.hidden = state.sequences.length + state.finished.length > 0;
    setText(more, state.num_more_sequences ? `and ${state.num_more_sequences} more` : "");
    explanation.hidden = !state.explanation;
    if (state.explanation) setText(reasons, state.explanation);

    setText(
      counts,
      `${state.num_held} held · ${state.num_cached} cached · ${state.num_blocks - state.num_held - state.num_cached} free of ${state.num_blocks} blocks of ${state.block_size} tokens`,
    );
    map.update({ numBlocks: state.num_blocks, blockSize: state.block_size, running: state.running, tables, cached });
    reconcile(log, state.log, (item) => String(item.step), makeStep, () => {});
    drawn = state.seq;
    send("drawn", { seq: drawn });
  }

  // One drawing a paint, of the latest frame. A hidden page does not paint, so it acknowledges
  // nothing and is sent nothing.
  function schedule() {
    if (!pending) pending = requestAnimationFrame(draw);
  }
  model.on("change:state", schedule);
  schedule();
  send("ready");

  return () => {
    cancelAnimationFrame(pending);
    model.off("change:state", schedule);
    map.destroy();
  };
}

export default { render };
