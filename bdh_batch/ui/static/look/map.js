// The map of neurons: a row for each layer, a column for each head, a dot for each neuron, or for some of them where
// there are very many. It lights up as tokens come, and fades; or shows one token. One draw, however many tokens came.

import { h } from "../dom.js";
import { colour, onThemeChange } from "../theme.js";

const MOST_DOTS = 1 << 20;
const MOST_AT_ONCE = 64; // tokens that one draw looks at: those before them would have faded
const FADES = 0.9; // what is left after a draw
const STAYS = 0.7; // of what the last token fires, until the next one comes
const DARK = 1 / 64;
const GAP = 2; // dots between cells
const STEPS = 256;

/** Where each neuron has its dot. */
export class Layout {
  constructor({ layers, heads, perHead }) {
    Object.assign(this, { layers, heads, perHead });
    this.dots = Math.max(1, Math.min(perHead, Math.floor(MOST_DOTS / (layers * heads))));
    this.across = Math.ceil(Math.sqrt(this.dots));
    this.down = Math.ceil(this.dots / this.across);
    this.width = heads * (this.across + GAP) - GAP;
    this.height = layers * (this.down + GAP) - GAP;
  }

  /** The index of a neuron's dot, in the order of layers, heads and neurons. */
  index(layer, head, neuron) {
    return (layer * this.heads + head) * this.dots + Math.floor((neuron * this.dots) / this.perHead);
  }

  /** [x, y] of a dot. */
  at(index) {
    const cell = Math.floor(index / this.dots);
    const dot = index % this.dots;
    const x = (cell % this.heads) * (this.across + GAP) + (dot % this.across);
    return [x, Math.floor(cell / this.heads) * (this.down + GAP) + Math.floor(dot / this.across)];
  }

  /** The first neuron of the dot at x and y, {layer, head, neuron}; null between cells. */
  neuron(x, y) {
    const head = Math.floor(x / (this.across + GAP));
    const layer = Math.floor(y / (this.down + GAP));
    const column = Math.floor(x) % (this.across + GAP);
    const dot = (Math.floor(y) % (this.down + GAP)) * this.across + column;
    if (column >= this.across || dot >= this.dots || head >= this.heads || layer >= this.layers) return null;
    return { layer, head, neuron: Math.ceil((dot * this.perHead) / this.dots) };
  }
}

/** Calls `onPick(neuron)`. `moves`: whether what has fired fades slowly. */
export class NeuronMap {
  #layout = null;
  #levels = new Float32Array(0); // 0 to 1, of each dot
  #kept = new Float32Array(0); // what they do not fall below
  #largest = new Float32Array(0); // activation so far, of each layer
  #pixels = null;
  #places = new Uint32Array(0); // in the pixels, of each dot
  #palette = new Uint32Array(STEPS);
  #canvas = h("canvas", { role: "img", width: 1, height: 1 });
  #ring = h("div", { class: "ring", hidden: true });
  #heads = h("div", { class: "heads", aria: { hidden: "true" } });
  #layers = h("div", { class: "layers", aria: { hidden: "true" } });

