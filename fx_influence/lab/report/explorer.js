// State of the explorer (filter, sort order, opened rollout) and the events that change it.

const $ = (id) => document.getElementById(id);

function startState(run) {
  const filter = { search: "", sign: "", advantage: "", prompt: "" };
  const sort = { key: "size", descending: true };
  return { run, evaluation: 0, filter, sort, view: [], active: 0, rollout: null, runScale: false, texts: searchTexts(run) };
}

function paint(state, printing = false) {
  const frame = $("rows");
  const nodeOf = (i, position) => rowNode(state.run, state.evaluation, state.scales, i, position);
  for (const [position, row] of fillRows(frame, nodeOf, state.view, printing)) {
    row.classList.toggle("active", position === state.active);
    row.setAttribute("aria-selected", String(state.view[position] === state.rollout));
  }
  const active = state.view[state.active];
  if (active === undefined) frame.removeAttribute("aria-activedescendant");
  else frame.setAttribute("aria-activedescendant", `row-${active}`);
}

function refresh(state) {
  const { run, evaluation } = state;
  state.scales = columnScales(run, evaluation);
  const indices = filtered(run, evaluation, state.texts, state.filter);
  state.view = sorted(run, evaluation, indices, state.sort);
  state.active = 0;
  const frame = $("rows");
  frame.scrollTop = 0;
  frame.setAttribute("aria-rowcount", state.view.length + 1);
  frame.querySelector("tbody").replaceChildren();
  frame.querySelector("thead").replaceChildren(headNode(state.scales, state.sort, (key) => sortBy(state, key)));
  $("count").textContent = indices.length === run.count ? `${run.count.toLocaleString("en")} rollouts`
    : `${indices.length.toLocaleString("en")} of ${run.count.toLocaleString("en")} rollouts`;
  paint(state);
}

function sortBy(state, key) {
  const numeric = COLUMNS.find((column) => column.key === key).numeric ?? false;
  const descending = state.sort.key === key ? !state.sort.descending : numeric;
  state.sort = { key, descending };
  refresh(state);
  writeAddress(state);
  document.querySelector(`[data-sort="${key}"]`).focus();
}

async function show(state) {
  const { rollout } = state;
  const nodes = await detailNodes(state.run, state, {
    open: (i) => open(state, i),
    step: (by) => stepTo(state, by),
    close: () => close(state),
    scale: (runScale) => { state.runScale = runScale; show(state).then(() => $("scale").focus()); },
  });
  // Another rollout was opened while this one was unpacked.
  if (rollout !== state.rollout) return;
  $("detail").replaceChildren(...nodes);
  $("detail").hidden = false;
}

async function open(state, rollout) {
  state.rollout = rollout;
  writeAddress(state);
  const position = state.view.indexOf(rollout);
  if (position >= 0) state.active = position;
  reveal(state);
  paint(state);
  await show(state);
  $("detail-title").focus({ preventScroll: true });
  const smooth = matchMedia("(prefers-reduced-motion: no-preference)").matches;
  $("detail").scrollIntoView({ block: "start", behavior: smooth ? "smooth" : "auto" });
}

function close(state) {
  state.rollout = null;
  $("detail").hidden = true;
  $("detail").replaceChildren();
  writeAddress(state);
  paint(state);
  $("rows").focus();
}

function stepTo(state, by) {
  if (!state.view.length) return;
  const position = Math.max(0, Math.min(state.view.length - 1, state.active + by));
  open(state, state.view[position]);
}

function reveal(state) {
  const frame = $("rows");
  const head = frame.querySelector("thead").offsetHeight;
  const top = state.active * ROW;
  const bottom = top + ROW + head - frame.clientHeight;
  if (top < frame.scrollTop) frame.scrollTop = top;
  else if (bottom > frame.scrollTop) frame.scrollTop = bottom;
}

function onRowKey(state, event) {
  const page = Math.max(1, Math.floor($("rows").clientHeight / ROW) - 2);
  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (event.target !== $("rows") || !state.view.length) return;
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    open(state, state.view[state.active]);
  } else if (event.key in moves) {
    event.preventDefault();
    state.active = Math.max(0, Math.min(state.view.length - 1, state.active + moves[event.key]));
    reveal(state);
    paint(state);
  }
}

function wireTable(state) {
  const frame = $("rows");
  let scheduled = false;
  frame.addEventListener("scroll", () => {
    if (scheduled) return;
    scheduled = true;
    requestAnimationFrame(() => { scheduled = false; paint(state); });
  });
  frame.addEventListener("keydown", (event) => onRowKey(state, event));
  frame.addEventListener("click", (event) => {
    const row = event.target.closest("[data-rollout]");
    if (row) open(state, Number(row.dataset.rollout));
  });
  addEventListener("resize", () => paint(state));
  addEventListener("beforeprint", () => {
    for (const list of document.querySelectorAll("#detail .tokens")) completers.get(list)();
    paint(state, true);
  });
  addEventListener("afterprint", () => paint(state));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.rollout !== null) close(state);
  });
}

function wireFilters(state) {
  const prompts = state.run.prompts.map(({ id, asked }, k) =>
    make("option", { value: k, text: `${excerpt(id, 24)}: ${excerpt(asked, 48)}` }));
  $("prompt").append(...prompts);
  const read = () => {
    for (const name of FILTERS) state.filter[name] = $(name).value;
    refresh(state);
    writeAddress(state);
  };
  $("filters").addEventListener("input", read);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  // The fields are cleared only after this event.
  $("filters").addEventListener("reset", () => setTimeout(read));
}

function showEvaluation(state) {
  for (const section of document.querySelectorAll("[data-evaluation]")) {
    section.hidden = Number(section.dataset.evaluation) !== state.evaluation;
  }
}

function wireEvaluations(state) {
  document.querySelectorAll(".strongest").forEach((node, evaluation) => fillStrongest(state.run, evaluation, node));
  $("evaluation")?.addEventListener("change", (event) => {
    state.evaluation = Number(event.target.value);
    showEvaluation(state);
    refresh(state);
    writeAddress(state);
    if (state.rollout !== null) show(state);
  });
}

// Shows what the address says, as when the page opens or a link is followed.
function followAddress(state) {
  const rollout = readAddress(state);
  if (rollout === undefined) return;
  if ($("evaluation")) $("evaluation").value = String(state.evaluation);
  showEvaluation(state);
  refresh(state);
  if (rollout !== null) open(state, rollout);
  else if (state.rollout !== null) close(state);
}

readRun().then((run) => {
  const state = startState(run);
  wireFilters(state);
  wireTable(state);
  wireEvaluations(state);
  refresh(state);
  followAddress(state);
  addEventListener("hashchange", () => followAddress(state));
}).catch((error) => {
  $("count").textContent = `The rollouts cannot be shown, perhaps because this browser is too old: ${error}`;
});
