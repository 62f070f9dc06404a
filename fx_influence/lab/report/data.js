// Packed data of the page. Tokens are unpacked when a rollout is opened, one chunk of rollouts at a time.

const CACHED_CHUNKS = 8;

async function unpack(id) {
  const text = document.getElementById(id).textContent;
  const bytes = Uint8Array.fromBase64
    ? Uint8Array.fromBase64(text)
    : Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

async function unpackJson(id) {
  return JSON.parse(new TextDecoder().decode(await unpack(id)));
}

// Caches the last ``limit`` results of ``read``; a Map iterates in order of insertion, so its first key is the oldest.
function cached(read, limit) {
  const cache = new Map();
  return (id) => {
    const result = cache.get(id) ?? read(id);
    cache.delete(id);
    cache.set(id, result);
    if (cache.size > limit) cache.delete(cache.keys().next().value);
    return result;
  };
}

const chunkOf = cached(unpack, CACHED_CHUNKS);
const jsonOf = cached(unpackJson, CACHED_CHUNKS);

async function readRun() {
  const run = await jsonOf("index");
  const siblings = run.prompts.map(() => []);
  run.rollouts.prompt.forEach((prompt, i) => siblings[prompt].push(i));
  return { ...run, siblings, count: run.rollouts.id.length };
}

// The chunk of a rollout, its first token in the chunk, and the number of tokens of the chunk.
function chunkPosition(run, i) {
  const chunk = run.chunks.findLastIndex((first) => first <= i);
  const end = run.chunks[chunk + 1] ?? run.count;
  const sum = (from, to) => run.rollouts.length.slice(from, to).reduce((a, b) => a + b, 0);
  return { chunk, offset: sum(run.chunks[chunk], i), total: sum(run.chunks[chunk], end) };
}

// The tokens of a rollout: texts, values under the policy, and influence on E.
async function readTokens(run, i, evaluation) {
  const { chunk, offset, total } = chunkPosition(run, i);
  const [vocabulary, values, influences] = await Promise.all([
    jsonOf("vocabulary"),
    chunkOf(`tokens-${chunk}`),
    chunkOf(`influence-${evaluation}-${chunk}`),
  ]);
  const length = run.rollouts.length[i];
  const column = (k) => new Float32Array(values, 4 * (k * total + offset), length);
  return {
    texts: Array.from(new Uint32Array(values, 4 * offset, length), (number) => vocabulary[number]),
    logprob: column(1),
    entropy: column(2),
    coefficient: column(3),
    entropyCoefficient: run.values > 3 ? column(4) : null,
    influence: new Float32Array(influences, 4 * offset, length),
  };
}
