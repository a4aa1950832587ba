// The page: one or two streams, a clock that shows their frames, and what steers them.
//
// Parts, in this order: small helpers, Stream (one connection), Clock (when a frame is shown),
// Timeline, the figures, and the controls.

const HEADER_BYTES = 32;
const MAGIC = "SVF1";
const ENCODINGS = { 1: "image/jpeg", 2: "image/webp" };
const ACK_EVERY = 4; // frames
const PATIENCE_MS = 400; // that one view waits for the other
const CRISP_BELOW = 200; // pixels of height; larger frames are smoothed
const COLOURS = {
  red: "#e0564b", green: "#3ca65a", blue: "#4c6ef0", yellow: "#d9b01f", purple: "#a25ad4",
  white: "#a9adba",
};
const PALETTE = ["#4c6ef0", "#3ca65a", "#d98a1f", "#a25ad4", "#d1567f", "#2f9fb0"];
const MODES = {
  cut: ["Cut", "The next chunk reads the new prompt; what is on the picture stays as it was drawn."],
  blend: ["Blend", "The old prompt turns into the new one over three chunks."],
  recache: ["Refresh", "The last second is read again under the new prompt, so the stream turns sooner."],
  hard: ["New scene", "Everything before is forgotten."],
};

const $ = (id) => document.getElementById(id);
const app = {
  info: null, token: "", prompt: "", seed: 0, steps: null, mode: "cut", hold: false,
  compare: false, steps2: [1, 4], paused: false, recording: false, crisp: null, streams: [],
};

// ---------------------------------------------------------------- helpers

