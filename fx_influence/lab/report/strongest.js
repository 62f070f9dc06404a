// The first screen's rollouts: those that raise the entropy most and those that lower it most, each a link to itself.

const STRONGEST = 5;
const HEADS = [["Rollout", ""], ["", ""], ["std. error", ""], ["Prompt → completion", "t"]];

function strongestTable(run, evaluation, title, indices, scale) {
  const { influence, stderr, quantile } = run.evaluations[evaluation];
  const rows = indices.map((i) => {
    const value = influence[i] * run.lr;
    const error = stderr[i] === null ? null : stderr[i] * run.lr;
    const sure = isTold(influence[i], stderr[i], quantile);
    const link = make("a", { href: `#${addressOf({ rollout: run.rollouts.id[i], evaluation })}`, text: excerpt(run.rollouts.id[i], 40) });
    const prompt = run.prompts[run.rollouts.prompt[i]].asked;
    return make("tr", { class: sure ? "" : "unsure", "data-strongest": i },
      make("th", { scope: "row" }, link), make("td", { text: scaled(value, scale) }),
      make("td", { text: error === null ? "" : `± ${scaled(error, scale, false)}` }),
      make("td", { class: "t", text: `${excerpt(prompt, 80)} → ${excerpt(run.rollouts.completion[i], 80)}` }));
  });
  const heads = HEADS.map(([text, kind], k) => make("th", { scope: "col", class: kind, text: k === 1 ? unitOf(scale, "nats") : text }));
  return make("table", { class: "figures" }, make("caption", { text: title }),
    make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
}

// Fills the section of one E; the tables have one scale.
function fillStrongest(run, evaluation, node) {
  const { influence, stderr } = run.evaluations[evaluation];
  const order = influence.map((_, i) => i).sort((i, j) => influence[j] - influence[i] || i - j);
  const raising = order.filter((i) => influence[i] > 0).slice(0, STRONGEST);
  const lowering = order.filter((i) => influence[i] < 0).slice(-STRONGEST).reverse();
  const scale = columnScale([...raising, ...lowering].flatMap((i) => [influence[i] * run.lr, (stderr[i] ?? 0) * run.lr]));
  const tables = [["Rollouts that raise the entropy most", raising], ["Rollouts that lower the entropy most", lowering]]
    .filter(([, indices]) => indices.length)
    .map(([title, indices]) => strongestTable(run, evaluation, title, indices, scale));
  node.replaceChildren(...(tables.length ? tables : [make("p", { text: "No rollout moves the entropy in this step." })]));
}
