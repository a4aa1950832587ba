// A script: how a stream begins, and what changes at which chunk.
//
// {prompt, seed, steps, changes: [{id, at, kind, value, mode}]}; kind is "prompt", "steps" or
// "seed", mode belongs to prompts.

let lastId = 0;

export function makeScript({ prompt, seed, steps = null, changes = [] }) {
  return { prompt, seed, steps, changes: changes.map((change) => ({ ...change })) };
}

export function makeChange(change) {
  lastId += 1;
  return { ...change, id: lastId };
}

export function inOrder(changes) {
  return [...changes].sort((a, b) => a.at - b.at || a.id - b.id);
}

// What a change is called in messages and in script files.
export function fieldsOf(change) {
  if (change.kind === "prompt") return { prompt: change.value, mode: change.mode };
  return { [change.kind]: change.value };
}

// The changes with one more; of one kind at one chunk the later one counts.
export function place(changes, change) {
  const same = (other) => other.at === change.at && other.kind === change.kind;
  return [...changes.filter((other) => other !== change && !same(other)), change];
}

// The changes before a chunk, to be compared.
export function partBefore(script, chunk) {
  const { prompt, seed, steps } = script;
  const part = inOrder(script.changes).filter((change) => change.at < chunk);
  const told = part.map((change) => JSON.stringify([change.at, fieldsOf(change)])).sort();
  return JSON.stringify([prompt, seed, steps, told]);
}

// The file that `streamvid sample --script` plays; texts are quoted as in JSON, which YAML reads.
export function scriptText(script, { height, width, numChunks, start }) {
  const head = { prompt: script.prompt, height, width, seed: script.seed };
  if (script.steps !== null) head.steps = script.steps;
  if (start) head.start = start;
  const last = Math.max(0, ...script.changes.map((change) => change.at));
  head.num_chunks = Math.max(numChunks, last + 1);
  const byChunk = new Map();
  for (const change of inOrder(script.changes)) {
    byChunk.set(change.at, { ...byChunk.get(change.at), ...fieldsOf(change) });
  }
  const pairs = (fields) =>
    Object.entries(fields).map(([name, value]) => `${name}: ${JSON.stringify(value)}`);
  const lines = pairs(head);
  if (byChunk.size) lines.push("changes:");
  for (const [at, fields] of byChunk) lines.push(`- {${pairs({ at, ...fields }).join(", ")}}`);
  return `${lines.join("\n")}\n`;
}
