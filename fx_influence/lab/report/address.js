// The address of the page holds the opened rollout, the filters and the order, so that a link shows what its sender saw.

const FILTERS = ["search", "sign", "advantage", "prompt"];
const DEFAULT_SORT = "-size";
const WRITE_AFTER = 200;

// Parameters of an address; lone surrogates become U+FFFD, as in any address.
function addressOf({ rollout = null, filter = {}, sort = DEFAULT_SORT, evaluation = 0 }) {
  const fields = new URLSearchParams();
  if (rollout !== null) fields.set("rollout", rollout);
  for (const name of FILTERS) if (filter[name]) fields.set(name, filter[name]);
  if (sort !== DEFAULT_SORT) fields.set("sort", sort);
  if (evaluation) fields.set("evaluation", String(evaluation));
  return fields;
}

let writing = null;

// Written once nothing has changed for a moment: browsers limit how often a page may change its address.
function writeAddress(state) {
  clearTimeout(writing);
  writing = setTimeout(() => {
    const { run, rollout, filter, evaluation } = state;
    const sort = `${state.sort.descending ? "-" : ""}${state.sort.key}`;
    const fields = addressOf({ rollout: rollout === null ? null : run.rollouts.id[rollout], filter, sort, evaluation });
    history.replaceState(null, "", `#${fields}`);
  }, WRITE_AFTER);
}

// Sets the state to that of the address. Returns the rollout to open, or null; undefined for an address of another kind.
function readAddress(state) {
  const fields = new URLSearchParams(location.hash.slice(1));
  if (!["rollout", "sort", "evaluation", ...FILTERS].some((name) => fields.has(name))) return undefined;
  clearTimeout(writing);
  for (const name of FILTERS) {
    const field = document.getElementById(name);
    field.value = fields.get(name) ?? "";
    // An address may name a choice that this page does not have.
    if (field.selectedIndex === -1) field.value = "";
    state.filter[name] = field.value;
  }
  const sort = fields.get("sort") ?? DEFAULT_SORT;
  const key = sort.replace(/^-/, "");
  if (COLUMNS.some((column) => column.key === key)) state.sort = { key, descending: sort.startsWith("-") };
  const evaluation = Number(fields.get("evaluation") ?? 0);
  state.evaluation = evaluation in state.run.evaluations ? evaluation : 0;
  if (!fields.has("rollout")) return null;
  const name = fields.get("rollout");
  const rollout = state.run.rollouts.id.findIndex((id) => new URLSearchParams({ id }).get("id") === name);
  return rollout < 0 ? null : rollout;
}
