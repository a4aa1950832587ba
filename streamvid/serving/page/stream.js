// One live stream: its connection, the frames that wait to be shown, and its bookmarks.

import { $, app, count, lead, milliseconds, setState, toast } from "./base.js";
import { figures } from "./figures.js";
import { fieldsOf, inOrder } from "./script.js";
import {
  addClip, describe, lost, openStreams, setLayout, setPaused, setRecording, showSettings,
} from "./steering.js";
import { timeline } from "./timeline.js";
import { makeView, shapeView } from "./view.js";

const HEADER_BYTES = 32;
const MAGIC = "SVF1";
const ENCODINGS = { 1: "image/jpeg", 2: "image/webp" };
const ACK_EVERY = 4; // frames
const AHEAD = 3; // chunks that a change of a script is told beforehand
const BOOKMARK_EVERY = 4; // chunks
const BOOKMARK_BELOW = 256; // pixels of height; the memory of larger streams is too large to keep
const RETRY_MS = 700;
const OWN_BOOKMARKS = 12; // from so many on there is no room for automatic ones

export class Stream {
  // Args: the index of the pane, and what it has of its own: {model, steps, seed}.
  constructor(index, pane) {
    this.index = index;
    this.pane = pane;
    this.seed = pane.seed ?? app.seed;
    this.queue = []; // frames in order: {sequence, promptId, bitmap}
    this.base = null; // sequence of the frame that the clock calls 0
    this.promptId = 0;
    this.shown = -1;
    this.shownPrompt = 0;
    this.live = false;
    this.closed = false;
    this.dropped = 0;
    this.levels = null;
    this.chunkMs = 0;
    this.settings = null; // {seed, steps} in force
    this.bookmarks = new Map(); // chunk -> {number, automatic}
    this.told = -1; // the last chunk whose changes of the script the server knows
    this.view = makeView(this);
  }

  open() {
    this.asked = performance.now();
    this.first = null;
    shapeView(this, app.info.width, app.info.height);
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const protocols = app.token ? ["streamvid", `bearer.${app.token}`] : ["streamvid"];
    this.socket = new WebSocket(`${scheme}://${location.host}/v1/realtime/video`, protocols);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.begin();
    this.socket.onmessage = ({ data }) => {
      if (typeof data === "string") this.hear(JSON.parse(data));
      else this.receive(data);
    };
    this.socket.onclose = () => {
      this.live = false;
      if (!this.closed) lost();
    };
  }

  begin() {
    const { script } = timeline;
    const message = {
      type: "session.start", prompt: script.prompt, seed: this.pane.seed ?? script.seed,
      steps: this.pane.steps ?? script.steps, hold_rate: app.hold && app.layout === "one", acks: true,
    };
    if (app.models.length > 1) message.model = this.pane.model;
    if (app.start) message.start = app.start.id;
    this.send(message);
    this.tellChanges((timeline.first ?? 0) + AHEAD);
    if (this.keepsMoments) this.send({ type: "session.bookmark", automatic: true });
  }

  close() {
    this.closed = true;
    this.live = false;
    if (this.socket.readyState === WebSocket.OPEN) this.send({ type: "session.stop" });
    this.socket.close();
    this.dropQueue(0);
    this.view.figure.remove();
  }

