// The dialog in which a mark of the timeline is edited.

import { $, app, MODES, make } from "./base.js";
import { timeline } from "./timeline.js";

let edited = null; // a change, or null for the beginning of the script

export function openEditor(change) {
  edited = change;
  const kind = change?.kind ?? "begin";
  const isPrompt = kind === "prompt" || kind === "begin";
  const titles = {
    begin: "The beginning", prompt: "A new prompt", steps: "Other steps", seed: "Another seed",
  };
  $("editor-title").textContent = titles[kind];
  $("edit-prompt-row").hidden = !isPrompt;
  $("edit-mode-row").hidden = kind !== "prompt";
  $("edit-number-row").hidden = kind === "prompt";
  $("edit-at-row").hidden = kind === "begin";
  $("edit-remove").hidden = kind === "begin";
  $("edit-prompt").value = isPrompt ? (change?.value ?? timeline.script.prompt) : "";
  $("edit-prompt").required = isPrompt;
  $("edit-mode").value = change?.mode ?? app.mode;
  $("edit-number-name").textContent = kind === "steps" ? "Steps per chunk" : "Seed";
  $("edit-number").min = kind === "steps" ? 1 : 0;
  $("edit-number").max = kind === "steps" ? app.info.max_steps : Number.MAX_SAFE_INTEGER;
  $("edit-number").value = change?.value ?? timeline.script.seed;
  $("edit-at").min = (timeline.first ?? 0) + 1;
  $("edit-at").value = change?.at ?? 0;
  showTime();
  $("editor").returnValue = "";
  $("editor").showModal();
}

function showTime() {
  const chunk = Number($("edit-at").value);
  $("edit-at-time").textContent = `${timeline.secondsOf(chunk).toFixed(1)} s`;
}

function close() {
  const answer = $("editor").returnValue;
  if (answer === "remove") timeline.remove(edited);
  if (answer !== "save") return;
  const number = Math.floor(Number($("edit-number").value));
  const prompt = $("edit-prompt").value.trim();
  if (!edited) {
    Object.assign(timeline.script, { prompt, seed: number });
    timeline.render();
    return;
  }
  const value = edited.kind === "prompt" ? prompt : number;
  const mode = edited.kind === "prompt" ? { mode: $("edit-mode").value } : {};
  timeline.edit(edited, { value, ...mode, at: Math.floor(Number($("edit-at").value)) });
}

export function connectEditor() {
  for (const mode of app.info.modes) {
    const option = make("option", "", MODES[mode][0]);
    option.value = mode;
    $("edit-mode").append(option);
  }
  $("edit-prompt").maxLength = app.info.prompt_chars;
  $("edit-at").oninput = showTime;
  $("editor").onclose = close;
}
