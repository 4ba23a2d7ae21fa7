// What is kept of a text's tokens: their names, log-probabilities, and the neurons that they fired. Typed arrays, which
// grow up to a bound: then the oldest tokens go. It knows no element.

import { bytesOf } from "./words.js";

export const MOST_TOKENS = 1 << 17;
export const MOST_NEURONS = 1 << 21; // of all tokens together: 16 MiB
const MOST_NAMES = 1 << 18; // distinct ones: no vocabulary of ours has as many
const FIRST_ROOM = 1024; // tokens
const PARTIAL = "·"; // what is shown of a token that ends within a character

/** Tokens, in the order in which they were read. Positions count from the first token; those before `begin` are gone. */
export class History {
  #room;
  #names = new Names();
  #decoder = new TextDecoder();
  #arrays;

  /** `shape`: {layers, heads, perHead}; `top`: strongest neurons of a layer; `alternatives`: of each token. */
  constructor(shape, top, alternatives) {
    Object.assign(this, { shape, top, alternatives, named: 0, fired: 0, complete: false });
    this.capacity = Math.max(1, Math.min(MOST_TOKENS, Math.floor(MOST_NEURONS / Math.max(1, shape.layers * top))));
    this.#room = Math.min(FIRST_ROOM, this.capacity);
    this.#arrays = this.#made(this.#room);
  }

  /** Behind the last token that can be shown. Names may come later than neurons; in the end, some have none. */
  get end() {
    return this.complete ? this.#last : this.named;
  }

  get begin() {
    return Math.max(0, this.#last - this.capacity);
  }

  get #last() {
    return Math.max(this.named, this.fired);
  }

  get bytes() {
    return Object.values(this.#arrays).reduce((sum, each) => sum + each.byteLength, 0);
  }

  /** Adds what a chunk's `logprobs` has of its tokens: of those after the last that it had. */
  addNames({ tokens, token_logprobs: logprobs, top_logprobs: tops }) {
    tokens.forEach((name, at) => {
      const slot = this.#slot(this.named);
      this.named += 1;
      const { names, labels, logprob, other, otherLogprob } = this.#arrays;
      names[slot] = this.#names.number(name);
      labels[slot] = this.#names.number(this.#label(name));
      logprob[slot] = logprobs[at] ?? NaN;
      // An object has keys that look like numbers in an order of their own.
      const ranked = Object.entries(tops?.[at] ?? {}).sort(([, a], [, b]) => b - a);
      for (let rank = 0; rank < this.alternatives; rank += 1) {
        const known = rank < ranked.length;
        other[slot * this.alternatives + rank] = known ? this.#names.number(ranked[rank][0]) : 0;
        otherLogprob[slot * this.alternatives + rank] = known ? ranked[rank][1] : NaN;
      }
    });
  }

  /** Adds what a chunk's `neurons` has of its tokens: of those after the last that it had. */
  addNeurons(entries) {
    const { layers, perHead } = this.shape;
    for (const { token_id: id, layers: found } of entries) {
      const slot = this.#slot(this.fired);
      this.fired += 1;
      const { ids, active, strongest, values } = this.#arrays;
      ids[slot] = id;
      for (let layer = 0; layer < layers; layer += 1) {
        const row = slot * layers + layer;
        active[row] = found[layer].active;
        for (let rank = 0; rank < this.top; rank += 1) {
          const neuron = found[layer].strongest[rank];
          strongest[row * this.top + rank] = neuron ? neuron.head * perHead + neuron.neuron + 1 : 0; // 0: none
          values[row * this.top + rank] = neuron ? neuron.value : 0;
        }
      }
    }
  }

  /** A token: {label, name, id, logprob, others}. `label` is what is shown of it; unknown numbers are NaN. */
  token(position) {
    const slot = position % this.#room;
    const { names, labels, ids, logprob, other, otherLogprob } = this.#arrays;
    const named = position < this.named;
    const id = position < this.fired ? ids[slot] : null;
    const others = [];
    for (let rank = 0; named && rank < this.alternatives; rank += 1) {
      const at = slot * this.alternatives + rank;
      if (other[at]) others.push({ name: this.#names.name(other[at]), logprob: otherLogprob[at] });
    }
    const unnamed = `token ${id}`; // as those of a stop string, which the text does not have
    return {
      label: named ? this.#names.name(labels[slot]) : unnamed,
      name: named ? this.#names.name(names[slot]) : unnamed,
      logprob: named ? logprob[slot] : NaN,
      id,
      others,
    };
  }

  /** The share of a layer's neurons that a token fired. */
  active(position, layer) {
    return this.#arrays.active[(position % this.#room) * this.shape.layers + layer];
  }

  /** Calls `visit(head, neuron, value)` for each of a token's strongest in a layer, the strongest first. */
  strongest(position, layer, visit) {
    const begin = ((position % this.#room) * this.shape.layers + layer) * this.top;
    const { strongest, values } = this.#arrays;
    for (let at = begin; at < begin + this.top && strongest[at]; at += 1) {
      const code = strongest[at] - 1;
      visit(Math.floor(code / this.shape.perHead), code % this.shape.perHead, values[at]);
    }
  }

  /** How strongly a token fires a neuron, {layer, head, neuron}; 0 where it is not among its layer's strongest. */
  value(position, { layer, head, neuron }) {
    const wanted = head * this.shape.perHead + neuron + 1;
    const begin = ((position % this.#room) * this.shape.layers + layer) * this.top;
    const { strongest, values } = this.#arrays;
    for (let at = begin; at < begin + this.top; at += 1) if (strongest[at] === wanted) return values[at];
    return 0;
  }

  /** The tokens that fire a neuron, as [position, value], the strongest first. */
  occurrences(neuron) {
    const found = [];
    for (let position = this.begin; position < this.fired; position += 1) {
      const value = this.value(position, neuron);
      if (value) found.push([position, value]);
    }
    return found.sort(([, a], [, b]) => b - a);
  }

  #label(name) {
    const bytes = bytesOf(name);
    if (!bytes) return this.#decoder.decode() + name; // what was left of a character never came
    return this.#decoder.decode(Uint8Array.from(bytes), { stream: true }) || PARTIAL;
  }

  #slot(position) {
    if (position >= this.#room && this.#room < this.capacity) {
      const larger = this.#made(Math.min(this.capacity, this.#room * 2));
      for (const [name, array] of Object.entries(this.#arrays)) larger[name].set(array);
      this.#room = Math.min(this.capacity, this.#room * 2);
      this.#arrays = larger;
    }
    return position % this.#room;
  }

  #made(room) {
    const rows = room * this.shape.layers;
    return {
      names: new Uint32Array(room),
      labels: new Uint32Array(room),
      ids: new Uint32Array(room),
      logprob: new Float32Array(room),
      other: new Uint32Array(room * this.alternatives),
      otherLogprob: new Float32Array(room * this.alternatives),
      active: new Float32Array(rows),
      strongest: new Uint32Array(rows * this.top),
      values: new Float32Array(rows * this.top),
    };
  }
}

/** Numbers for names: a name is kept once, however many tokens have it. 0 is no name. */
class Names {
  #known = ["…"];
  #numbers = new Map();

  number(name) {
    let number = this.#numbers.get(name);
    if (number === undefined) {
      if (this.#known.length >= MOST_NAMES) return 0;
      number = this.#known.push(name) - 1;
      this.#numbers.set(name, number);
    }
    return number;
  }

  name(number) {
    return this.#known[number];
  }
}
