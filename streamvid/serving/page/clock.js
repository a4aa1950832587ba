// When a frame is shown: all panes show the frame of one number at one time.

import { app, lead } from "./base.js";
import { timeline } from "./timeline.js";

const PATIENCE_MS = 400; // that one pane waits for the others

export const clock = {
  number: -1,
  due: 0,
  starvedSince: 0,
  times: [],

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
      const waiting = live.filter((stream) => !stream.isClip);
      if (starved.length === waiting.length || now - this.starvedSince < PATIENCE_MS) return;
    }
    this.starvedSince = 0;
    this.number += 1;
    for (const stream of live) {
      const frame = stream.take(this.number);
      if (!frame) continue;
      stream.draw(frame, now);
      if (stream === lead()) this.times.push(now);
    }
    const step = 1000 / timeline.fps;
    const buffered = Math.max(...live.map((stream) => stream.queue.length));
    const hurry = buffered > 1.5 * app.info.chunk_frames ? 0.85 : 1; // comes back from a pause
    this.due = Math.max(this.due + step * hurry, now - step);
    timeline.moveHead();
  },

  rate(now) {
    this.times = this.times.filter((time) => now - time < 2000);
    const span = now - (this.times[0] ?? now);
    return span > 500 ? (this.times.length - 1) / ((this.times.at(-1) - this.times[0]) / 1000) : 0;
  },
};
