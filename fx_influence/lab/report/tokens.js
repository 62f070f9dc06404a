// A completion with every token shaded by its influence.

const LEVELS = 5;
const BLOCK = 200;
const AHEAD = "200px";

// Functions that make all blocks of a list, for printing, where nothing scrolls into view.
const completers = new WeakMap();

// Levels are equidistant in the square root: influences are heavy-tailed, and a linear scale would show few tokens.
function levelOf(x, largest) {
  return largest ? Math.round(LEVELS * Math.sqrt(Math.min(1, Math.abs(x) / largest))) : 0;
}

function shade(x, largest) {
  const level = levelOf(x, largest);
  return level ? `${x > 0 ? "up" : "down"} l${level}` : "l0";
}

function tokenNode(tokens, k, largest) {
  const unscored = Number.isNaN(tokens.logprob[k]) && tokens.influence[k] === 0 ? " unscored" : "";
  const node = make("span", { class: `token ${shade(tokens.influence[k], largest)}${unscored}`, "data-k": k });
  return appendToken(node, tokens.texts[k]);
}

// Blocks of tokens are made when they are about to scroll into view.
function tokenList(tokens, largest, label) {
  const list = make("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": label });
  const end = make("span", { class: "end" });
  list.append(end);
  let made = 0;
  const grow = (until) => {
    while (made < Math.min(until, tokens.texts.length)) {
      const stop = Math.min(made + BLOCK, tokens.texts.length);
      const nodes = [];
      for (; made < stop; made += 1) nodes.push(tokenNode(tokens, made, largest));
      end.before(...nodes);
    }
    if (made === tokens.texts.length) end.remove();
  };
  grow(1);
  const watch = new IntersectionObserver((seen) => {
    if (!seen.some((entry) => entry.isIntersecting)) return;
    grow(made + 1);
    // Observe again, because an end that stays in view is not reported twice.
    watch.unobserve(end);
    if (end.isConnected) watch.observe(end);
  }, { root: list, rootMargin: AHEAD });
  watch.observe(end);
  completers.set(list, () => grow(Infinity));
  return { list, grow };
}

const MOVES = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };

// Calls onToken(k) for the token under the pointer, or under the cursor that the arrow keys move.
function followTokens({ list, grow }, count, onToken) {
  let position = -1;
  const go = (k, byKey) => {
    grow(k + 1);
    list.querySelector(".current")?.classList.remove("current");
    position = k;
    const node = list.querySelector(`[data-k="${k}"]`);
    node.classList.add("current");
    if (byKey) node.scrollIntoView({ block: "nearest" });
    onToken(k);
  };
  list.addEventListener("pointerover", (event) => {
    const node = event.target.closest("[data-k]");
    if (node) go(Number(node.dataset.k), false);
  });
  list.addEventListener("keydown", (event) => {
    if (!(event.key in MOVES) || !count) return;
    event.preventDefault();
    go(Math.max(0, Math.min(count - 1, position + MOVES[event.key])), true);
  });
}
