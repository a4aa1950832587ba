// The timeline: what has been played, and the script that its marks are.
//
// Marks are the changes of the script. They can be moved to another chunk, edited and removed; where
// what was played differs from the script, a replay plays it from its beginning. The film strip
// leads back: a click goes to the nearest bookmark before it.

import { $, app, count, hueOf, icon, lead, make, toast } from "./base.js";
import { openEditor } from "./editor.js";
import { makeChange, makeScript, partBefore, place } from "./script.js";
import { branchTo } from "./steering.js";

const SHOWN_S = 60; // at most
const LEAST_S = 20;
const THUMB = 64; // pixels of height that a small picture is kept with
const STRIP = 38; // and shown with
const PICTURE_EVERY = 6; // frames
const DRAG_PX = 4; // a pointer that moves less has clicked
const GAP_PX = 4; // between marks
const ICONS = {
  begin: "M7 5v14l11-7z", prompt: "M5 6h14M5 11h14M5 16h8", steps: "M4 20h5v-5h5v-5h5V5",
  seed: "M12 4v4M12 16v4M4 12h4M16 12h4",
};

export const timeline = {
  fps: 16,
  first: null, // number of the first chunk; not 0 for a stream that goes on from a clip
  starts: [], // first frame of each chunk that was made
  length: 0, // frames made
  pictures: [], // {frame, canvas}
  script: makeScript({ prompt: "", seed: 0 }),
  played: makeScript({ prompt: "", seed: 0 }),
  marks: new Map(), // id -> element
  cursor: null, // chunk of the moment that would be gone back to
  dragging: null, // the change that is moved now

  // ---- what the stream tells

  begin(script) {
    this.first = null;
    this.starts = [];
    this.length = 0;
    this.pictures = [];
    this.cursor = null;
    $("timeline").dataset.chunks = 0;
    this.script = makeScript(script);
    this.played = makeScript({ ...script, changes: [] });
    this.render();
  },

  begun({ prompt, seed, fps }) {
    this.fps = fps;
    Object.assign(this.played, { prompt, seed, steps: this.script.steps });
    this.render();
  },

  // Chunk: {chunk, frames}, announced by the server before its frames.
  grow({ chunk, frames }) {
    this.first ??= chunk;
    this.starts.push(this.length);
    this.length += frames;
    $("timeline").dataset.chunks = this.starts.length;
    this.layOut();
  },

  // A change has been made: {at, kind, value, mode}.
  note(change) {
    const same = (other) => other.at === change.at && other.kind === change.kind;
    const known = this.script.changes.find(same);
    const noted = known ? Object.assign(known, change) : makeChange(change);
    if (!known) this.script.changes = place(this.script.changes, noted);
    this.played.changes = place(this.played.changes, { ...noted });
    this.render();
  },

  // The stream goes on from before a chunk; what came after is forgotten.
  goBack(chunk) {
    const kept = chunk - this.first;
    this.length = this.starts[kept] ?? this.length;
    this.starts = this.starts.slice(0, kept);
    this.pictures = this.pictures.filter((picture) => picture.frame < this.length);
    this.cursor = null;
    this.forget(chunk);
  },

  forget(chunk) {
    for (const script of [this.script, this.played]) {
      script.changes = script.changes.filter((change) => change.at < chunk);
    }
    this.render();
  },

  // A small picture of every few frames that are shown.
  picture(bitmap) {
    const frame = this.shown;
    if (frame - (this.pictures.at(-1)?.frame ?? -Infinity) < PICTURE_EVERY) return;
    const canvas = new OffscreenCanvas((THUMB * bitmap.width) / bitmap.height, THUMB);
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    this.pictures.push({ frame, canvas });
    if (this.pictures.length > (SHOWN_S * this.fps) / PICTURE_EVERY) this.pictures.shift();
  },

  // ---- frames, chunks and places

  get shown() {
    return this.length - (lead()?.queue.length ?? 0);
  },

  // Frames shown since the prompt on the picture began.
  shownOfPrompt() {
    const begun = this.played.changes.filter((change) => change.kind === "prompt")
      .map((change) => this.frameOf(change.at)).filter((frame) => frame <= this.shown);
    return this.shown - Math.max(0, ...begun);
  },

  get next() {
    return (this.first ?? 0) + this.starts.length;
  },

  frameOf(chunk) {
    const index = chunk - (this.first ?? 0);
    if (index < this.starts.length) return this.starts[Math.max(0, index)];
    return this.length + (index - this.starts.length) * app.info.chunk_frames;
  },

  // The chunk whose beginning is nearest to a frame.
  chunkAt(frame) {
    const ahead = Math.round(Math.max(0, frame - this.length) / app.info.chunk_frames);
    if (frame >= this.length) return this.next + ahead;
    const distance = (start) => Math.abs(start - frame);
    const starts = [...this.starts, this.length];
    const nearest = starts.reduce((best, start) => (distance(start) < distance(best) ? start : best));
    return (this.first ?? 0) + starts.indexOf(nearest);
  },

  secondsOf(chunk) {
    return this.frameOf(chunk) / this.fps;
  },

  // Frames that the track shows: {from, width}.
  get window() {
    const last = Math.max(0, ...this.script.changes.map((change) => this.frameOf(change.at)));
    const end = Math.max(1.15 * this.length, last + 3 * app.info.chunk_frames);
    const width = Math.max(LEAST_S * this.fps, Math.min(SHOWN_S * this.fps, end));
    return { from: Math.max(0, this.length - SHOWN_S * this.fps), width };
  },

  place(frame) {
    const { from, width } = this.window;
    return (100 * (frame - from)) / width; // percent
  },

  frameAtPointer(event) {
    const box = $("track").getBoundingClientRect();
    const { from, width } = this.window;
    return from + (width * (event.clientX - box.left)) / box.width;
  },

  // ---- edits

  get isEdited() {
    return partBefore(this.script, this.next) !== partBefore(this.played, this.next);
  },

  // Whether the server has been told of a change that it has not made yet.
  isUnderWay(change) {
    return Boolean(lead()?.live) && change.at >= this.next && change.at <= lead().told;
  },

  // Move or alter a change; into the past it waits for a replay, into the future it is planned.
  edit(change, values) {
    if (this.isUnderWay(change)) {
      toast("This change is about to be made; move it in a moment.");
      return;
    }
    const told = lead()?.live ? lead().told : -1;
    let at = Math.max((this.first ?? 0) + 1, values.at ?? change.at);
    if (at >= this.next && at <= told) at = told + 1;
    Object.assign(change, values, { at });
    this.script.changes = place(this.script.changes, change);
    this.render();
  },

  remove(change) {
    if (this.isUnderWay(change)) {
      toast("This change is about to be made; remove it in a moment.");
      return;
    }
    this.script.changes = this.script.changes.filter((other) => other !== change);
    this.render();
  },

  discard() {
    const ahead = this.script.changes.filter((change) => change.at >= this.next);
    const past = this.played.changes.filter((change) => change.at < this.next);
    const { prompt, seed, steps } = this.played;
    this.script = makeScript({ prompt, seed, steps, changes: [...past, ...ahead] });
    this.render();
  },

  // ---- drawing

  // Marks are made anew only where the script has changed, so that the one in hand stays.
  render() {
    const begin = { id: 0, kind: "begin" };
    const shown = [begin, ...this.script.changes];
    for (const [id, element] of this.marks) {
      if (shown.some((change) => change.id === id)) continue;
      element.remove();
      this.marks.delete(id);
    }
    for (const change of shown) {
      let element = this.marks.get(change.id);
      if (!element) {
        element = this.makeMark(change.id);
        this.marks.set(change.id, element);
        $("marks").append(element);
      }
      this.nameMark(element, change);
    }
    this.layOut();
  },

  findChange(id) {
    return this.script.changes.find((change) => change.id === id);
  },

  makeMark(id) {
    const element = make("button", "mark");
    element.type = "button";
    element.dataset.id = id;
    let grabbed = null; // where the pointer went down
    element.onpointerdown = (event) => {
      grabbed = { x: event.clientX, moved: false };
      element.setPointerCapture(event.pointerId);
    };
    element.onpointermove = (event) => {
      const change = this.findChange(id);
      if (!grabbed || !change) return;
      if (!grabbed.moved && Math.abs(event.clientX - grabbed.x) < DRAG_PX) return;
      if (this.isUnderWay(change)) return;
      grabbed.moved = true;
      this.dragging = { change, chunk: this.chunkAt(this.frameAtPointer(event)) };
      element.dataset.dragged = "yes";
      this.layOut();
    };
    const letGo = (keep) => {
      const drag = this.dragging;
      this.dragging = null;
      delete element.dataset.dragged;
      const moved = grabbed?.moved;
      grabbed = null;
      if (moved && keep && drag) this.edit(drag.change, { at: drag.chunk });
      else this.layOut();
      return moved;
    };
    let justMoved = false; // the click that ends a drag is none
    element.onpointerup = () => (justMoved = letGo(true));
    element.onpointercancel = () => letGo(false);
    element.onclick = () => {
      if (!justMoved) openEditor(this.findChange(id) ?? null);
      justMoved = false;
    };
    element.onkeydown = (event) => {
      const change = this.findChange(id);
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!change) return;
      if (step) this.edit(change, { at: change.at + step });
      else if (event.key === "Delete" || event.key === "Backspace") this.remove(change);
      else return;
      event.preventDefault();
      event.stopPropagation();
    };
    return element;
  },

  nameMark(element, change) {
    const { kind, value } = change;
    const text = {
      begin: `seed ${this.script.seed}`, prompt: "prompt", steps: count(value, "step"),
      seed: `seed ${value}`,
    }[kind];
    const named = JSON.stringify([kind, value, change.mode, this.script.seed, this.script.prompt]);
    if (element.dataset.named === named) return;
    element.dataset.named = named;
    element.dataset.kind = kind;
    element.style.setProperty("--hue", kind === "prompt" ? hueOf(value) : "var(--soft)");
    element.replaceChildren(icon(ICONS[kind]), make("span", "", text));
    element.title = kind === "prompt" ? value : text;
  },

  layOut() {
    const track = $("track");
    const { changes } = this.script;
    const wide = track.clientWidth / 100;
    const moved = this.dragging;
    const chunkOf = (change) => (moved?.change === change ? moved.chunk : change.at);
    let free = 0;
    const placed = [...changes].sort((a, b) => chunkOf(a) - chunkOf(b));
    const begin = this.marks.get(0);
    const items = placed.map((change) => [this.marks.get(change.id), chunkOf(change), change]);
    const stems = [];
    const { from } = this.window;
    begin.hidden = from > 0;
    begin.style.left = "0px";
    begin.setAttribute("aria-label",
      `Begins with seed ${this.script.seed} and “${this.script.prompt}”. Enter edits it.`);
    if (!begin.hidden) free = begin.offsetWidth + GAP_PX;
    for (const [element, chunk, change] of items) {
      const exact = this.place(this.frameOf(chunk)) * wide;
      element.hidden = exact < 0;
      if (element.hidden) continue;
      const left = moved?.change === change ? exact : Math.max(exact, free);
      element.style.left = `${left}px`;
      free = Math.max(free, left + element.offsetWidth + GAP_PX);
      element.dataset.at = chunk;
      element.dataset.ahead = chunk >= this.next ? "yes" : "no";
      const seconds = this.secondsOf(chunk).toFixed(1);
      const what = { prompt: `Prompt “${change.value}”`, steps: count(change.value, "step"),
        seed: `Seed ${change.value}` }[change.kind];
      element.setAttribute("aria-label",
        `${what} at ${seconds} seconds. Arrow keys move it, Enter edits it, Delete removes it.`);
      const stem = make("i", "stem");
      stem.style.left = `${exact}px`;
      stems.push(stem);
    }
    this.layOutSpans(placed.filter((change) => change.kind === "prompt"), chunkOf, stems);
    this.layOutMoments();
    this.drawStrip();
    this.moveHead();
    this.describe();
  },

  // The prompts, each over the chunks that it makes; what is planned is pale.
  layOutSpans(switches, chunkOf, stems) {
    const begins = [
      { frame: 0, prompt: this.script.prompt },
      ...switches.map((change) => ({ frame: this.frameOf(chunkOf(change)), prompt: change.value })),
    ];
    const made = Math.max(this.length, 1);
    const { from, width } = this.window;
    const items = [];
    begins.forEach(({ frame, prompt }, index) => {
      const isPlanned = frame >= made;
      const last = index + 1 === begins.length;
      const end = begins[index + 1]?.frame ?? (isPlanned ? from + width : Math.max(frame, made));
      const left = Math.max(0, this.place(frame));
      const right = Math.min(100, this.place(end));
      if (right <= left) return;
      const element = make("div", "span", prompt);
      element.title = prompt;
      element.dataset.planned = isPlanned ? "yes" : "no";
      element.dataset.last = last ? "yes" : "no";
      element.style.setProperty("--hue", hueOf(prompt));
      element.style.left = `${left}%`;
      element.style.width = `${right - left}%`;
      items.push(element);
    });
    $("spans").replaceChildren(...items, ...stems);
  },

  get moments() {
    return [...(lead()?.bookmarks ?? [])].filter(([chunk]) => chunk <= this.next)
      .sort(([a], [b]) => a - b);
  },

  layOutMoments() {
    const dots = [];
    for (const [chunk, { automatic }] of this.moments) {
      const left = this.place(this.frameOf(chunk));
      if (left < 0 || this.frameOf(chunk) > this.shown) continue;
      const dot = make("i", automatic ? "moment" : "moment own");
      dot.style.left = `${left}%`;
      dot.dataset.chunk = chunk;
      dots.push(dot);
    }
    $("moments").replaceChildren(...dots);
    this.pointAt(this.cursor);
  },

  // Show the moment that a click or Enter would go back to.
  pointAt(chunk) {
    this.cursor = chunk === null ? null : (lead()?.momentBefore?.(chunk) ?? null);
    const reel = $("reel");
    $("cursor").hidden = this.cursor === null;
    reel.setAttribute("aria-valuemax", Math.round(this.length / this.fps));
    const seconds = this.cursor === null ? this.shown / this.fps : this.secondsOf(this.cursor);
    reel.setAttribute("aria-valuenow", Math.round(seconds));
    reel.setAttribute("aria-valuetext",
      this.cursor === null ? "now" : `Back to ${seconds.toFixed(1)} seconds`);
    if (this.cursor === null) return;
    $("cursor").style.left = `${this.place(this.frameOf(this.cursor))}%`;
    $("cursor-time").textContent = `back to ${seconds.toFixed(1)} s`;
  },

  // A film strip: slots of one width, each with the picture nearest to its middle.
  drawStrip() {
    const strip = $("strip");
    const ratio = devicePixelRatio || 1;
    const width = strip.clientWidth;
    strip.width = width * ratio;
    strip.height = STRIP * ratio;
    if (!this.pictures.length) return;
    const context = strip.getContext("2d");
    context.scale(ratio, ratio);
    const first = this.pictures[0];
    const wide = (first.canvas.width * STRIP) / THUMB;
    const slot = wide / (((this.place(1) - this.place(0)) * width) / 100); // frames per slot
    const end = this.pictures.at(-1).frame;
    for (let frame = Math.floor(first.frame / slot) * slot; frame < end; frame += slot) {
      const left = (this.place(frame) / 100) * width;
      if (left < -wide) continue;
      const middle = frame + slot / 2;
      const nearest = this.pictures.reduce((best, picture) =>
        Math.abs(picture.frame - middle) < Math.abs(best.frame - middle) ? picture : best);
      context.drawImage(nearest.canvas, left, 0, wide - 1, STRIP);
    }
  },

  moveHead() {
    $("now").style.left = `${Math.max(0, this.place(this.shown))}%`;
  },

  describe() {
    const edited = this.isEdited;
    const ahead = this.script.changes.filter((change) => change.at >= this.next).length;
    $("timeline").dataset.edited = edited ? "yes" : "no";
    $("discard").hidden = !edited;
    let text = "Click the film strip to go back. Drag a mark to another moment, or click it to edit.";
    if (ahead) text = `${count(ahead, "change")} to come. Drag them, or click one to edit it.`;
    if (edited) text = "The marks differ from what was played. Replay plays them from the beginning.";
    if ($("timeline-note").textContent !== text) $("timeline-note").textContent = text;
  },

  // ---- the film strip, as a control

  connect() {
    const reel = $("reel");
    reel.onpointermove = (event) => {
      const frame = this.frameAtPointer(event);
      this.pointAt(frame > this.length ? null : this.chunkAt(frame));
    };
    reel.onpointerleave = () => this.pointAt(null);
    reel.onclick = (event) => this.returnTo(this.chunkAt(this.frameAtPointer(event)));
    reel.onkeydown = (event) => {
      const chunks = this.moments.map(([chunk]) => chunk);
      const at = this.cursor === null ? chunks.length : chunks.indexOf(this.cursor);
      const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: chunks.length };
      if (event.key === "Enter" || event.key === " ") {
        if (this.cursor !== null) this.returnTo(this.cursor);
      } else if (event.key in moves) {
        this.pointAt(chunks[Math.max(0, moves[event.key])] ?? null);
      } else return;
      event.preventDefault();
      event.stopPropagation();
    };
  },

  returnTo(chunk) {
    const moment = lead()?.momentBefore(chunk) ?? null;
    if (moment === null) toast("There is no bookmark before this moment; B sets one.");
    else branchTo(moment);
  },
};
