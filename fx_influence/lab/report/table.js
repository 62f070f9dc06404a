// The table of rollouts: only the rows in view are in the document.

const ROW = 36;
const SPARE = 8;
const PRINTED = 60;

const COLUMNS = [
  { key: "id", title: "Rollout" },
  { key: "prompt", title: "Prompt" },
  { key: "completion", title: "Completion" },
  { key: "reward", title: "Reward", numeric: true },
  { key: "advantage", title: "Advantage", numeric: true },
  { key: "length", title: "Tokens", numeric: true },
  { key: "influence", title: "Influence", numeric: true },
  { key: "stderr", title: "Std. error", numeric: true },
  { key: "step", title: "In this step", numeric: true },
  { key: "size", title: "Size", numeric: true },
];

// The value that a column is sorted by; a missing number comes last in either direction.
function sortValue(run, evaluation, key, i) {
  const { influence, stderr } = run.evaluations[evaluation];
  if (key === "prompt") return run.prompts[run.rollouts.prompt[i]].asked;
  if (key === "influence" || key === "step") return influence[i];
  if (key === "size") return Math.abs(influence[i]);
  if (key === "stderr") return stderr[i];
  return run.rollouts[key][i];
}

function sorted(run, evaluation, indices, { key, descending }) {
  const values = new Map(indices.map((i) => [i, sortValue(run, evaluation, key, i)]));
  const order = (a, b) => (a < b ? -1 : Number(a > b));
  return [...indices].sort((i, j) => {
    const [a, b] = [values.get(i), values.get(j)];
    if (a === null || b === null) return Number(a === null) - Number(b === null) || i - j;
    return (descending ? order(b, a) : order(a, b)) || i - j;
  });
}

function searchTexts(run) {
  const { id, prompt, completion, source } = run.rollouts;
  const texts = (i) => [id[i], run.prompts[prompt[i]].text, completion[i], source?.[i] ?? ""];
  return id.map((_, i) => texts(i).join("\n").toLowerCase());
}

// Whether the sign of a value is told: its 95% interval, of ``quantile`` standard errors to each side, excludes 0.
function isTold(x, error, quantile) {
  return error !== null && Math.abs(x) > quantile * error;
}

const SIGNS = {
  "": () => true,
  up: (x) => x > 0,
  down: (x) => x < 0,
  zero: (x) => x === 0 || x === null,
  sure: isTold,
  noise: (x, error, quantile) => error !== null && !isTold(x, error, quantile),
};

function filtered(run, evaluation, texts, filter) {
  const { influence, stderr, quantile } = run.evaluations[evaluation];
  const wanted = filter.search.toLowerCase();
  const indices = [];
  for (let i = 0; i < run.count; i += 1) {
    const matches =
      SIGNS[filter.sign](influence[i], stderr[i], quantile) &&
      SIGNS[filter.advantage](run.rollouts.advantage[i]) &&
      (filter.prompt === "" || run.rollouts.prompt[i] === Number(filter.prompt)) &&
      (wanted === "" || texts[i].includes(wanted));
    if (matches) indices.push(i);
  }
  return indices;
}

function columnScales(run, evaluation) {
  const { influence, stderr } = run.evaluations[evaluation];
  const perUnit = columnScale(influence);
  return {
    influence: perUnit,
    stderr: { ...perUnit, ...columnScale([...stderr, ...influence]) },
    step: columnScale(influence.map((x) => x * run.lr)),
    largest: influence.reduce((max, x) => Math.max(max, Math.abs(x)), 0),
  };
}

function cellText(run, evaluation, scales, key, i) {
  const { influence, stderr } = run.evaluations[evaluation];
  const number = (x, decimals) => (x === null ? "" : x.toFixed(decimals).replace("-", "−"));
  switch (key) {
    case "prompt": return excerpt(run.prompts[run.rollouts.prompt[i]].asked);
    case "reward": return number(run.rollouts.reward[i], 2);
    case "advantage": return run.rollouts.advantage[i] === null ? "" : withSign(run.rollouts.advantage[i].toFixed(2));
    case "length": return String(run.rollouts.length[i]);
    case "influence": return scaled(influence[i], scales.influence);
    case "stderr": return scaled(stderr[i], scales.stderr, false);
    case "step": return scaled(influence[i] * run.lr, scales.step);
    default: return excerpt(run.rollouts[key][i]);
  }
}

function bar(x, largest) {
  const fill = make("span", { class: x < 0 ? "bar down" : "bar up" });
  fill.style.width = `${50 * Math.abs(x) / (largest || 1)}%`;
  return make("span", { class: "track", "aria-hidden": "true" }, fill);
}

function rowNode(run, evaluation, scales, i, position) {
  const row = make("tr", { role: "row", id: `row-${i}`, "aria-rowindex": position + 2, "data-rollout": i });
  for (const { key, numeric } of COLUMNS) {
    const cell = make("td", { role: "gridcell", class: `c-${key}${numeric ? " n" : ""}` });
    if (key === "size") cell.append(bar(run.evaluations[evaluation].influence[i], scales.largest));
    else cell.textContent = cellText(run, evaluation, scales, key, i);
    row.append(cell);
  }
  return row;
}

function headNode(scales, sort, onSort) {
  const units = { influence: "nats / lr", stderr: "nats / lr", step: "nats" };
  const row = make("tr", { role: "row", "aria-rowindex": 1 });
  for (const { key, title, numeric } of COLUMNS) {
    const current = sort.key === key;
    const direction = current ? (sort.descending ? "descending" : "ascending") : "none";
    const button = make("button", { type: "button", "data-sort": key }, title);
    if (current) button.append(make("span", { class: "arrow", "aria-hidden": "true", text: sort.descending ? "↓" : "↑" }));
    if (units[key]) button.append(make("small", { text: unitOf(scales[key], units[key]) }));
    button.addEventListener("click", () => onSort(key));
    const properties = { role: "columnheader", scope: "col", class: `c-${key}${numeric ? " n" : ""}` };
    row.append(make("th", { ...properties, "aria-sort": direction }, button));
  }
  return row;
}

function spacer() {
  return make("tr", { class: "spacer", "aria-hidden": "true" }, make("td"));
}

// Brings the rows of ``view`` that are visible into ``frame``, with empty space for the others, and returns them by position.
// Rows that stay are not touched: a browser drops a click whose row is taken out between press and release.
function fillRows(frame, nodeOf, view, printing) {
  const above = printing ? 0 : Math.max(0, Math.floor(frame.scrollTop / ROW) - SPARE);
  // By the height of the window, because an empty frame has no height yet.
  const count = printing ? PRINTED : Math.ceil(innerHeight / ROW) + 2 * SPARE;
  const end = Math.min(view.length, above + count);
  const body = frame.querySelector("tbody");
  if (!body.firstChild) body.append(spacer(), spacer());
  const drawn = new Map(Array.from(body.querySelectorAll("[data-rollout]"), (row) => [Number(row.dataset.rollout), row]));
  const rows = new Map(view.slice(above, end).map((i, k) => [above + k, drawn.get(i) ?? nodeOf(i, above + k)]));
  const visible = new Set(rows.values());
  for (const row of drawn.values()) if (!visible.has(row)) row.remove();
  let next = body.firstChild.nextSibling;
  for (const row of rows.values()) {
    if (row === next) next = next.nextSibling;
    else body.insertBefore(row, next);
  }
  body.firstChild.firstChild.style.height = `${above * ROW}px`;
  body.lastChild.firstChild.style.height = `${printing ? 0 : (view.length - end) * ROW}px`;
  return rows;
}
