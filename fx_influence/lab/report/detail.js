// One opened rollout: its figures, its tokens beside those of the same prompt, and the rollouts of E it affects most.

const READOUT = [
  ["token", "token"],
  ["position", "position"],
  ["influence", "nats per unit lr"],
  ["step", "nats in this step"],
  ["share", "of the rollout's Σ|influence|"],
  ["logprob", "log π"],
  ["entropy", "entropy"],
  ["likely", "log π > −entropy"],
  ["coefficient", "coefficient"],
];

function readoutNode(run) {
  const names = run.values > 3 ? [...READOUT, ["entropyCoefficient", "entropy coefficient"]] : READOUT;
  const items = names.map(([field, name]) =>
    make("div", { class: `r-${field}` }, make("dt", { text: name }), make("dd", { "data-field": field, text: " " })));
  return make("dl", { class: "readout", "aria-live": "polite", "aria-label": "Selected token" }, ...items);
}

// A token is likely if log π > −entropy: making it more likely then lowers the entropy at its place.
function likelyWord(logprob, entropy) {
  if (Number.isNaN(logprob) || Number.isNaN(entropy)) return "—";
  return logprob > -entropy ? "likely" : "unlikely";
}

function updateReadout(readout, run, tokens, k) {
  const total = tokens.influence.reduce((sum, x) => sum + Math.abs(x), 0);
  const texts = {
    position: `${k + 1} of ${tokens.texts.length}`,
    influence: preciseSigned(tokens.influence[k]),
    step: preciseSigned(tokens.influence[k] * run.lr, 4),
    share: percent(Math.abs(tokens.influence[k]) / total),
    logprob: precise(tokens.logprob[k]),
    entropy: precise(tokens.entropy[k]),
    likely: likelyWord(tokens.logprob[k], tokens.entropy[k]),
    coefficient: preciseSigned(tokens.coefficient[k]),
    entropyCoefficient: tokens.entropyCoefficient && preciseSigned(tokens.entropyCoefficient[k]),
  };
  for (const node of readout.querySelectorAll("[data-field]")) {
    const { field } = node.dataset;
    if (field !== "token") node.textContent = texts[field];
    else node.replaceChildren(appendToken(make("bdi"), tokens.texts[k].slice(0, 40)));
  }
}

const STRIP = "Each token is shaded by its influence: blue with a line above raises the entropy, orange with a line below "
  + "lowers it. Point at a token, or move by the arrow keys, to read its figures; it is likely if its log π is above minus the "
  + "entropy at its place.";

// The legend: the value in the middle of every level, in both units.
function legendNode(run, largest) {
  const levels = Array.from({ length: 2 * LEVELS + 1 }, (_, k) => k - LEVELS);
  const values = levels.map((level) => Math.sign(level) * (level / LEVELS) ** 2 * largest);
  const line = (name, numbers) => {
    const scale = columnScale(numbers);
    const cells = numbers.map((x, k) => make("td", { class: `level${Math.abs(levels[k])}`, text: x ? scaled(x, { ...scale, decimals: Math.max(0, scale.decimals - 1) }) : "0" }));
    return make("tr", {}, make("th", { scope: "row", text: unitOf(scale, name) }), ...cells);
  };
  const swatches = values.map((x, k) => make("td", { class: `level${Math.abs(levels[k])}` },
    make("span", { class: `token swatch ${shade(x, largest)}`, text: x > 0 ? "▲" : x < 0 ? "▼" : " " })));
  return make("div", { class: "scroll" }, make("table", { class: "legend" },
    make("caption", { text: "Shading: ◂ lowers the entropy, raises it ▸" }),
    make("tbody", {}, make("tr", {}, make("td"), ...swatches),
      line("nats per unit lr", values), line("nats in this step", values.map((x) => x * run.lr)))));
}

function factsNode(run, evaluation, i) {
  const { influence, stderr } = run.evaluations[evaluation];
  const r = run.rollouts;
  const error = (x) => (x === null ? "" : ` ± ${precise(x, 2)}`);
  const facts = [
    ["influence, nats per unit lr", `${preciseSigned(influence[i], 4)}${error(stderr[i])}`],
    ["nats in this step", `${preciseSigned(influence[i] * run.lr, 4)}${error(stderr[i] === null ? null : stderr[i] * run.lr)}`],
    ["advantage", r.advantage[i] === null ? "—" : preciseSigned(r.advantage[i], 4)],
    ["reward", r.reward[i] === null ? "—" : precise(r.reward[i], 3)],
    ["tokens", `${r.length[i]}${r.finished[i] ? "" : ", truncated"}`],
    ["mean entropy", precise(r.mean_entropy[i], 4)],
    ["mean log π", precise(r.mean_logprob[i], 4)],
  ];
  if (r.source && r.source[i] !== null) facts.push(["source", excerpt(r.source[i])]);
  if (r.gradient_norm[i] !== null) facts.push(["gradient norm", precise(r.gradient_norm[i], 4)]);
  return make("dl", { class: "quantities" },
    ...facts.map(([name, text]) => make("div", {}, make("dt", { text: name }), make("dd", { text }))));
}

// Samples of one prompt are often equal; equal ones share a card.
function groupEqual(run, evaluation, others) {
  const { influence } = run.evaluations[evaluation];
  const groups = new Map();
  for (const i of others) {
    const key = JSON.stringify([run.rollouts.completion[i], run.rollouts.length[i], influence[i]]);
    groups.set(key, [...(groups.get(key) ?? []), i]);
  }
  return [...groups.values()];
}

