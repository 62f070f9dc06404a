// The packed data of the page. Tokens are unpacked when a rollout is opened, a chunk of rollouts at a time.

const KEPT_CHUNKS = 8;

async function unpacked(id) {
  const text = document.getElementById(id).textContent;
  const bytes = Uint8Array.fromBase64
    ? Uint8Array.fromBase64(text)
    : Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

async function unpackedJson(id) {
  return JSON.parse(new TextDecoder().decode(await unpacked(id)));
}

function remembered(read, limit) {
  const kept = new Map();
  return (id) => {
    const found = kept.get(id) ?? read(id);
    kept.delete(id);
    kept.set(id, found);
    if (kept.size > limit) kept.delete(kept.keys().next().value);
    return found;
  };
}

const chunkOf = remembered(unpacked, KEPT_CHUNKS);
const jsonOf = remembered(unpackedJson, KEPT_CHUNKS);

async function readRun() {
  const run = await jsonOf("index");
  const siblings = run.prompts.map(() => []);
  run.rollouts.prompt.forEach((prompt, i) => siblings[prompt].push(i));
  return { ...run, siblings, count: run.rollouts.id.length };
}

function placeOf(run, i) {
  const chunk = run.chunks.findLastIndex((first) => first <= i);
  const end = run.chunks[chunk + 1] ?? run.count;
  const sum = (from, to) => run.rollouts.length.slice(from, to).reduce((a, b) => a + b, 0);
  return { chunk, offset: sum(run.chunks[chunk], i), total: sum(run.chunks[chunk], end) };
}

// Of one rollout: its tokens' texts, what the policy gives them, and their shares of its influence on E.
async function readTokens(run, i, evaluation) {
  const { chunk, offset, total } = placeOf(run, i);
  const [vocabulary, values, shares] = await Promise.all([
    jsonOf("vocabulary"),
    chunkOf(`tokens-${chunk}`),
    chunkOf(`influence-${evaluation}-${chunk}`),
  ]);
  const length = run.rollouts.length[i];
  const part = (k) => new Float32Array(values, 4 * (k * total + offset), length);
  return {
    texts: Array.from(new Uint32Array(values, 4 * offset, length), (number) => vocabulary[number]),
    logprob: part(1),
    entropy: part(2),
    coefficient: part(3),
    entropyCoefficient: run.values > 3 ? part(4) : null,
    influence: new Float32Array(shares, 4 * offset, length),
  };
}
