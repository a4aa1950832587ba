// What a person does: begin, change, hold, record, compare, go back, replay.

import { $, app, ask, count, lead, make, save, setState, toast } from "./base.js";
import { Clip } from "./clip.js";
import { clock } from "./clock.js";
import { figures } from "./figures.js";
import { makeScript, scriptText } from "./script.js";
import { Stream } from "./stream.js";
import { timeline } from "./timeline.js";

const SEEDS = 4; // panes of layout "seeds"
export const LAYOUTS = {
  one: ["One", "One stream."],
  settings: ["Two settings", "One prompt and seed, side by side, each with settings of its own."],
  seeds: ["Four seeds", "One prompt with four seeds. Keep the one that you like."],
};
const LONGEST_WAIT_MS = 8000; // between two attempts to connect

export function sendAll(message) {
  return app.streams.map((stream) => stream.send(message)).some(Boolean);
}

// Begin anew, with a script or what the controls say.
export function openStreams(script = null) {
  for (const stream of app.streams) stream.close();
  app.streams = [];
  setRecording(false);
  setPaused(false, false);
  const { prompt, seed, steps } = app;
  timeline.begin(script ?? { prompt, seed, steps });
  app.streams = panes().map((pane, index) => {
    const isLive = app.models.find((model) => model.id === pane.model)?.live ?? true;
    return isLive ? new Stream(index, pane) : new Clip(index, pane);
  });
  $("stage").dataset.layout = app.layout;
  clock.reset();
  for (const stream of app.streams) stream.open();
  describe();
}

// What the panes of the layout have of their own.
function panes() {
  if (app.layout === "settings") return app.panes;
  if (app.layout === "one") return [{ model: app.model, steps: null }];
  return Array.from({ length: SEEDS }, (_, index) => (
    { model: app.model, steps: null, seed: timeline.script.seed + index }));
}

// Play the script of the timeline from its beginning.
export function replay() {
  const { prompt, seed, steps } = timeline.script;
  app.hold = $("hold").checked = false; // the script says the steps
  app.steps = steps;
  showSettings({ prompt, seed, steps: steps ?? app.info.steps });
  openStreams(makeScript(timeline.script));
}

let attempts = 0;
export function lost() {
  if (app.streams.some((stream) => stream.live && !stream.isClip)) return;
  setState("lost", "Connection lost");
  const wait = Math.min(LONGEST_WAIT_MS, 1000 * 2 ** attempts);
  attempts += 1;
  setTimeout(async () => {
    if (await isReady()) {
      attempts = 0;
      openStreams();
    } else lost();
  }, wait);
}

export async function isReady() {
  try {
    const reply = await fetch("/readyz");
    if (reply.status === 503) setState("connecting", "The model warms up");
    return reply.ok;
  } catch {
    return false;
  }
}

// ---------------------------------------------------------------- changes

export function showPrompt(prompt) {
  const text = prompt.trim();
  if (!text) return;
  $("prompt").value = text;
  app.prompt = text;
  if (!lead()?.live) {
    openStreams();
    return;
  }
  figures.asked();
  for (const stream of app.streams) {
    stream.send({ type: "session.bookmark", automatic: true });
    stream.send({ type: "session.prompt_update", prompt: text, mode: app.mode });
  }
  if (app.paused) setPaused(false);
  describe();
}

// What is in force now, as the server tells it, on the controls.
export function showSettings({ prompt, seed, steps }) {
  if (prompt !== undefined) {
    app.prompt = prompt;
    if (document.activeElement !== $("prompt")) $("prompt").value = prompt;
  }
  if (seed !== undefined && app.layout !== "seeds") {
    app.seed = seed;
    $("seed").value = seed;
  }
  const choice = document.querySelector(`#steps input[value="${steps}"]`);
  if (choice) choice.checked = true;
  describe();
}

export function describe() {
  for (const stream of app.streams) stream.label();
  if (lead()?.live) setState(app.paused ? "paused" : "live", app.paused ? "Paused" : "Live");
}

export function setPaused(paused, tell = true) {
  app.paused = paused;
  $("pause").setAttribute("aria-pressed", paused);
  $("pause").querySelector("span").textContent = paused ? "Resume" : "Pause";
  if (tell) sendAll({ type: paused ? "session.pause" : "session.resume" });
  describe();
}

export function setSteps(steps) {
  if (app.layout === "settings") return;
  app.steps = steps;
  showSettings({ steps });
  $("hold").checked = app.hold = false;
  sendAll({ type: "session.update", steps, hold_rate: false });
}

