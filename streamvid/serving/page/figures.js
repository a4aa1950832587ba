// What the stream costs: four numbers, and a bar per chunk.

import { $, app, count, milliseconds, percentile } from "./base.js";
import { clock } from "./clock.js";
import { timeline } from "./timeline.js";

const BARS = 60;
const HEIGHT = 44; // pixels of the plot

export const figures = {
  chunks: [], // milliseconds of the last ones
  budget: 750, // milliseconds that a chunk plays
  askedAt: null,

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
    if (this.chunks.length > BARS) this.chunks.shift();
    this.budget = (1000 * frames) / timeline.fps;
    $("p50").textContent = milliseconds(percentile(this.chunks, 0.5));
    $("p95").textContent = milliseconds(percentile(this.chunks, 0.95));
    $("plot-note").textContent = `${frames} frames per chunk. Below the line is in time.`;
    this.plot();
  },

  plot() {
    const canvas = $("plot");
    const ratio = devicePixelRatio || 1;
    const width = canvas.clientWidth;
    canvas.width = width * ratio;
    canvas.height = HEIGHT * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(document.documentElement);
    const top = Math.max(this.budget * 1.15, ...this.chunks);
    const tallest = HEIGHT - 4;
    const step = width / BARS;
    this.chunks.forEach((ms, index) => {
      const tall = Math.max(2, (tallest * ms) / top);
      context.fillStyle = style.getPropertyValue(ms > this.budget ? "--warn" : "--accent");
      context.beginPath();
      context.roundRect(index * step + 1, HEIGHT - tall, Math.max(2, step - 2), tall, 2);
      context.fill();
    });
    const line = HEIGHT - (tallest * this.budget) / top;
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

  details(levels) {
    const parts = [
      `The model alone could make ${Math.round(levels.frames_per_second)} frames per second`,
      `${Math.round(100 * levels.deadlines_met)} % of chunks came in time`,
      `${count(levels.dropped, "frame")} skipped`,
      `${count(levels.sessions, "stream")} on this server`,
    ];
    if (levels.memory_mb !== null) parts.push(`${(levels.memory_mb / 1024).toFixed(1)} GB of memory`);
    $("details").textContent = `${parts.join(" · ")}.`;
  },
};
