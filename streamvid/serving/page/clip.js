// A pane that shows a clip beside a stream: that of a teacher, which can't be streamed. The clip is
// asked for, waited for, and played in a loop, in step with the stream.

import { app, ask, lead, toast } from "./base.js";
import { openStreams } from "./steering.js";
import { timeline } from "./timeline.js";
import { makeView, shapeView } from "./view.js";

const POLL_MS = 400;
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export class Clip {
  constructor(index, pane) {
    this.index = index;
    this.pane = pane;
    this.isClip = true;
    this.model = app.models.find((model) => model.id === pane.model);
    this.live = false;
    this.closed = false;
    this.queue = []; // nothing waits
    this.starved = false;
    this.frames = [];
    this.drawn = -1;
    this.wanted = 0; // counts the clips that were asked for; an older one is dropped
    this.view = makeView(this);
  }

  open() {
    shapeView(this, this.model.width, this.model.height);
    this.view.canvas.setAttribute("aria-label", `Clip of ${this.model.id}`);
    this.view.tag.textContent = `${this.model.steps} steps for the whole clip`;
    this.show();
  }

  // Ask for the clip of the prompt and seed in force.
  async show() {
    this.wanted += 1;
    const wanted = this.wanted;
    const stale = () => this.closed || wanted !== this.wanted;
    this.asked = { prompt: app.prompt, seed: app.seed };
    this.note("The teacher makes its clip");
    try {
      const headers = { "content-type": "application/json" };
      const body = JSON.stringify({ model: this.model.id, ...this.asked, format: "webm" });
      const made = await ask("/v1/videos", { method: "POST", headers, body });
      let clip = await made.json();
      while (clip.status !== "completed") {
        if (stale()) {
          ask(`/v1/videos/${clip.id}`, { method: "DELETE" }).catch(() => {});
          return;
        }
        if (clip.status === "failed") throw new Error(clip.error?.message ?? "the clip has failed");
        this.note(`The teacher makes its clip: ${clip.progress} %`);
        await wait(POLL_MS);
        clip = await (await ask(`/v1/videos/${clip.id}`)).json();
      }
      const content = await ask(`/v1/videos/${clip.id}/content`);
      const frames = await readFrames(await content.blob(), this.model.fps, Number(clip.seconds));
      if (stale()) return;
      this.frames = frames;
      this.drawn = -1;
      this.live = true;
      this.note("");
    } catch (error) {
      if (stale()) return;
      this.note("There is no clip of the teacher");
      toast(error.message);
    }
  }

  close() {
    this.closed = true;
    this.live = false;
    for (const frame of this.frames) frame.close();
    this.frames = [];
    this.view.figure.remove();
  }

  // The clip begins anew with each prompt of the stream beside it.
  take() {
    const frame = timeline.shownOfPrompt();
    const index = Math.max(0, frame) % this.frames.length;
    if (!this.live || index === this.drawn) return null;
    this.drawn = index;
    return this.frames[index];
  }

  draw(bitmap) {
    const { canvas, context } = this.view;
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    canvas.dataset.started = "yes";
    canvas.dataset.sequence = this.drawn;
  }

  label() {
    const isOld = this.asked?.prompt !== app.prompt || this.asked.seed !== app.seed;
    if (this.asked && isOld && lead().live) this.show();
  }

  note(text) {
    this.view.note.textContent = text;
    this.view.note.hidden = !text;
  }

  choose(pane) {
    Object.assign(this.pane, pane);
    openStreams(timeline.script);
  }

  send() {
    return false;
  }

  tellChanges() {}

  catchUp() {}
}

// All frames of a clip. A browser has no call for that, so each is sought in its middle.
async function readFrames(blob, fps, seconds) {
  const video = document.createElement("video");
  video.muted = true;
  video.src = URL.createObjectURL(blob);
  try {
    await happens(video, "loadeddata");
    const frames = [];
    for (let index = 0; index < Math.round(seconds * fps); index += 1) {
      const sought = happens(video, "seeked");
      video.currentTime = (index + 0.5) / fps;
      await sought;
      frames.push(await createImageBitmap(video));
    }
    return frames;
  } finally {
    URL.revokeObjectURL(video.src);
  }
}

function happens(video, event) {
  return new Promise((resolve, reject) => {
    video.addEventListener(event, resolve, { once: true });
    video.addEventListener("error", () => reject(new Error("this browser can't play the clip")), {
      once: true,
    });
  });
}
