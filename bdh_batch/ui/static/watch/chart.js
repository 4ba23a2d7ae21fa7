// Lines over the last minutes, on a canvas; what they are now stands beside it in words.

import { h } from "../dom.js";
import { colour } from "../theme.js";
import { MINUTES } from "./samples.js";

const HEIGHT = 130;
const LEFT = 54; // of the lines: room for numbers
const BOTTOM = 18;
const COLOURS = ["--accent", "--warn", "--bad"];
const DASHES = [[], [6, 3], [2, 3]]; // told apart without their colours, too
const GAP = 3; // samples' lengths after which a line is broken

/** `lines` are `{label, value(sample)}`, at most three; `format` writes what stands at the axis. */
export class Chart {
  #canvas;
  #now;
  #lines;
  #format;

  constructor(title, lines, format) {
    this.#lines = lines;
    this.#format = format;
    this.#now = lines.map(() => h("b", {}, "–"));
    this.#canvas = h("canvas", { "role": "img", aria: { label: `${title}, the last ${MINUTES} minutes; the table below has it in numbers` } });
    const keys = lines.map(({ label }, index) => h("span", { class: `line line-${index}` }, h("i", { aria: { hidden: "true" } }), `${label} `, this.#now[index]));
    this.element = h("figure", { class: "panel chart" }, h("figcaption", {}, h("h3", {}, title), h("p", { class: "row" }, keys)), this.#canvas);
  }

  draw(samples, seconds) {
    const last = samples.at(-1);
    this.#lines.forEach(({ value }, index) => { this.#now[index].textContent = last ? this.#format(value(last)) : "–"; });
    const context = this.#fit();
    if (!context || !last) return;
    const width = this.#canvas.clientWidth;
    const values = this.#lines.map(({ value }) => samples.map((sample) => value(sample) ?? null));
    const top = ceiling(Math.max(0, ...values.flat().filter((value) => value !== null)));
    const x = (time) => width - 4 - ((last.time - time) / (MINUTES * 60)) * (width - LEFT - 4);
    const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - BOTTOM - 8);
    this.#axes(context, width, top, x, y, last.time);
    values.forEach((line, index) => {
      context.strokeStyle = colour(COLOURS[index]);
      context.setLineDash(DASHES[index]);
      context.beginPath();
      let before = -Infinity;
      line.forEach((value, at) => {
        if (value === null) return;
        const { time } = samples[at];
        if (time - before > GAP * seconds) context.moveTo(x(time), y(value));
        context.lineTo(x(time), y(value));
        before = time;
      });
      context.stroke();
    });
  }

  #fit() {
    const scale = devicePixelRatio;
    const width = Math.round(this.#canvas.clientWidth * scale);
    if (!width) return null; // it is not shown
    this.#canvas.width = width;
    this.#canvas.height = HEIGHT * scale;
    const context = this.#canvas.getContext("2d");
    context.scale(scale, scale);
    context.lineWidth = 1.5;
    return context;
  }

  #axes(context, width, top, x, y, now) {
    context.fillStyle = colour("--muted");
    context.strokeStyle = colour("--line");
    context.font = "11px system-ui, sans-serif";
    context.setLineDash([]);
    context.textAlign = "right";
    for (const value of [0, top / 2, top]) {
      context.fillText(this.#format(value), LEFT - 6, y(value) + 4);
      context.beginPath();
      context.moveTo(LEFT, y(value));
      context.lineTo(width, y(value));
      context.stroke();
    }
    context.textAlign = "center";
    for (const minutes of [15, 10, 5]) {
      context.fillText(`−${minutes} min`, Math.max(LEFT + 14, x(now - minutes * 60)), HEIGHT - 4);
    }
  }
}

/** The least number of one digit, or of 1.5, 2.5, that is not below `value`. */
function ceiling(value) {
  if (value <= 0) return 1;
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].find((digit) => digit * unit >= value) * unit;
}
