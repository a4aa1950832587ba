// The page of a server: begins the stream and connects the controls.
//
// base.js has state and helpers; stream.js a live stream, clip.js a teacher's clip, view.js the
// pane of either; clock.js when frames are shown; timeline.js, script.js and editor.js the script
// that the marks are; figures.js what it costs; steering.js what a person does.

import { $, app, ask, COLOURS, make, MODES, segments, setState, stepChoices, toast } from "./base.js";
import { clock } from "./clock.js";
import { connectEditor } from "./editor.js";
import { figures } from "./figures.js";
import {
  beginFrom, dropStart, isReady, keepMoment, LAYOUTS, openStreams, replay, saveScript, sendAll,
  setLayout, setModel, setPaused, setSeed, setSteps, showPrompt, startOver, toggleRecording,
} from "./steering.js";
import { timeline } from "./timeline.js";
import { fitView, toggleCrisp } from "./view.js";

const LONGEST_SEED = 10_000; // of those that the dice throws

const otherLayout = (layout) => setLayout(app.layout === layout ? "one" : layout);
const KEYS = {
  "/": () => $("prompt").select(),
  " ": () => setPaused(!app.paused),
  r: startOver,
  e: replay,
  b: keepMoment,
  c: () => otherLayout("settings"),
  g: () => otherLayout("seeds"),
  d: () => setSeed(Math.floor(Math.random() * LONGEST_SEED)),
  v: toggleRecording,
  p: toggleCrisp,
  t: () => setTheme(isDark() ? "light" : "dark"),
  "?": () => $("keys").showModal(),
  1: () => setSteps(1), 2: () => setSteps(2), 3: () => setSteps(3), 4: () => setSteps(4),
};

function setMode(mode) {
  app.mode = mode;
  $("mode-note").textContent = MODES[mode][1];
}

function showExamples() {
  const shuffled = [...app.info.examples].sort(() => Math.random() - 0.5).slice(0, 10);
  const picks = shuffled.sort((a, b) => a.length - b.length).slice(0, 4); // short ones fit
  const chips = picks.map((example) => {
    const chip = make("button", "chip");
    chip.type = "button";
    chip.title = example;
    for (const word of example.split(" ")) {
      if (!COLOURS[word]) continue;
      const dot = make("i");
      dot.style.background = COLOURS[word];
      chip.append(dot);
    }
    chip.append(example);
    chip.onclick = () => showPrompt(example);
    return chip;
  });
  $("examples").replaceChildren(...chips);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
  if (figures.chunks.length) figures.plot();
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// ---------------------------------------------------------------- controls

function connectControls() {
  $("prompt-form").addEventListener("submit", (event) => {
    event.preventDefault();
    showPrompt($("prompt").value);
  });
  $("prompt").maxLength = app.info.prompt_chars;
  $("pause").onclick = () => setPaused(!app.paused);
  $("reset").onclick = startOver;
  $("bookmark").onclick = keepMoment;
  $("record").onclick = toggleRecording;
  $("script").onclick = saveScript;
  $("replay").onclick = replay;
  $("discard").onclick = () => timeline.discard();
  $("hold").onchange = (event) => {
    app.hold = event.target.checked;
    sendAll({ type: "session.update", hold_rate: app.hold });
  };
  $("seed").onchange = (event) => setSeed(event.target.value);
  $("dice").onclick = KEYS.d;
  $("theme").onclick = KEYS.t;
  $("help").onclick = KEYS["?"];
  $("shuffle").onclick = showExamples;
  const steps = app.steps ?? app.info.steps;
  segments($("steps"), "steps", stepChoices(), steps, (chosen) => setSteps(Number(chosen)));
  segments($("mode"), "mode", app.info.modes.map((mode) => [mode, MODES[mode][0]]), app.mode, setMode);
  setMode(app.mode);
  const layouts = Object.entries(LAYOUTS).map(([layout, [name]]) => [layout, name]);
  segments($("layout"), "layout", layouts, app.layout, (layout) => setLayout(layout));
  connectModels();
  connectFiles();
  connectEditor();
  timeline.connect();
  document.addEventListener("keydown", press);
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) app.streams.forEach((stream) => stream.catchUp());
  });
  addEventListener("resize", () => {
    app.streams.forEach(fitView);
    figures.plot();
    timeline.layOut();
  });
  setInterval(() => figures.rate(), 500);
}

function press(event) {
  const typing = event.target.closest("input:not([type=radio], [type=checkbox]), select, dialog");
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " " && event.target.closest("button, input")) return;
  const act = KEYS[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
}

function connectModels() {
  const students = app.models.filter((model) => model.live);
  $("models").hidden = students.length < 2;
  for (const model of students) {
    const option = make("option", "", model.id);
    option.value = model.id;
    $("model-choice").append(option);
  }
  $("model-choice").onchange = (event) => setModel(event.target.value);
}

// A file is chosen with the button, or dropped anywhere on the page.
function connectFiles() {
  $("file").accept = app.info.start_types?.join(",") ?? "image/*,video/*";
  $("choose-file").onclick = () => $("file").click();
  $("drop-start").onclick = dropStart;
  $("file").onchange = ({ target }) => {
    if (target.files.length) beginFrom(target.files[0]);
    target.value = "";
  };
  let inside = 0; // enter and leave come for each element that is crossed
  const show = () => ($("drop").hidden = inside === 0);
  addEventListener("dragenter", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    inside += 1;
    show();
  });
  addEventListener("dragleave", () => {
    inside = Math.max(0, inside - 1);
    show();
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    inside = 0;
    show();
    const file = event.dataTransfer?.files[0];
    if (file) beginFrom(file);
  });
}

// ---------------------------------------------------------------- the beginning

function readToken() {
  app.token = new URLSearchParams(location.hash.slice(1)).get("token")
    ?? sessionStorage.getItem("token") ?? "";
  if (!app.token) return;
  sessionStorage.setItem("token", app.token);
  history.replaceState(null, "", location.pathname);
}

async function readModels() {
  try {
    app.models = (await (await ask("/v1/models")).json()).data;
  } catch {
    app.models = []; // a server of one model
  }
  app.model = app.models.find((model) => model.live)?.id ?? app.info.model;
}

async function begin() {
  const theme = localStorage.getItem("theme");
  if (theme) document.documentElement.dataset.theme = theme;
  readToken();
  while (!(await isReady())) await new Promise((resolve) => setTimeout(resolve, 700));
  try {
    app.info = await (await ask("/v1/info")).json();
  } catch (error) {
    setState("lost", error.status === 401 ? "A token is needed" : "No answer");
    toast(error.status === 401
      ? "This server needs a token: add #token=... to the address." : error.message);
    return;
  }
  await readModels();
  app.mode = app.info.default_mode;
  timeline.fps = app.info.fps;
  const device = app.info.device === "cpu" ? "the CPU" : app.info.device;
  $("model").textContent = `${app.info.model} on ${device}`;
  const asked = new URLSearchParams(location.search);
  app.prompt = asked.get("prompt") ?? app.info.examples[0] ?? "";
  app.seed = Math.max(0, Math.floor(Number(asked.get("seed")) || 0));
  $("seed").value = app.seed;
  $("prompt").value = app.prompt;
  connectControls();
  showExamples();
  requestAnimationFrame((now) => clock.tick(now));
  if (app.prompt) openStreams();
}

begin();