function percentile(values, share) {
  if (!values.length) return 0;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

function milliseconds(value) {
  return value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`;
}

function hueOf(prompt) {
  const named = Object.keys(COLOURS).find((word) => new RegExp(`\\b${word}\\b`).test(prompt));
  if (named) return COLOURS[named];
  let sum = 0;
  for (const letter of prompt) sum = (sum * 31 + letter.codePointAt(0)) % 997;
  return PALETTE[sum % PALETTE.length];
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

let toastTimer = 0;
function toast(text) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => ($("toast").hidden = true), 5000);
}

function setState(state, text) {
  $("state").dataset.state = state;
  if ($("state-text").textContent !== text) $("state-text").textContent = text;
}

function headers() {
  return app.token ? { authorization: `Bearer ${app.token}` } : {};
}

function save(blob, name) {
  const link = make("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// ---------------------------------------------------------------- one stream

class Stream {
  constructor(index, steps) {
    this.index = index;
    this.steps = steps;
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
    this.usedSteps = 0;
    this.awaitedBookmarks = [];
    this.view = makeView(this);
  }

  open() {
    this.asked = performance.now();
    this.first = null;
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const protocols = app.token ? ["streamvid", `bearer.${app.token}`] : ["streamvid"];
    this.socket = new WebSocket(`${scheme}://${location.host}/v1/realtime/video`, protocols);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.send({
      type: "session.start", prompt: app.prompt, seed: app.seed, steps: this.steps,
      hold_rate: app.hold && !app.compare, acks: true,
    });
    this.socket.onmessage = ({ data }) => {
      if (typeof data === "string") this.told(JSON.parse(data));
      else this.received(data);
    };
    this.socket.onclose = () => {
      this.live = false;
      if (!this.closed) lost();
    };
  }

  close() {
    this.closed = true;
    this.live = false;
    if (this.socket.readyState === WebSocket.OPEN) this.send({ type: "session.stop" });
    this.socket.close();
    for (const frame of this.queue) frame.bitmap?.close();
    this.view.figure.remove();
  }

  send(message) {
    if (this.socket?.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }

  told(message) {
    const handlers = {
      "session.queued": () => {
        setState("queued", `Place ${message.position} in the queue`);
        this.note(`All places are taken. You are number ${message.position} in the queue.`);
      },
      "video.start": () => {
        this.live = true;
        this.usedSteps = message.steps;
        this.note("");
        shapeView(this, message.width, message.height);
        if (this.index === 0) timeline.begin(message.prompt, message.fps);
        describe();
      },
      "video.chunk": () => {
        this.chunkMs = message.compute_ms;
        this.usedSteps = message.steps;
        this.dropped = message.dropped;
        if (this.index === 0) {
          timeline.grow(message.frames);
          figures.chunk(message);
        }
        this.label();
      },
      "prompt.applied": () => {
        this.promptId = message.prompt_id;
        if (this.index === 0) timeline.prompt(message.prompt);
      },
      "settings.applied": () => {
        this.usedSteps = message.steps;
        this.label();
        if (this.index === 0) timeline.settings(message);
      },
      "session.restarted": () => {
        this.dropQueue(0);
        this.base = null;
        this.promptId = message.prompt_id;
        if (this.index > 0) return;
        app.prompt = message.prompt;
        app.seed = message.seed;
        $("seed").value = message.seed;
        $("prompt").value = message.prompt;
        setPaused(false, false);
        if (message.bookmark === null) timeline.begin(message.prompt, timeline.fps);
        else timeline.back(message.bookmark);
        describe();
      },
      "bookmark.made": () => {
        const automatic = this.awaitedBookmarks.shift() === "automatic";
        if (this.index === 0) timeline.bookmark(message.bookmark, automatic);
      },
      "session.metrics": () => {
        this.levels = message;
        describeDetails();
      },
      "record.started": () => setRecording(true),
      "record.done": () => addClip(message),
      script: () => save(new Blob([message.script]), "stream.yaml"),
      "session.done": () => this.done(message),
      error: () => {
        toast(message.message);
        if (message.code === "record_failed") setRecording(false);
      },
    };
    handlers[message.type]?.();
  }

  done(message) {
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

  received(buffer) {
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
    if (this.index === 0) timeline.picture(frame.bitmap);
    frame.bitmap.close();
    this.shown = frame.sequence;
    if (this.first === null) {
      this.first = now - this.asked;
      if (this.index === 0) figures.first(this.first);
      canvas.dataset.started = "yes";
    }
    if (frame.promptId !== this.shownPrompt) {
      this.shownPrompt = frame.promptId;
      if (this.index === 0) figures.switched(now);
      this.label();
    }
    canvas.dataset.sequence = frame.sequence;
    canvas.dataset.prompt = frame.promptId;
    if (frame.sequence % ACK_EVERY === 0) this.acknowledge();
  }

  acknowledge() {
    if (this.shown >= 0) this.send({ type: "ack", sequence: this.shown });
  }

  note(text) {
    this.view.note.textContent = text;
    this.view.note.hidden = !text;
  }

  label() {
    this.view.said.textContent = app.prompt;
    const steps = `${this.usedSteps} ${this.usedSteps === 1 ? "step" : "steps"}`;
    this.view.tag.textContent = this.chunkMs
      ? `${app.compare ? "" : `${steps} · `}${milliseconds(this.chunkMs)} per chunk` : steps;
  }
}

// ---------------------------------------------------------------- a view of a stream

function makeView(stream) {
  const figure = $("view-template").content.firstElementChild.cloneNode(true);
  const canvas = figure.querySelector("canvas");
  const caption = figure.querySelector("figcaption");
  const said = make("span", "said");
  const tag = make("span", "tag");
  if (app.compare) {
    const name = `steps-${stream.index}`;
    const choice = segments(make("div", "segments"), name, stepChoices(), stream.steps, (steps) => {
      stream.steps = app.steps2[stream.index] = Number(steps);
      stream.send({ type: "session.update", steps: stream.steps });
    });
    choice.setAttribute("role", "radiogroup");
    choice.setAttribute("aria-label", "Steps per chunk of this view");
    caption.append(choice);
  }
  caption.append(said, tag);
  $("stage").append(figure);
  return { figure, canvas, context: canvas.getContext("2d"), note: figure.querySelector(".note"), said, tag };
}

function shapeView(stream, width, height) {
  const { canvas, figure } = stream.view;
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  figure.dataset.crisp = (app.crisp ?? height < CRISP_BELOW) ? "yes" : "no";
  canvas.style.aspectRatio = `${width} / ${height}`;
  fitView(stream);
  canvas.setAttribute("aria-label", `The stream: ${app.prompt}`);
}

// Whole multiples of a pixel where pixels are seen, so that all are of one size.
function fitView(stream) {
  const { canvas, figure } = stream.view;
  const mat = canvas.parentElement;
  const style = getComputedStyle(mat);
  const room = mat.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  const tall = Math.max(180, 0.44 * innerHeight);
  const scale = Math.min(room / canvas.width, tall / canvas.height);
  const crisp = figure.dataset.crisp === "yes" && scale > 1;
  canvas.style.width = `${canvas.width * (crisp ? Math.floor(scale) : scale)}px`;
}

// ---------------------------------------------------------------- the clock

const clock = {
  number: -1, due: 0, starvedSince: 0, times: [],

  reset() {
    this.number = -1;
    this.due = 0;
    this.times = [];
    for (const stream of app.streams) stream.base = null;
  },

  tick(now) {
    requestAnimationFrame((then) => this.tick(then));
    const live = app.streams.filter((stream) => stream.live || stream.queue.length);
    if (!live.length || app.paused || now < this.due) return;
    const starved = live.filter((stream) => stream.starved);
    if (starved.length) {
      this.starvedSince ||= now;
      if (starved.length === live.length || now - this.starvedSince < PATIENCE_MS) return;
    }
    this.starvedSince = 0;
    this.number += 1;
    for (const stream of live) {
      const frame = stream.take(this.number);
      if (!frame) continue;
      stream.draw(frame, now);
      if (stream === app.streams[0]) this.times.push(now);
    }
    const step = 1000 / timeline.fps;
    const buffered = Math.max(...live.map((stream) => stream.queue.length));
    const hurry = buffered > 1.5 * app.info.chunk_frames ? 0.85 : 1; // comes back from a pause
    this.due = Math.max(this.due + step * hurry, now - step);
    timeline.head(timeline.length - app.streams[0].queue.length);
  },

  catchUp() {
    for (const stream of app.streams) {
      stream.dropQueue(1);
      stream.base = null;
      if (stream.queue.length) stream.shown = stream.queue[0].sequence;
      stream.acknowledge();
    }
  },

  rate(now) {
    this.times = this.times.filter((time) => now - time < 2000);
    const span = now - (this.times[0] ?? now);
    return span > 500 ? (this.times.length - 1) / ((this.times.at(-1) - this.times[0]) / 1000) : 0;
  },
};

// ---------------------------------------------------------------- the timeline

const SHOWN_S = 60;
const THUMB = 64; // pixels of height that a small picture is kept with
const STRIP = 36; // and shown with
const PICTURE_EVERY = 6; // frames
const timeline = {
  fps: 16, length: 0, spans: [], marks: [], pictures: [], waiting: null, ids: new Map(),

  begin(prompt, fps) {
    this.fps = fps;
    this.length = 0;
    this.spans = [{ frame: 0, prompt }];
    this.marks = [];
    this.pictures = [];
    this.waiting = null;
    this.render();
  },

  // A small picture of every few frames that are shown.
  picture(bitmap) {
    const frame = this.length - app.streams[0].queue.length;
    if (frame - (this.pictures.at(-1)?.frame ?? -Infinity) < PICTURE_EVERY) return;
    const canvas = new OffscreenCanvas((THUMB * bitmap.width) / bitmap.height, THUMB);
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    this.pictures.push({ frame, canvas });
    if (this.pictures.length > (SHOWN_S * this.fps) / PICTURE_EVERY) this.pictures.shift();
  },

  // A film strip: slots of one width, each with the picture nearest to its middle.
  drawStrip(strip) {
    const ratio = devicePixelRatio || 1;
    const width = strip.clientWidth;
    strip.width = width * ratio;
    strip.height = STRIP * ratio;
    if (!this.pictures.length) return;
    const context = strip.getContext("2d");
    context.scale(ratio, ratio);
    const first = this.pictures[0];
    const wide = (first.canvas.width * STRIP) / THUMB;
    const slot = wide / ((this.place(1) - this.place(0)) * width / 100); // frames per slot
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

  grow(frames) {
    this.length += frames;
    this.render();
  },

  prompt(prompt) {
    // the message comes just before the first chunk of the prompt
    this.spans.push({ frame: this.length, prompt });
    if (this.waiting !== null) {
      this.marks.push({ frame: this.length, kind: "back", text: "before", bookmark: this.waiting });
    }
    this.waiting = null;
    this.render();
  },

  settings({ steps, seed }) {
    const before = this.last ?? {};
    if (before.steps !== steps) this.add("steps", `${steps} ${steps === 1 ? "step" : "steps"}`);
    if (before.seed !== undefined && before.seed !== seed) this.add("seed", `seed ${seed}`);
    this.last = { steps, seed };
  },

  add(kind, text) {
    this.marks.push({ frame: this.length, kind, text });
    this.render();
  },

  bookmark(number, automatic) {
    if (automatic) this.waiting = number;
    else this.marks.push({ frame: this.length, kind: "kept", text: "bookmark", bookmark: number });
    const { spans, marks, pictures } = this;
    this.ids.set(number, { frame: this.length, spans: [...spans], marks: [...marks], pictures: [...pictures] });
    this.render();
  },

  back(number) {
    const kept = this.ids.get(number);
    if (!kept) return;
    this.length = kept.frame;
    this.spans = [...kept.spans];
    this.pictures = [...kept.pictures];
    this.marks = [...kept.marks, { frame: kept.frame, kind: "branch", text: "went back" }];
    this.render();
  },

  place(frame) {
    const shown = SHOWN_S * this.fps;
    const from = Math.max(0, this.length - shown);
    const width = Math.max(20 * this.fps, Math.min(shown, this.length * 1.15));
    return (100 * (frame - from)) / width;
  },

  render() {
    const track = $("track");
    const items = [];
    this.spans.forEach((span, index) => {
      const end = this.spans[index + 1]?.frame ?? this.length;
      if (end <= span.frame || this.place(end) < 0) return;
      const left = Math.max(0, this.place(span.frame));
      const element = make("div", "span", span.prompt);
      element.title = span.prompt;
      element.style.setProperty("--hue", hueOf(span.prompt));
      element.style.left = `${left}%`;
      element.style.width = `${this.place(end) - left}%`;
      items.push(element);
    });
    for (const mark of this.marks) {
      const left = this.place(mark.frame);
      if (left < 0) continue;
      const element = make(mark.bookmark === undefined ? "span" : "button", "mark");
      const paths = {
        back: "M9 7 4 12l5 5M4 12h10a6 6 0 0 1 6 6", kept: "M7 4h10v16l-5-4-5 4z",
        branch: "M6 4v16M6 12h6a5 5 0 0 0 5-5V4", steps: "M4 20h5v-5h5v-5h5V5",
        seed: "M12 5v14M5 12h14",
      };
      element.append(icon(paths[mark.kind]), make("span", "", mark.text));
      if (mark.bookmark !== undefined) {
        element.type = "button";
        element.title = "Go back to this moment";
        element.setAttribute("aria-label", `Go back to ${(mark.frame / this.fps).toFixed(1)} seconds`);
        element.onclick = () => sendAll({ type: "session.branch", bookmark: mark.bookmark });
      }
      element.style.left = `${left}%`;
      items.push(element);
    }
    const now = make("div", "now");
    now.id = "now";
    const strip = make("canvas", "strip");
    track.replaceChildren(strip, ...items, now);
    this.drawStrip(strip);
    spread(track);
    this.head(this.length - (app.streams[0]?.queue.length ?? 0));
  },

  head(frame) {
    const now = $("now");
    if (now) now.style.left = `${Math.max(0, this.place(frame))}%`;
  },
};

// Marks that would cover each other move to the right.
function spread(track) {
  let free = 0;
  for (const mark of track.querySelectorAll(".mark")) {
    const left = Math.max(mark.offsetLeft, free);
    mark.style.left = `${left}px`;
    free = left + mark.offsetWidth + 4;
  }
}

// ---------------------------------------------------------------- figures

const figures = {
  chunks: [], budget: 750, askedAt: null,

  first(ms) {
    $("first").textContent = milliseconds(ms);
  },

  asked() {
    this.askedAt = performance.now();
  },

  switched(now) {
    if (this.askedAt === null) return;
    $("switch").textContent = milliseconds(now - this.askedAt);
    this.askedAt = null;
  },

  chunk({ compute_ms: ms, frames }) {
    this.chunks.push(ms);
    if (this.chunks.length > 60) this.chunks.shift();
    this.budget = (1000 * frames) / timeline.fps;
    $("p50").textContent = milliseconds(percentile(this.chunks, 0.5));
    $("p95").textContent = milliseconds(percentile(this.chunks, 0.95));
    $("plot-note").textContent =
      `Each bar makes ${frames} frames, ${(this.budget / 1000).toFixed(2)} s of video. Below the line is faster than it plays.`;
    this.plot();
  },

  plot() {
    const canvas = $("plot");
    const ratio = devicePixelRatio || 1;
    const width = canvas.clientWidth;
    const height = 56;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(document.documentElement);
    const top = Math.max(this.budget * 1.15, ...this.chunks);
    const step = width / 60;
    this.chunks.forEach((ms, index) => {
      const tall = Math.max(2, ((height - 4) * ms) / top);
      const late = ms > this.budget;
      context.fillStyle = style.getPropertyValue(late ? "--warn" : "--accent");
      context.beginPath();
      context.roundRect(index * step + 1, height - tall, Math.max(2, step - 2), tall, 2);
      context.fill();
    });
    const line = height - ((height - 4) * this.budget) / top;
    context.strokeStyle = style.getPropertyValue("--faint");
    context.setLineDash([4, 4]);
    context.beginPath();
    context.moveTo(0, line);
    context.lineTo(width, line);
    context.stroke();
  },

  rate() {
    const rate = clock.rate(performance.now());
    if (app.paused || !rate) return;
    $("fps").textContent = rate.toFixed(rate < 10 ? 1 : 0);
    $("fps-of").textContent = `of ${timeline.fps}`;
  },
};

function describeDetails() {
  const levels = app.streams[0]?.levels;
  if (!levels) return;
  const parts = [
    `the model alone could make ${Math.round(levels.frames_per_second)} frames per second`,
    `${Math.round(100 * levels.deadlines_met)} % of chunks came in time`,
    `${levels.dropped} ${levels.dropped === 1 ? "frame" : "frames"} skipped`,
    `${levels.sessions} ${levels.sessions === 1 ? "stream" : "streams"} on this server`,
  ];
  if (levels.memory_mb !== null) parts.push(`${(levels.memory_mb / 1024).toFixed(1)} GB of memory`);
  $("details").textContent = `${parts.join(" · ")}.`.replace(/^./, (letter) => letter.toUpperCase());
}

function describe() {
  for (const stream of app.streams) stream.label();
  const live = app.streams.some((stream) => stream.live);
  if (live) setState(app.paused ? "paused" : "live", app.paused ? "Paused" : "Live");
}

// ---------------------------------------------------------------- steering

function sendAll(message) {
  return app.streams.map((stream) => stream.send(message)).some(Boolean);
}

function openStreams() {
  for (const stream of app.streams) stream.close();
  app.streams = [];
  setRecording(false);
  setPaused(false, false);
  const all = app.compare ? app.steps2 : [app.steps];
  app.streams = all.map((steps, index) => new Stream(index, steps));
  $("stage").dataset.views = all.length;
  clock.reset();
  for (const stream of app.streams) stream.open();
  describe();
}

let retry = 0;
function lost() {
  if (app.streams.some((stream) => stream.live)) return;
  setState("lost", "Connection lost");
  const wait = Math.min(8000, 1000 * 2 ** retry);
  retry += 1;
  setTimeout(async () => {
    if (await isReady()) {
      retry = 0;
      openStreams();
    } else lost();
  }, wait);
}

function showPrompt(prompt) {
  const text = prompt.trim();
  if (!text) return;
  $("prompt").value = text;
  app.prompt = text;
  if (!app.streams.some((stream) => stream.live)) {
    openStreams();
    return;
  }
  figures.asked();
  for (const stream of app.streams) {
    stream.awaitedBookmarks.push("automatic");
    stream.send({ type: "session.bookmark" });
    stream.send({ type: "session.prompt_update", prompt: text, mode: app.mode });
  }
  if (app.paused) setPaused(false);
  describe();
}

function setPaused(paused, tell = true) {
  app.paused = paused;
  $("pause").setAttribute("aria-pressed", paused);
  $("pause").querySelector("span").textContent = paused ? "Resume" : "Pause";
  if (tell) sendAll({ type: paused ? "session.pause" : "session.resume" });
  describe();
}

function setSteps(steps) {
  app.steps = steps;
  if (app.compare) return;
  const choice = document.querySelector(`#steps input[value="${steps}"]`);
  if (choice) choice.checked = true;
  $("hold").checked = app.hold = false;
  if (app.streams[0]) app.streams[0].steps = steps;
  sendAll({ type: "session.update", steps, hold_rate: false });
}

function setSeed(seed) {
  app.seed = Math.max(0, Math.min(Number.MAX_SAFE_INTEGER, Math.floor(Number(seed) || 0)));
  $("seed").value = app.seed;
  sendAll({ type: "session.update", seed: app.seed });
}

function setRecording(recording) {
  app.recording = recording;
  $("record").setAttribute("aria-pressed", recording);
  $("record").querySelector("span").textContent = recording ? "Stop recording" : "Record";
}

function toggleRecording() {
  if (app.recording) {
    sendAll({ type: "record.stop" });
    setRecording(false);
  } else sendAll({ type: "record.start", format: $("container").value });
}

function setCompare(compare) {
  app.compare = $("compare").checked = compare;
  for (const input of document.querySelectorAll("#steps input, #hold")) input.disabled = compare;
  if (compare) app.steps2 = [1, Math.min(4, app.info.max_steps)];
  openStreams();
}

function addClip({ url, frames, format, script, command }) {
  const item = make("li");
  const seconds = (frames / timeline.fps).toFixed(1);
  item.append(make("span", "", `${seconds} s, ${frames} frames, ${format}`));
  const buttons = make("div");
  const fetchButton = make("button", "quiet", "Download");
  fetchButton.onclick = async () => {
    const reply = await fetch(url, { headers: headers() });
    if (reply.ok) save(await reply.blob(), `streamvid.${format}`);
    else toast("The recording is no longer on the server.");
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

// ---------------------------------------------------------------- controls

function segments(box, name, choices, chosen, changed) {
  for (const [value, text] of choices) {
    const label = make("label");
    const input = make("input");
    Object.assign(input, { type: "radio", name, value, checked: String(value) === String(chosen) });
    input.addEventListener("change", () => changed(value));
    label.append(input, text);
    if (text !== String(value)) label.title = String(value);
    box.append(label);
  }
  return box;
}

function stepChoices() {
  return [1, 2, 3, 4].filter((steps) => steps <= app.info.max_steps).map((steps) => [steps, String(steps)]);
}

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

function keepMoment() {
  for (const stream of app.streams) {
    stream.awaitedBookmarks.push("kept");
    stream.send({ type: "session.bookmark" });
  }
}

function toggleCrisp() {
  const height = app.streams[0]?.view.canvas.height ?? 64;
  app.crisp = !(app.crisp ?? height < CRISP_BELOW);
  for (const stream of app.streams) {
    stream.view.figure.dataset.crisp = app.crisp ? "yes" : "no";
    fitView(stream);
  }
}

const KEYS = {
  "/": () => $("prompt").select(),
  " ": () => setPaused(!app.paused),
  r: () => sendAll({ type: "session.reset", seed: app.seed }),
  b: keepMoment,
  c: () => setCompare(!app.compare),
  d: () => $("dice").click(),
  v: toggleRecording,
  p: toggleCrisp,
  t: () => setTheme(isDark() ? "light" : "dark"),
  "?": () => $("keys").showModal(),
  1: () => setSteps(1), 2: () => setSteps(2), 3: () => setSteps(3), 4: () => setSteps(4),
};

function connectControls() {
  $("prompt-form").addEventListener("submit", (event) => {
    event.preventDefault();
    showPrompt($("prompt").value);
  });
  $("prompt").maxLength = app.info.prompt_chars;
  $("pause").onclick = () => setPaused(!app.paused);
  $("reset").onclick = KEYS.r;
  $("bookmark").onclick = keepMoment;
  $("record").onclick = toggleRecording;
  $("script").onclick = () => app.streams[0]?.send({ type: "script.get" });
  $("compare").onchange = (event) => setCompare(event.target.checked);
  $("hold").onchange = (event) => {
    app.hold = event.target.checked;
    sendAll({ type: "session.update", hold_rate: app.hold });
  };
  $("seed").onchange = (event) => setSeed(event.target.value);
  $("dice").onclick = () => setSeed(Math.floor(Math.random() * 10_000));
  $("theme").onclick = KEYS.t;
  $("help").onclick = KEYS["?"];
  $("shuffle").onclick = showExamples;
  segments($("steps"), "steps", stepChoices(), app.steps, (steps) => setSteps(Number(steps)));
  segments($("mode"), "mode", app.info.modes.map((mode) => [mode, MODES[mode][0]]), app.mode, setMode);
  setMode(app.mode);
  document.addEventListener("keydown", (event) => {
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
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) clock.catchUp();
  });
  addEventListener("resize", () => {
    app.streams.forEach(fitView);
    figures.plot();
    timeline.render();
  });
  setInterval(() => figures.rate(), 500);
}

async function isReady() {
  try {
    const reply = await fetch("/readyz");
    if (reply.status === 503) setState("connecting", "The model warms up");
    return reply.ok;
  } catch {
    return false;
  }
}

async function begin() {
  const theme = localStorage.getItem("theme");
  if (theme) document.documentElement.dataset.theme = theme;
  app.token = new URLSearchParams(location.hash.slice(1)).get("token")
    ?? sessionStorage.getItem("token") ?? "";
  if (app.token) {
    sessionStorage.setItem("token", app.token);
    history.replaceState(null, "", location.pathname);
  }
  while (!(await isReady())) await new Promise((resolve) => setTimeout(resolve, 700));
  const reply = await fetch("/v1/info", { headers: headers() });
  if (!reply.ok) {
    setState("lost", "A token is needed");
    toast("This server needs a token: add #token=... to the address.");
    return;
  }
  app.info = await reply.json();
  Object.assign(app, { steps: app.info.steps, mode: app.info.default_mode });
  timeline.fps = app.info.fps;
  $("model").textContent = `${app.info.model} on ${app.info.device === "cpu" ? "the CPU" : app.info.device}`;
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
