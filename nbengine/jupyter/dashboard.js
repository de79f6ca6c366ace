// The dashboard's page: controls and every view of the engine. It follows the other files in one
// module. It draws the latest frame when the browser paints, acknowledges it, and sends what the
// user asks for as messages; it decides nothing.

const CONDITIONS = ["preemption", "finish", "prefix_miss", "out_of_blocks", "eviction", "copy_on_write"];
const POLICIES = { fcfs: "Fcfs", priority: "Priority", sjf: "ShortestJobFirst" };
const LOOKS = new Set(["ready", "drawn", "cursor", "select", "steps", "block"]); // what no button asks for
const ASK_BLOCK_MS = 60; // the pointer rests so long before a block is asked about
const SILENT_MS = 3000; // without an answer, the page says so
const SILENT = {
  text: "No answer yet. The kernel is busy, with a long step or a cell, or it was restarted: then load the engine and show its dashboard again.",
  detail: "",
};

function render({ model, el }) {
  const palette = model.get("palette");
  const send = (type, fields = {}) => {
    model.send({ type, ...fields });
    if (!LOOKS.has(type)) expect(store.num_answered + 1);
    // Whatever is asked for is answered by a frame; a kernel that was restarted answers nothing.
    if (type !== "drawn") silence ||= setTimeout(() => ((isSilent = true), drawNotice()), SILENT_MS);
  };
  let silence = 0;
  let isSilent = false;
  let expected = 0; // how many answers there are to be
  function expect(answers) {
    expected = answers;
    bar.setAttribute("aria-busy", String(expected > store.num_answered));
  }
  el.dataset.lmSuppressShortcuts = "true"; // the notebook's keys are not for our inputs
  const store = createStore();

  // ---------------------------------------------------------------- controls
  const button = (label, title, act) =>
    h("button", { type: "button", title, onclick: act, class: "nbe-button" }, label);
  const step = button("Step", "Take one step", () => send("step", { n: 1 }));
  const steps = button("Step ×10", "Take ten steps", () => send("step", { n: 10 }));
  const run = button("Run", "Step in the background until paused", () => send("run"));
  const pause = button("Pause", "Stop stepping in the background", () => send("pause"));
  const until = h(
    "select",
    {
      "aria-label": "Run until",
      title: "Run in the background until this happens",
      onchange: () => {
        if (until.value) send("run", { until: until.value });
        until.value = "";
      },
    },
    h("option", { value: "" }, "Run until…"),
    ...CONDITIONS.map((name) => h("option", { value: name }, name.replaceAll("_", " "))),
  );
  const rewind = button("Rewind to cursor", "Go back to the step under the timeline's cursor; what came after it is dropped", () => {
    if (store.cursor !== null) send("rewind", { step: store.cursor });
  });
  const mode = h("span", { class: "nbe-mode", role: "status" });
  const facts = h("span", { class: "nbe-facts" });
  const policy = h(
    "select",
    { "aria-label": "Policy", title: "Scheduling policy, from the next step on", onchange: () => send("policy", { name: policy.value }) },
    ...Object.keys(POLICIES).map((name) => h("option", { value: name }, name)),
  );
  const custom = h("option", { value: "", disabled: true });
  const budget = h("input", {
    type: "number", min: 1, step: 1, "aria-label": "Token budget", title: "max_num_batched_tokens, from the next step on",
    onchange: () => send("budget", { tokens: budget.valueAsNumber }),
  });
  const bar = h(
    "div",
    { class: "nbe-bar", role: "toolbar", "aria-label": "Engine controls" },
    step, steps, run, pause, until, rewind,
    h("label", {}, "policy ", policy),
    h("label", {}, "token budget ", budget),
    mode, facts,
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

  // ---------------------------------------------------------------- what the page looks at
  // The cursor and the selection live in the kernel, so that every page of the dashboard agrees; this
  // page shows its own wish at once. One wish is on its way at a time: the latest follows the answer.
  let wish; // a step, null, or undefined: none that the kernel has not heard of
  let isAsking = false;
  let asked = null; // {step, at}: what was asked for last, until the kernel says so too
  function setCursor(to) {
    wish = to;
    if (to === null) store.past = null;
    store.cursor = to;
    ask();
    schedule();
  }
  function ask() {
    if (isAsking || wish === undefined) return;
    isAsking = true;
    asked = { step: wish, at: performance.now() };
    send("cursor", { step: wish });
    wish = undefined;
  }
  function select(id) {
    store.selected = id;
    send("select", { id });
    schedule();
  }
  const onMissing = (first, last) => send("steps", { first, last });

  // ---------------------------------------------------------------- views
  const queues = createQueues({
    palette,
    onWhy: (id) => send("why", { id }),
    onAbort: (id) => send("abort", { id }),
    onSelect: select,
    onHover: (id) => map.highlight(id),
  });
  const reasons = h("div", { role: "status" });
  const explanation = h(
    "div",
    { class: "nbe-why", ".hidden": true },
    reasons,
    h("button", { type: "button", class: "nbe-small", "aria-label": "Close the explanation", onclick: () => send("why", { id: null }) }, "✕"),
  );

  let pinned = null;
  let asking = 0;
  function askBlock(block) {
    clearTimeout(asking);
    asking = setTimeout(() => send("block", { block }), ASK_BLOCK_MS);
  }
  const map = createBlockMap({
    palette,
    onPoint: (block) => {
      if (block !== null || pinned !== null) askBlock(block ?? pinned);
    },
    onPick: (block) => {
      pinned = pinned === block ? null : block;
      askBlock(pinned);
      schedule();
    },
  });
  const counts = h("span", { class: "nbe-counts" });
  const tokens = h("div", { class: "nbe-block", role: "region", "aria-label": "Block", ".hidden": true });
  const blocks = h(
    "section",
    { "aria-label": "KV blocks" },
    h("h4", {}, "KV blocks ", counts),
    map.element,
    tokens,
    h(
      "div",
      { class: "nbe-legend" },
      h("span", {}, h("i", { class: "nbe-key nbe-key-held" }), "held"),
      h("span", {}, h("i", { class: "nbe-key nbe-key-shared" }), "shared"),
      h("span", {}, h("i", { class: "nbe-key nbe-key-cached" }), "cached"),
      h("span", {}, h("i", { class: "nbe-key nbe-key-free" }), "free"),
    ),
  );

  const timeline = createTimeline({
    palette,
    onCursor: setCursor,
    onSelect: select,
    onMissing,
    onRange: (from, to) => {
      range = from === null || from === undefined ? null : [from, to];
      schedule();
    },
  });
  let range = null;
  // The timeline asks for steps that the page lacks, for both.
  const charts = createCharts({ palette, onCursor: setCursor, onMissing: () => {} });
  const card = h("div", { class: "nbe-card" });
  const ops = h("div", { class: "nbe-card", role: "region", "aria-label": "Kernels", ".hidden": true });
  const kernels = h(
    "button",
    {
      type: "button",
      class: "nbe-small",
      "aria-expanded": "false",
      title: "What each kernel costs in this step, against the roofline; on a GPU it is timed, which takes some seconds",
      onclick: () => {
        const { cursor, kernels } = store;
        send("kernels", { shown: !kernels || (cursor !== null && cursor !== kernels.step), step: cursor });
      },
    },
    "kernels",
  );
  const inspector = h("section", { "aria-label": "Step inspector" }, h("h4", {}, "Step ", kernels), card);

  const root = h(
    "div",
    { class: "nbe" },
    bar, form, notice,
    h("section", { "aria-label": "Timeline" }, h("h4", {}, "Timeline"), timeline.element),
    h("section", { "aria-label": "Charts" }, charts.element),
    h("div", { class: "nbe-columns" }, blocks, inspector),
    ops,
    h("h4", {}, "Requests"),
    queues.element, explanation,
  );
  el.append(root);

  // ---------------------------------------------------------------- frames
  let pending = 0;
  let drawn = 0;
  let shownRecord = null;

  function drawBar(live, isPast) {
    const isIdle = live.num_running + live.num_waiting === 0;
    setText(mode, live.is_running ? (isIdle ? "running, idle" : "running") : "paused");
    expect(expected);
    mode.classList.toggle("nbe-on", live.is_running);
    run.setAttribute("aria-pressed", live.is_running);
    rewind.disabled = !isPast;
    const known = Object.entries(POLICIES).find(([, name]) => name === live.policy);
    if (!known) {
      setText(custom, live.policy);
      if (!custom.isConnected) policy.append(custom);
    }
    if (document.activeElement !== policy) policy.value = known ? known[0] : "";
    budget.max = live.max_budget;
    if (document.activeElement !== budget) budget.value = live.budget;
    const hits = live.hit_rate === null ? "" : ` · ${Math.round(100 * live.hit_rate)}% of prompt tokens from the prefix cache`;
    setText(
      facts,
      `step ${live.step} · ${live.num_running} running, ${live.num_waiting} waiting · ${live.tokens_per_second.toFixed(0)} tokens/s${hits}`,
    );
  }

  function drawNotice() {
    const { live } = store;
    const stopped = live?.stopped && !live.is_running ? { text: live.stopped, detail: "" } : null;
    const found = isSilent ? SILENT : (store.notice ?? stopped);
    notice.hidden = !found;
    const key = found ? found.text + found.detail : "";
    if (notice.dataset.text === key) return;
    notice.dataset.text = key;
    if (!found) return;
    notice.replaceChildren(
      h("span", {}, found.text),
      ...(found.detail ? [h("details", {}, h("summary", {}, "traceback"), h("pre", {}, found.detail))] : []),
    );
  }

  function drawTokens() {
    const block = store.block;
    tokens.hidden = pinned === null || !block || block.block !== pinned;
    if (tokens.hidden) return;
    const where = block.index === null ? "" : `, block ${block.index} of ${block.holders.length > 1 ? "their tables" : "its table"}`;
    const who = block.holders.length ? `${block.kind}: ${block.holders.join(", ")}${where}` : block.kind;
    const hash = block.hash ? ` · hash ${block.hash}${block.salted ? " (salted)" : ""}` : "";
    const texts = block.texts.length ? block.texts : block.token_ids.map(String);
    const key = JSON.stringify([block.block, who, hash, texts]);
    if (tokens.dataset.text === key) return;
    tokens.dataset.text = key;
    tokens.replaceChildren(
      h("div", { class: "nbe-block-head" }, h("b", {}, `Block ${block.block}`), ` ${who}${hash} · ${block.token_ids.length} tokens`,
        h("button", { type: "button", class: "nbe-small", "aria-label": "Close the block", onclick: () => { pinned = null; schedule(); } }, "✕")),
      h("div", { class: "nbe-token-list" }, ...texts.map((text, i) => h("span", { title: `token ${block.token_ids[i]}` }, text.replaceAll("\n", "⏎\n") || "·"))),
    );
  }

  function draw() {
    pending = 0;
    const { live } = store;
    if (!live) return;
    const isPast = store.cursor !== null;
    const now = store.now();
    root.classList.toggle("nbe-past", isPast);
    drawBar(live, isPast);
    drawNotice();
    queues.update({
      sequences: now.sequences,
      finished: live.finished,
      selected: store.selected,
      isPast,
      numMore: now.num_running + now.num_waiting - now.sequences.length,
    });
    explanation.hidden = !store.explanation;
    if (store.explanation) setText(reasons, store.explanation);
    setText(
      counts,
      `${now.num_held} held · ${now.num_cached} cached · ${live.num_blocks - now.num_held - now.num_cached} free of ${live.num_blocks} blocks of ${live.block_size} tokens`,
    );
    map.update({
      cells: now.cells,
      names: store.names,
      blockSize: live.block_size,
      step: now.step,
      tails: now.tails,
      selected: store.selected,
      table: now.table,
      details: store.block,
    });
    drawTokens();
    const views = { steps: store.steps, names: store.names, cursor: store.cursor, selected: store.selected, isLive: live.is_running };
    timeline.update(views);
    charts.update({ ...views, range });
    if (shownRecord !== now.record) {
      shownRecord = now.record;
      card.innerHTML = now.record || "<div class='nbe-empty'>No step was taken yet.</div>";
    }
    ops.hidden = !store.kernels;
    kernels.setAttribute("aria-expanded", String(!ops.hidden));
    if (store.kernels && ops.dataset.html !== store.kernels.html) {
      ops.dataset.html = store.kernels.html;
      ops.innerHTML = store.kernels.html; // of the kernel's own making: it escapes what others wrote
    }
    root.dataset.step = live.step;
    root.dataset.shown = now.step;
    root.dataset.answered = store.num_answered;
    root.dataset.seq = store.seq;
    root.dataset.running = live.is_running;
    if (store.seq > drawn) {
      drawn = store.seq;
      send("drawn", { seq: drawn });
    }
  }

  // One drawing a paint, of all messages since the last. A hidden page does not paint, so it
  // acknowledges nothing and is sent nothing.
  function schedule() {
    if (!pending) pending = requestAnimationFrame(draw);
  }

  function receive(message, [text, ...buffers]) {
    if (message.type !== "frame") return;
    clearTimeout(silence);
    silence = 0;
    isSilent = false;
    const content = JSON.parse(new TextDecoder().decode(text));
    const mine = store.cursor;
    if (!store.apply(content, buffers)) {
      send("ready"); // a message was lost
      return;
    }
    isAsking = false;
    if (asked && (content.cursor === asked.step || performance.now() - asked.at > 1000)) asked = null;
    if (wish !== undefined || asked) store.cursor = mine; // newer than what the kernel has heard
    ask();
    schedule();
  }
  model.on("msg:custom", receive);
  send("ready");

  return () => {
    cancelAnimationFrame(pending);
    clearTimeout(asking);
    clearTimeout(silence);
    model.off("msg:custom", receive);
    map.destroy();
    timeline.destroy();
    charts.destroy();
  };
}

export default { render };
