// What all parts of the page share: its state, and small helpers.

export const COLOURS = {
  red: "#e0564b", green: "#3ca65a", blue: "#4c6ef0", yellow: "#d9b01f", purple: "#a25ad4",
  white: "#a9adba",
};
const PALETTE = ["#4c6ef0", "#3ca65a", "#d98a1f", "#a25ad4", "#d1567f", "#2f9fb0"];
export const MODES = {
  cut: ["Cut", "The new prompt counts from the next chunk on; what is on the picture stays as it was drawn."],
  blend: ["Blend", "The old prompt turns into the new one over three chunks."],
  recache: ["Refresh", "The last second is read again under the new prompt, so the stream turns sooner."],
  hard: ["New scene", "Everything before is forgotten."],
};

export const $ = (id) => document.getElementById(id);

export const app = {
  info: null,
  models: [], // as GET /v1/models lists them
  token: "",
  model: null, // id of the student of a single stream
  prompt: "",
  seed: 0,
  steps: null, // per chunk; null is the student's own number
  mode: "cut",
  hold: false,
  layout: "one", // or "settings", two panes with their own, or "seeds", four panes
  panes: [], // {model, steps} of layout "settings"
  start: null, // {id, name, kind} of the picture or clip that streams begin from
  paused: false,
  recording: false,
  crisp: null, // whether pixels are seen; null is for small frames only
  streams: [],
};

// The stream that timeline and figures follow.
export const lead = () => app.streams[0];

export function percentile(values, share) {
  if (!values.length) return 0;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

export function milliseconds(value) {
  return value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`;
}

export const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;

export function hueOf(prompt) {
  const named = Object.keys(COLOURS).find((word) => new RegExp(`\\b${word}\\b`).test(prompt));
  if (named) return COLOURS[named];
  let sum = 0;
  for (const letter of prompt) sum = (sum * 31 + letter.codePointAt(0)) % 997;
  return PALETTE[sum % PALETTE.length];
}

export function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

export function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

// A row of choices of which one is taken: [value, text] each.
export function segments(box, name, choices, chosen, changed) {
  for (const [value, text] of choices) {
    const label = make("label");
    const input = make("input");
    Object.assign(input, { type: "radio", name, value, checked: String(value) === String(chosen) });
    input.addEventListener("change", () => changed(value));
    label.append(input, text);
    box.append(label);
  }
  return box;
}

export function stepChoices() {
  const offered = [1, 2, 3, 4].filter((steps) => steps <= app.info.max_steps);
  return offered.map((steps) => [steps, String(steps)]);
}

let toastTimer = 0;
export function toast(text) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => ($("toast").hidden = true), 5000);
}

export function setState(state, text) {
  $("state").dataset.state = state;
  if ($("state-text").textContent !== text) $("state-text").textContent = text;
}

// Ask the server for something; an Error in the server's words if it refuses.
export async function ask(url, options = {}) {
  const headers = { ...options.headers };
  if (app.token) headers.authorization = `Bearer ${app.token}`;
  const reply = await fetch(url, { ...options, headers });
  if (reply.ok) return reply;
  const body = await reply.json().catch(() => ({}));
  const error = new Error(body.error?.message ?? `the server says ${reply.status}`);
  error.status = reply.status;
  throw error;
}

export function save(blob, name) {
  const link = make("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