  constructor(onPick, moves) {
    this.moves = moves;
    const dots = h("div", { class: "dots" }, this.#canvas, this.#ring);
    this.element = h("div", { class: "map" }, this.#heads, this.#layers, dots);
    this.#canvas.addEventListener("click", (event) => {
      const box = this.#canvas.getBoundingClientRect();
      const scale = this.#canvas.width / box.width;
      const picked = this.#layout?.neuron((event.clientX - box.left) * scale, (event.clientY - box.top) * scale);
      if (picked) onPick(picked);
    });
    onThemeChange(() => this.#paint());
  }

  reset(shape) {
    this.#layout = shape.layers ? new Layout(shape) : null;
    this.element.hidden = this.#layout === null;
    this.ring(null);
    if (!this.#layout) return;
    const { layers, heads, perHead } = shape;
    const { width, height, dots } = this.#layout;
    this.#levels = new Float32Array(layers * heads * dots);
    this.#kept = new Float32Array(layers * heads * dots);
    this.#largest = new Float32Array(layers);
    Object.assign(this.#canvas, { width, height });
    this.#pixels = new ImageData(width, height);
    this.#places = Uint32Array.from(this.#levels, (_, index) => {
      const [x, y] = this.#layout.at(index);
      return y * width + x;
    });
    this.#heads.replaceChildren(...numbered(heads, "head"));
    this.#layers.replaceChildren(...numbered(layers, "layer"));
    this.#canvas.setAttribute("aria-label", `Map of neurons: ${layers} layers, ${heads} heads of ${perHead}; as a table below`);
    this.#paint();
  }

  /** Lights what the tokens from `from` up to `to` fire. */
  light(history, from, to) {
    if (!this.#layout || to <= from) return;
    if (!this.moves) this.#levels.fill(0);
    for (let position = this.moves ? Math.max(from, to - MOST_AT_ONCE) : to - 1; position < to; position += 1) {
      this.#add(this.#levels, history, position, FADES ** (to - 1 - position));
    }
    this.#kept.fill(0);
    this.#add(this.#kept, history, to - 1, STAYS);
  }

  /** Shows one token alone. */
  show(history, position) {
    if (!this.#layout) return;
    this.#levels.fill(0);
    this.#add(this.#levels, history, position, 1);
    this.#draw();
  }

  /** Draws what is lit; afterwards it is less. Returns whether there is more to draw. */
  fade() {
    if (!this.#layout) return false;
    this.#draw();
    if (!this.moves) return false;
    let fades = false;
    for (let at = 0; at < this.#levels.length; at += 1) {
      if (this.#levels[at] <= this.#kept[at]) continue;
      const left = this.#levels[at] * FADES;
      this.#levels[at] = Math.max(this.#kept[at], left < DARK ? 0 : left);
      fades = true;
    }
    return fades;
  }

  /** Puts a ring round a neuron's dot; null takes it away. */
  ring(neuron) {
    this.#ring.hidden = neuron === null || !this.#layout;
    if (this.#ring.hidden) return;
    const { width, height } = this.#layout;
    const [x, y] = this.#layout.at(this.#layout.index(neuron.layer, neuron.head, neuron.neuron));
    Object.assign(this.#ring.style, { left: `${((x + 0.5) * 100) / width}%`, top: `${((y + 0.5) * 100) / height}%` });
  }

  #add(levels, history, position, share) {
    for (let layer = 0; layer < this.#layout.layers; layer += 1) {
      history.strongest(position, layer, (head, neuron, value) => {
        this.#largest[layer] = Math.max(this.#largest[layer], value);
        const at = this.#layout.index(layer, head, neuron);
        levels[at] = Math.max(levels[at], Math.sqrt(value / this.#largest[layer]) * share);
      });
    }
  }

  #draw() {
    const shown = new Uint32Array(this.#pixels.data.buffer);
    for (let at = 0; at < this.#levels.length; at += 1) {
      shown[this.#places[at]] = this.#palette[Math.min(STEPS - 1, Math.floor(this.#levels[at] * STEPS))];
    }
    this.#canvas.getContext("2d").putImageData(this.#pixels, 0, 0);
  }

  #paint() {
    const [dark, bright] = ["--raised", "--accent"].map((name) => colour(name).match(/[\d.]+/g).slice(0, 3).map(Number));
    this.#palette = Uint32Array.from({ length: STEPS }, (_, step) => {
      const [red, green, blue] = dark.map((from, at) => Math.round(from + ((bright[at] - from) * step) / (STEPS - 1)));
      return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
    });
    if (this.#layout) this.#draw();
  }
}

function numbered(count, name) {
  return Array.from({ length: count }, (_, at) => h("span", {}, count > 16 ? `${at}` : `${name} ${at}`));
}