export function setSeed(seed) {
  app.seed = Math.max(0, Math.min(Number.MAX_SAFE_INTEGER, Math.floor(Number(seed) || 0)));
  $("seed").value = app.seed;
  if (app.layout === "seeds") openStreams();
  else sendAll({ type: "session.update", seed: app.seed });
}

export function startOver() {
  timeline.forget(0);
  sendAll({ type: "session.reset", seed: app.layout === "seeds" ? undefined : app.seed });
}

export function keepMoment() {
  sendAll({ type: "session.bookmark" });
}

// Go back to a bookmark, which all panes have at the same chunk.
export function branchTo(chunk) {
  timeline.forget(chunk);
  for (const stream of app.streams) {
    const moment = stream.momentBefore?.(chunk) ?? null;
    if (moment === null) continue;
    stream.send({ type: "session.branch", bookmark: stream.bookmarks.get(moment).number });
  }
}

// ---------------------------------------------------------------- one, two or four pictures

export function setLayout(layout) {
  app.layout = layout;
  document.querySelector(`#layout input[value="${layout}"]`).checked = true;
  $("layout-note").textContent = LAYOUTS[layout][1];
  for (const input of document.querySelectorAll("#steps input, #hold")) {
    input.disabled = layout === "settings";
  }
  if (layout === "settings") {
    const teacher = app.models.find((model) => !model.live);
    const steps = [Math.min(4, app.info.max_steps), 1];
    app.panes = [{ model: app.model, steps: steps[0] }, { model: app.model, steps: steps[1] }];
    if (teacher) app.panes[1].model = teacher.id;
  }
  openStreams(makeScript({ ...timeline.script, prompt: app.prompt, seed: app.seed, changes: [] }));
}

export function setModel(model) {
  app.model = model;
  if (app.layout === "settings") app.panes[0].model = model;
  openStreams();
}

// ---------------------------------------------------------------- begin from a picture or a clip

export async function beginFrom(file) {
  const form = new FormData();
  form.append("file", file);
  try {
    const start = await (await ask("/v1/starts", { method: "POST", body: form })).json();
    app.start = { id: start.id, name: file.name, kind: start.kind };
  } catch (error) {
    const lacking = error.status === 404 || error.status === 405;
    toast(lacking ? "This server can't begin from a picture or a clip." : error.message);
    return;
  }
  showStart();
  openStreams();
}

export function showStart() {
  $("start-name").textContent = app.start?.name ?? "";
  $("start").hidden = !app.start;
  $("choose-file").querySelector("span").textContent =
    app.start ? "Another picture or clip" : "A picture or a clip";
}

export function dropStart() {
  app.start = null;
  showStart();
  openStreams();
}

// ---------------------------------------------------------------- to keep

export function setRecording(recording) {
  app.recording = recording;
  $("record").setAttribute("aria-pressed", recording);
  $("record").querySelector("span").textContent = recording ? "Stop recording" : "Record";
}

export function toggleRecording() {
  if (app.recording) {
    sendAll({ type: "record.stop" });
    setRecording(false);
  } else sendAll({ type: "record.start", format: $("container").value });
}

// The script of the marks. Where nothing was edited it is the server's own, exact to the last digit.
export async function saveScript() {
  const own = await lead()?.fetchScript();
  if (!own) return;
  const { isEdited, next, script } = timeline;
  const isPlanned = script.changes.some((change) => change.at >= next);
  const start = own.match(/^start: (.+)$/m)?.[1];
  const { width, height } = lead().view.canvas;
  const text = isEdited || isPlanned
    ? scriptText(script, { height, width, numChunks: next, start }) : own;
  save(new Blob([text]), "stream.yaml");
}

export function addClip({ url, frames, format, script, command }) {
  const item = make("li");
  const seconds = (frames / timeline.fps).toFixed(1);
  item.append(make("span", "", `${seconds} s, ${count(frames, "frame")}, ${format}`));
  const buttons = make("div");
  const fetchButton = make("button", "quiet", "Download");
  fetchButton.onclick = async () => {
    try {
      save(await (await ask(url)).blob(), `streamvid.${format}`);
    } catch {
      toast("The recording is no longer on the server.");
    }
  };
  const scriptButton = make("button", "quiet", "Script");
  scriptButton.onclick = () => save(new Blob([script]), "stream.yaml");
  const copyButton = make("button", "quiet", "Copy command");
  copyButton.onclick = () => navigator.clipboard.writeText(command).then(
    () => toast("Copied. Run it beside the saved script."), () => toast(command));
  buttons.append(fetchButton, scriptButton, copyButton);
  const note = make("small", "", "With the script, this command makes the same clip again.");
  item.append(buttons, make("code", "", command), note);
  $("clips").prepend(item);
  setRecording(false);
}