  send(message) {
    if (this.socket?.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }

  // Changes of the script up to a chunk, each once; what a pane has of its own stays.
  tellChanges(chunk) {
    const own = { settings: "steps", seeds: "seed" }[app.layout];
    for (const change of inOrder(timeline.script.changes)) {
      if (change.at <= this.told || change.at > chunk || change.kind === own) continue;
      const type = change.kind === "prompt" ? "session.prompt_update" : "session.update";
      this.send({ type, at: change.at, ...fieldsOf(change) });
    }
    this.told = Math.max(this.told, chunk);
  }

  get keepsMoments() {
    const own = [...this.bookmarks.values()].filter((bookmark) => !bookmark.automatic).length;
    const isCheap = app.info.height < BOOKMARK_BELOW && app.streams.length <= 2;
    return isCheap && own < OWN_BOOKMARKS;
  }

  hear(message) {
    const leads = this === lead();
    const handlers = {
      "session.queued": () => {
        setState("queued", `Place ${message.position} in the queue`);
        this.note(`All places are taken. You are number ${message.position} in the queue.`);
      },
      "video.start": () => {
        this.live = true;
        this.settings = { seed: message.seed, steps: message.steps };
        this.note("");
        shapeView(this, message.width, message.height);
        if (leads) timeline.begun(message);
        describe();
      },
      "video.chunk": () => {
        if (leads && app.hold && message.steps !== this.settings.steps) {
          timeline.note({ at: message.chunk, kind: "steps", value: message.steps });
        }
        this.settings = { seed: message.seed, steps: message.steps };
        this.chunkMs = message.compute_ms;
        this.dropped = message.dropped;
        if (leads) {
          timeline.grow(message);
          figures.chunk(message);
        }
        this.tellChanges(message.chunk + AHEAD);
        if (this.keepsMoments && message.chunk % BOOKMARK_EVERY === 0) {
          const at = message.chunk + BOOKMARK_EVERY;
          this.send({ type: "session.bookmark", at, automatic: true });
        }
        this.label();
      },
      "prompt.applied": () => {
        this.promptId = message.prompt_id;
        if (!leads) return;
        const { chunk, prompt, mode } = message;
        timeline.note({ at: chunk, kind: "prompt", value: prompt, mode });
        showSettings({ prompt });
      },
      "settings.applied": () => this.noteSettings(message, leads),
      "session.restarted": () => this.restart(message, leads),
      "bookmark.made": () => {
        const { bookmark, chunk, automatic, kept } = message;
        const isOwn = this.bookmarks.get(chunk)?.automatic === false;
        if (!isOwn || !automatic) this.bookmarks.set(chunk, { number: bookmark, automatic });
        for (const [other, { number }] of this.bookmarks) {
          if (!kept.includes(number)) this.bookmarks.delete(other);
        }
        if (leads) timeline.layOut();
      },
      "session.metrics": () => {
        this.levels = message;
        figures.details(this.levels);
      },
      "record.started": () => setRecording(true),
      "record.done": () => addClip(message),
      script: () => this.scriptCame?.(message.script),
      "session.done": () => this.end(message),
      error: () => {
        if (message.code === "busy" && !this.closed) { // streams that were just left still count
          this.note("Waits for a place");
          setTimeout(() => this.begin(), RETRY_MS);
          return;
        }
        toast(message.message);
        if (!this.live) this.note(message.message);
        if (message.code === "record_failed") setRecording(false);
      },
    };
    handlers[message.type]?.();
  }

  noteSettings({ chunk, seed, steps }, leads) {
    if (leads) {
      if (seed !== this.settings.seed && app.layout !== "seeds") {
        timeline.note({ at: chunk, kind: "seed", value: seed });
      }
      if (steps !== this.settings.steps && app.layout !== "settings") {
        timeline.note({ at: chunk, kind: "steps", value: steps });
      }
      showSettings({ seed, steps });
    }
    this.settings = { seed, steps };
    this.label();
  }

  restart({ bookmark, chunk, prompt, prompt_id: promptId, seed, steps }, leads) {
    this.dropQueue(0);
    this.base = null;
    this.promptId = promptId;
    this.settings = { seed, steps };
    this.told = bookmark === null ? -1 : chunk - 1;
    for (const other of this.bookmarks.keys()) {
      if (bookmark === null || other > chunk) this.bookmarks.delete(other);
    }
    if (!leads) return;
    showSettings({ prompt, seed, steps });
    setPaused(false, false);
    if (bookmark === null) timeline.begin({ prompt, seed, steps: app.steps });
    else timeline.goBack(chunk);
    describe();
  }

  // The nearest bookmark at or before a chunk, as a chunk.
  momentBefore(chunk) {
    const earlier = [...this.bookmarks.keys()].filter((other) => other <= chunk);
    return earlier.length ? Math.max(...earlier) : null;
  }

  end(message) {
    this.live = false;
    if (this.closed) return;
    const words = {
      idle: "The stream ended because nobody was watching.", error: "The stream has failed.",
      time_limit: "The longest time for one stream is over.", finished: "The stream is complete.",
      server_stopping: "The server is stopping.", stopped: "The stream has ended.",
    };
    setState("lost", "Ended");
    this.note(`${words[message.reason]} Send a prompt to begin again.`);
    setRecording(false);
  }

  receive(buffer) {
    const head = new DataView(buffer, 0, HEADER_BYTES);
    const magic = String.fromCharCode(...new Uint8Array(buffer, 0, 4));
    if (magic !== MAGIC) return;
    const frame = {
      sequence: head.getUint32(8, true), promptId: head.getUint32(16, true), bitmap: null,
    };
    this.queue.push(frame);
    const type = ENCODINGS[head.getUint8(5)];
    createImageBitmap(new Blob([new Uint8Array(buffer, HEADER_BYTES)], { type }))
      .then((bitmap) => {
        if (frame.gone) bitmap.close();
        else frame.bitmap = bitmap;
      })
      .catch(() => (frame.gone = true));
  }

  dropQueue(kept) {
    while (this.queue.length > kept) {
      const frame = this.queue.shift();
      frame.gone = true;
      frame.bitmap?.close();
    }
  }

  // The newest frame that is due at the clock's number, taken out of the queue.
  take(number) {
    while (this.queue[0]?.gone) this.queue.shift();
    if (this.queue.length && this.base === null) this.base = this.queue[0].sequence - number;
    let due = null;
    while (this.queue[0]?.bitmap && this.queue[0].sequence - this.base <= number) {
      due?.bitmap.close();
      due = this.queue.shift();
    }
    return due;
  }

  get starved() {
    return !this.queue[0]?.bitmap;
  }

  draw(frame, now) {
    const { canvas, context } = this.view;
    context.drawImage(frame.bitmap, 0, 0, canvas.width, canvas.height);
    if (this === lead()) timeline.picture(frame.bitmap);
    frame.bitmap.close();
    this.shown = frame.sequence;
    if (this.first === null) {
      this.first = now - this.asked;
      if (this === lead()) figures.first(this.first);
      canvas.dataset.started = "yes";
    }
    if (frame.promptId !== this.shownPrompt) {
      this.shownPrompt = frame.promptId;
      if (this === lead()) figures.switched(now);
      this.label();
    }
    canvas.dataset.sequence = frame.sequence;
    canvas.dataset.prompt = frame.promptId;
    if (frame.sequence % ACK_EVERY === 0) this.acknowledge();
  }

  catchUp() {
    this.dropQueue(1);
    this.base = null;
    if (this.queue.length) this.shown = this.queue[0].sequence;
    this.acknowledge();
  }

  acknowledge() {
    if (this.shown >= 0) this.send({ type: "ack", sequence: this.shown });
  }

  // The script as the server knows it.
  async fetchScript() {
    const script = new Promise((resolve) => (this.scriptCame = resolve));
    return this.send({ type: "script.get" }) ? script : null;
  }

  note(text) {
    this.view.note.textContent = text;
    this.view.note.hidden = !text;
  }

  label() {
    this.view.said.textContent = app.prompt;
    const pace = this.chunkMs ? `${milliseconds(this.chunkMs)} per chunk` : "";
    const steps = this.settings ? count(this.settings.steps, "step") : "";
    const parts = app.layout === "seeds" ? [] : [steps, pace];
    this.view.tag.textContent = parts.filter(Boolean).join(" · ");
    this.view.tag.hidden = !this.view.tag.textContent;
  }

  // ---- what its pane offers

  setSteps(steps) {
    this.pane.steps = steps;
    this.send({ type: "session.update", steps });
  }

  choose(pane) {
    Object.assign(this.pane, pane);
    openStreams(timeline.script);
  }

  keep() {
    app.seed = this.seed;
    $("seed").value = app.seed;
    timeline.script.seed = app.seed;
    setLayout("one");
  }
}
