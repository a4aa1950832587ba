// One pane: the picture of a stream or clip, and the line below it.

import { $, app, make, segments, stepChoices } from "./base.js";

const CRISP_BELOW = 200; // pixels of height; larger frames are smoothed
const SHARE = { one: 0.44, settings: 0.42, seeds: 0.27 }; // of the window's height, per pane

// Args: the source, which has an index, and in layout "settings" {model, steps}.
export function makeView(source) {
  const figure = $("view-template").content.firstElementChild.cloneNode(true);
  const canvas = figure.querySelector("canvas");
  const caption = figure.querySelector("figcaption");
  const said = make("span", "said");
  const tag = make("span", "tag");
  if (app.layout === "settings") caption.append(...settingsOf(source));
  if (app.layout === "seeds") {
    const keep = make("button", "quiet", `Keep seed ${source.seed}`);
    keep.type = "button";
    keep.onclick = () => source.keep();
    caption.append(keep);
  }
  caption.append(said, tag);
  $("stage").append(figure);
  return {
    figure, canvas, context: canvas.getContext("2d"), note: figure.querySelector(".note"), said, tag,
  };
}

// The choices of one of two panes. The first is always a student, which the timeline follows.
function settingsOf(source) {
  const parts = [];
  const side = source.index === 0 ? "left" : "right";
  const offered = app.models.filter((model) => model.live || source.index > 0);
  if (offered.length > 1) {
    const choice = make("select");
    choice.setAttribute("aria-label", `Model of the ${side} picture`);
    for (const model of offered) {
      const option = make("option", "", model.id);
      option.value = model.id;
      option.selected = model.id === source.pane.model;
      choice.append(option);
    }
    choice.onchange = () => source.choose({ model: choice.value, steps: source.pane.steps });
    parts.push(choice);
  }
  if (!source.isClip) {
    const choice = make("div", "segments");
    choice.setAttribute("role", "radiogroup");
    choice.setAttribute("aria-label", `Steps per chunk of the ${side} picture`);
    segments(choice, `steps-${source.index}`, stepChoices(), source.pane.steps,
      (steps) => source.setSteps(Number(steps)));
    parts.push(choice);
  }
  return parts;
}

export function shapeView({ view }, width, height) {
  const { canvas, figure } = view;
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  figure.dataset.crisp = (app.crisp ?? height < CRISP_BELOW) ? "yes" : "no";
  canvas.style.aspectRatio = `${width} / ${height}`;
  fitView({ view });
  canvas.setAttribute("aria-label", `The stream: ${app.prompt}`);
}

// Whole multiples of a pixel where pixels are seen, so that all are of one size.
export function fitView({ view }) {
  const { canvas, figure } = view;
  const mat = canvas.parentElement;
  const style = getComputedStyle(mat);
  const room = mat.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  const tall = Math.max(128, SHARE[app.layout] * innerHeight);
  const scale = Math.min(room / canvas.width, tall / canvas.height);
  const ratio = devicePixelRatio || 1; // of the screen's pixels to the page's
  const crisp = figure.dataset.crisp === "yes" && scale * ratio > 1;
  canvas.style.width = `${canvas.width * (crisp ? Math.floor(scale * ratio) / ratio : scale)}px`;
}

export function toggleCrisp() {
  const height = app.streams[0]?.view.canvas.height ?? 64;
  app.crisp = !(app.crisp ?? height < CRISP_BELOW);
  for (const stream of app.streams) {
    stream.view.figure.dataset.crisp = app.crisp ? "yes" : "no";
    fitView(stream);
  }
}