function cardHead(run, evaluation, rollouts, open) {
  const buttons = rollouts.map((i) => {
    const text = excerpt(run.rollouts.id[i], 60);
    const button = make("button", { type: "button", class: "link", text, "aria-label": `Open rollout ${text}` });
    button.addEventListener("click", () => open(i));
    return button;
  });
  const advantage = run.rollouts.advantage[rollouts[0]];
  const words = [`influence ${preciseSigned(run.evaluations[evaluation].influence[rollouts[0]], 3)}`];
  if (advantage !== null) words.push(`advantage ${preciseSigned(advantage, 3)}`);
  return make("p", { class: "card-head" }, ...buttons, make("span", { text: words.join(", ") }));
}

function completionCard(run, i, tokens, largest, onToken, head) {
  const name = excerpt(run.rollouts.id[i], 60);
  const tokenNodes = tokenList(tokens, largest, `Tokens of rollout ${name}; arrow keys move between them`);
  followTokens(tokenNodes, tokens.texts.length, (k) => onToken(tokens, k));
  return make("div", { class: "card", "data-rollout": i }, ...head, tokenNodes.list);
}

function largestOf(lists) {
  let largest = 0;
  for (const { influence } of lists) for (const x of influence) largest = Math.max(largest, Math.abs(x));
  return largest;
}

async function affectedNode(run, evaluation, i) {
  if (!run.evaluations[evaluation].affected) return null;
  const { texts, rows, values } = await jsonOf(`affected-${evaluation}`);
  const scale = columnScale(values[i]);
  const step = columnScale(values[i].map((x) => x * run.lr));
  const lines = rows[i].map((a, k) => make("tr", {},
    make("td", { text: excerpt(texts[a].id, 40) }), make("td", { text: excerpt(texts[a].prompt) }),
    make("td", { text: excerpt(texts[a].completion, 300) }),
    make("td", { class: "n", text: scaled(values[i][k], scale) }),
    make("td", { class: "n", text: scaled(values[i][k] * run.lr, step) })));
  const titles = ["Rollout of E", "Prompt", "Completion", unitOf(scale, "nats per unit lr"), unitOf(step, "nats in this step")];
  const head = titles.map((text, k) => make("th", { scope: "col", class: k > 2 ? "n" : "", text }));
  return make("section", { class: "affected" },
    make("h4", { text: "The rollouts of E that it affects most" }),
    make("p", { class: "hint", text: `Its influence is the sum of terms over all ${run.evaluations[evaluation].rollouts} rollouts of E; these are the largest.` }),
    make("div", { class: "scroll" }, make("table", { class: "figures" }, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...lines))));
}

async function compareNode(run, { evaluation, rollout, runScale }, readout, open) {
  const others = run.siblings[run.rollouts.prompt[rollout]].filter((i) => i !== rollout);
  const groups = groupEqual(run, evaluation, others);
  const rollouts = [rollout, ...groups.map((equal) => equal[0])];
  const lists = await Promise.all(rollouts.map((i) => readTokens(run, i, evaluation)));
  const largest = runScale ? run.evaluations[evaluation].largest_token : largestOf(lists);
  const onToken = (tokens, k) => updateReadout(readout, run, tokens, k);
  const card = (k, head) => completionCard(run, rollouts[k], lists[k], largest, onToken, head);
  const beside = groups.map((equal, k) => card(k + 1, [cardHead(run, evaluation, equal, open)]));
  const heading = `${others.length} other completion${others.length === 1 ? "" : "s"} of this prompt`;
  const pair = make("div", { class: "compare" }, make("section", {}, make("h4", { text: "Completion" }), card(0, [])));
  if (others.length) pair.append(make("section", {}, make("h4", { text: heading }), make("div", { class: "beside" }, ...beside)));
  return [make("h4", { text: "Tokens" }), make("p", { class: "strip", text: STRIP }), legendNode(run, largest), readout, pair];
}

async function detailNodes(run, state, actions) {
  const { evaluation, rollout, runScale } = state;
  const { text, asked } = run.prompts[run.rollouts.prompt[rollout]];
  const compare = await compareNode(run, state, readoutNode(run), actions.open);
  const affected = await affectedNode(run, evaluation, rollout);
  return [titleNode(run, state, actions), factsNode(run, evaluation, rollout),
    make("h4", { text: "Prompt" }), ...promptNodes(text, asked), ...compare, ...(affected ? [affected] : [])];
}

// Of a conversation the user's last message, and folded what the policy read, with the marks of its template.
function promptNodes(text, asked) {
  const node = (shown, name) => appendVisible(make("pre", { class: "prompt", tabindex: "0", "aria-label": name }), shown);
  if (asked === text) return [node(text, "Prompt")];
  const folded = make("details", {}, make("summary", { text: "The prompt as the policy reads it" }), node(text, "Full prompt"));
  return [node(asked, "Prompt"), folded];
}

function titleNode(run, { rollout, evaluation, runScale }, { step, close, scale }) {
  const button = (text, label, act) => {
    const node = make("button", { type: "button", "aria-label": label, text });
    node.addEventListener("click", act);
    return node;
  };
  const choice = make("select", { id: "scale" },
    make("option", { value: "", text: "this prompt" }), make("option", { value: "run", text: "the whole run" }));
  choice.value = runScale ? "run" : "";
  choice.addEventListener("change", () => scale(choice.value === "run"));
  return make("header", {},
    make("h3", { id: "detail-title", tabindex: "-1", text: excerpt(run.rollouts.id[rollout], 80) }),
    make("a", { href: `#${addressOf({ rollout: run.rollouts.id[rollout], evaluation })}`, text: "Link to this rollout" }),
    make("label", {}, "Shading relative to", choice),
    button("‹", "Previous rollout of the table", () => step(-1)), button("›", "Next rollout of the table", () => step(1)),
    button("Close", "Close the rollout", close));
}
