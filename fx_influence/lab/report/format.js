// Formats of texts and numbers. Texts of rollouts are untrusted: they only ever become text nodes.

const UNPRINTABLE = /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu;
const BLANKS = new Map([["\n", "↵"], ["\t", "⇥"]]);

function escaped(character) {
  const hex = character.codePointAt(0).toString(16);
  if (hex.length <= 2) return `\\x${hex.padStart(2, "0")}`;
  return hex.length <= 4 ? `\\u${hex.padStart(4, "0")}` : `\\U${hex.padStart(8, "0")}`;
}

function printable(text) {
  return text.replace(UNPRINTABLE, (c) => BLANKS.get(c) ?? escaped(c));
}

function excerpt(text, length = 120) {
  // Cut before escaping: a text may be of any length, and only its beginning is shown.
  return text.length > length ? `${printable(text.slice(0, length))}…` : printable(text);
}

function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "text") node.textContent = value;
    else if (name === "class") node.className = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function appendVisible(node, text) {
  let from = 0;
  for (const match of text.matchAll(UNPRINTABLE)) {
    const mark = BLANKS.get(match[0]) ?? escaped(match[0]);
    node.append(text.slice(from, match.index), make("span", { class: "mark", text: mark }));
    // The mark stands for the newline, which still breaks the line.
    if (match[0] === "\n") node.append("\n");
    from = match.index + match[0].length;
  }
  node.append(text.slice(from));
  return node;
}

function appendToken(node, text) {
  if (text === "") return appendMark(node, "∅");
  return /^ +$/.test(text) ? appendMark(node, "␣".repeat(text.length)) : appendVisible(node, text);
}

function appendMark(node, text) {
  node.append(make("span", { class: "mark", text }));
  return node;
}

function withSign(text) {
  return text.startsWith("-") ? `−${text.slice(1)}` : `+${text}`;
}

function precise(x, digits = 6) {
  if (x === null || Number.isNaN(x)) return "—";
  const magnitude = Math.abs(x);
  const text = x !== 0 && (magnitude < 1e-3 || magnitude >= 1e6) ? x.toExponential(digits - 1) : x.toPrecision(digits);
  return text.replace(/e([+-])(\d+)$/, "e$1$2").replaceAll("-", "−");
}

function preciseSigned(x, digits = 6) {
  const text = precise(x, digits);
  return x >= 0 ? `+${text}` : text;
}

function percent(x) {
  return Number.isFinite(x) ? `${(100 * x).toFixed(1)}%` : "—";
}

// One power of ten and one number of decimals for a whole column, so that its digits line up.
function columnScale(values) {
  const largest = values.reduce((max, x) => Math.max(max, Math.abs(x ?? 0)), 0);
  if (!largest) return { unit: 1, power: 0, decimals: 1 };
  const digits = Math.floor(Math.log10(largest));
  const power = digits >= -1 && digits < 4 ? 0 : 3 * Math.floor(digits / 3);
  return { unit: 10 ** power, power, decimals: Math.max(0, 3 - (digits - power)) };
}

function scaled(x, scale, sign = true) {
  if (x === null || Number.isNaN(x)) return "";
  const text = (x / scale.unit).toFixed(scale.decimals);
  return sign ? withSign(text) : text;
}

function unitOf(scale, name) {
  const digits = [...String(scale.power)].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("");
  return scale.power ? `10${digits} ${name}` : name;
}
