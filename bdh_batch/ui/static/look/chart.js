// How many neurons fire, by layer over the text: a line for each layer.

import { h } from "../dom.js";
import { colour, onThemeChange } from "../theme.js";
import { percent } from "./words.js";

const HEIGHT = 130; // CSS pixels
const LEFT = 38;
const RIGHT = 16;
const EDGE = 8;
const LETTER = 11;
const SAMPLES = 32; // tokens of one pixel that are looked at, at most

/** Calls `onPick(position)`. */
export class SparsityChart {
  #history = null;
  #canvas = h("canvas", { role: "img", height: HEIGHT });
  #selected = null;
  #colours = {};

  constructor(onPick) {
    this.element = h("div", { class: "chart" }, this.#canvas);
    this.#canvas.addEventListener("click", (event) => {
      const { begin, end } = this.#span();
      const share = (event.offsetX - LEFT) / (this.#canvas.clientWidth - LEFT - RIGHT);
      if (end > begin) onPick(Math.min(end - 1, begin + Math.floor(Math.max(0, share) * (end - begin))));
    });
    onThemeChange(() => this.#repaint());
    this.#repaint();
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  reset(history) {
    this.#history = history;
    this.#selected = null;
    this.draw();
  }

  select(position) {
    this.#selected = position;
    this.draw();
  }

  draw() {
    const width = this.element.clientWidth;
    if (!width || !this.#history) return;
    const scale = Math.min(2, devicePixelRatio);
    Object.assign(this.#canvas, { width: width * scale, height: HEIGHT * scale });
    const context = this.#canvas.getContext("2d");
    context.scale(scale, scale);
    context.font = "11px system-ui, sans-serif";
    const plot = { context, ...this.#colours, width: width - LEFT - RIGHT, height: HEIGHT - 2 * EDGE, ...this.#span() };
    const layers = this.#layers(plot);
    plot.most = Math.max(0.01, ...layers.flat());
    axis(plot);
    const names = spread(layers.map((shares) => EDGE + plot.height * (1 - shares.at(-1) / plot.most)));
    layers.forEach((shares, layer) => line(plot, shares, layer, layers.length, names[layer]));
    if (this.#selected !== null && this.#selected >= plot.begin) this.#cursor(plot);
    this.#canvas.setAttribute("aria-label", this.#summary());
  }

  #repaint() {
    const [line, muted, text] = ["--line", "--muted", "--text"].map(colour);
    const light = Number(text.match(/[\d.]+/)[0]) > 128; // text: then lines are, too
    this.#colours = { line, muted, text, lightness: light ? 0.78 : 0.5 };
    this.draw();
  }

  #span() {
    return { begin: this.#history?.begin ?? 0, end: this.#history?.fired ?? 0 };
  }

  /** For each layer, the mean share of each pixel. */
  #layers({ width, begin, end }) {
    const pixels = Math.max(1, Math.min(Math.floor(width), end - begin));
    return Array.from({ length: end > begin ? this.#history.shape.layers : 0 }, (_, layer) =>
      Array.from({ length: pixels }, (_, pixel) => {
        const from = begin + Math.floor((pixel * (end - begin)) / pixels);
        const until = Math.max(from + 1, begin + Math.floor(((pixel + 1) * (end - begin)) / pixels));
        const step = Math.max(1, Math.ceil((until - from) / SAMPLES));
        let sum = 0;
        let count = 0;
        for (let at = from; at < until; at += step, count += 1) sum += this.#history.active(at, layer);
        return sum / count;
      }),
    );
  }

  #cursor({ context, width, height, begin, end, text }) {
    const x = LEFT + ((this.#selected - begin + 0.5) * width) / (end - begin);
    context.strokeStyle = text;
    context.setLineDash([3, 3]);
    context.beginPath();
    context.moveTo(x, EDGE);
    context.lineTo(x, EDGE + height);
    context.stroke();
    context.setLineDash([]);
  }

  #summary() {
    const { begin, end } = this.#span();
    if (end <= begin) return "Share of neurons that fire, by layer: nothing yet";
    const last = Array.from({ length: this.#history.shape.layers }, (_, layer) => `layer ${layer} ${percent(this.#history.active(end - 1, layer))}`);
    return `Share of neurons that fire, by layer over ${end - begin} tokens; for the last: ${last.join(", ")}`;
  }
}

function axis({ context, width, height, most, line: stroke, muted }) {
  context.strokeStyle = stroke;
  context.fillStyle = muted;
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.lineWidth = 1;
  for (const share of [0, 0.5, 1]) {
    const y = EDGE + height * (1 - share);
    context.beginPath();
    context.moveTo(LEFT, y);
    context.lineTo(LEFT + width, y);
    context.stroke();
    context.fillText(percent(share * most), LEFT - 4, y);
  }
}

/** Ends with the layer's number, at `name`: colours alone would not tell them apart. */
function line({ context, width, height, most, lightness }, shares, layer, layers, name) {
  context.strokeStyle = context.fillStyle = `oklch(${lightness} 0.13 ${(layer * 360) / layers})`;
  context.lineWidth = 1.5;
  context.beginPath();
  shares.forEach((share, pixel) => {
    context.lineTo(LEFT + ((pixel + 0.5) * width) / shares.length, EDGE + height * (1 - share / most));
  });
  context.stroke();
  context.textAlign = "left";
  context.fillText(`${layer}`, LEFT + width + 4, name);
}

/** Heights moved apart, so that names beside them can be read, where there is room for all. */
function spread(heights) {
  const order = heights.map((_, at) => at).sort((a, b) => heights[a] - heights[b]);
  const moved = [...heights];
  if (order.length * LETTER > HEIGHT) return moved;
  order.forEach((at, rank) => { moved[at] = Math.max(moved[at], rank ? moved[order[rank - 1]] + LETTER : LETTER / 2); });
  let most = HEIGHT - LETTER / 2;
  for (const at of order.reverse()) {
    moved[at] = Math.min(moved[at], most);
    most = moved[at] - LETTER;
  }
  return moved;
}
