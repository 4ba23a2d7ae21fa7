// Look: what each token of a text fires, and how likely the model found it, as it is read or generated.

import { wasAborted } from "../api.js";
import { button, h, oncePerFrame } from "../dom.js";
import { SparsityChart } from "./chart.js";
import { NeuronDetails, TokenDetails, mapTable } from "./details.js";
import { Form } from "./form.js";
import { History } from "./history.js";
import { Letters } from "./letters.js";
import { NeuronMap } from "./map.js";
import { neuronName } from "./words.js";

const NO_NEURONS = { layers: 0, heads: 0, perHead: 1 };
const NO_STUDY = "The model has no usable neurons/neurons.json; `bdh-batch model neurons --out …/neurons` makes it.";
const SLICE = 20; // milliseconds of work on a stream, before anything else gets its turn
const AT_ONCE = 1024; // tokens whose names are added without a look at the time
const SELDOM = 250; // milliseconds between draws of what takes longer

export function mount(element, context) {
  const look = new Look(element, context);
  return { show: () => look.show(), hide: () => {} };
}

class Look {
  #shape = NO_NEURONS;
  #study = null;
  #asked = null; // the name of the model whose shape is known, or asked for
  #history = new History(NO_NEURONS, 1, 0);
  #lit = 0; // tokens that the map has seen
  #selected = null;
  #running = null;
  #drawnSeldom = 0;
  #live = button("Live again", () => this.#goLive(), { class: "small", hidden: true });
  #problem = h("p", { class: "error", role: "alert", hidden: true });
  #note = h("p", { class: "hint", hidden: true });
  #table = h("div", {});
  #draw = oncePerFrame(() => this.#frame());

  constructor(element, context) {
    this.context = context;
    const still = matchMedia("(prefers-reduced-motion: reduce)");
    this.form = new Form({ onRun: (asked) => this.#run(asked), onStop: () => this.#running?.abort() });
    this.letters = new Letters((position) => this.#select(position));
    this.map = new NeuronMap((neuron) => this.#pick(neuron), !still.matches);
    still.addEventListener("change", () => { this.map.moves = !still.matches; });
    this.chart = new SparsityChart((position) => this.letters.select(position));
    this.token = new TokenDetails((neuron) => this.#pick(neuron));
    this.neuron = new NeuronDetails((position) => this.letters.select(position, { focus: true }), (neuron) => this.#pick(neuron));
    this.tableOf = h("details", { ontoggle: () => this.#showTable() }, h("summary", {}, "The map as a table"), this.#table);
    element.append(this.#layout());
    context.models.addEventListener("change", () => this.#learn());
    this.#begin(new History(NO_NEURONS, 1, 0));
  }

  show() {
    this.#learn();
    this.#draw();
  }

  #layout() {
    const seen = h("section", { class: "panel neurons", aria: { label: "Neurons" } }, h("div", { class: "row" }, h("h2", {}, "Neurons"), this.#live), this.map.element, this.tableOf,
      h("h3", {}, "Share that fires, by layer"), this.chart.element);
    this.neurons = seen;
    const text = h("section", { class: "panel", aria: { label: "Text" } }, h("h2", {}, "Text"), this.letters.element);
    const left = h("div", { class: "column" }, this.form.element, this.#note, this.#problem, text, this.token.element);
    return h("div", { class: "look" }, left, h("div", { class: "column" }, seen, this.neuron.element));
  }

  /** Asks how many neurons the chosen model has, and whether it has a tokenizer. */
  async #learn() {
    const { api, models } = this.context;
    const name = models.chosen;
    if (!name || name === this.#asked) return;
    this.#asked = name;
    const query = `?model=${encodeURIComponent(name)}`;
    const notes = [];
    let shape = NO_NEURONS;
    let study = null;
    let most = 0;
    try {
      const found = await api.json(`v1/neurons${query}`);
      shape = { layers: found.layers, heads: found.heads, perHead: found.neurons_per_head };
      most = found.max_neurons;
      study = found.study;
    } catch (error) {
      if (error.status === 404) notes.push(`${error.message} Its text and log-probabilities are shown where it has them.`);
      else return this.#forget(name, error);
    }
    const tokenizer = await api.json(`tokenizer_info${query}`).catch((error) => this.#forget(name, error));
    if (!tokenizer || this.#asked !== name) return;
    const idsOnly = shape.layers > 0 && tokenizer.tokenizer_class === "TokenIdsOnly"; // an upstream may have one
    if (idsOnly) notes.push("This model has no tokenizer: write token ids, with spaces or commas between them.");
    this.#shape = shape;
    this.#study = study;
    this.#note.textContent = notes.join(" ");
    this.#note.hidden = !notes.length;
    this.#problem.hidden = true;
    this.form.ready({ layers: shape.layers, most, idsOnly });
    if (!this.#running) this.#begin(new History(shape, this.#history.top, 0));
  }

  /** It is asked again when there is a reason to: another model, another key, the server is back. */
  #forget(name, error) {
    if (this.#asked === name) this.#asked = null;
    this.#complain(error);
  }

  #begin(history) {
    this.#history = history;
    this.#lit = 0;
    this.#selected = null;
    this.#problem.hidden = this.#live.hidden = true;
    this.neurons.hidden = this.neuron.element.hidden = !history.shape.layers;
    this.letters.reset(history);
    this.map.reset(history.shape);
    this.chart.reset(history);
    this.token.reset();
    this.neuron.reset(history.shape);
    this.#showTable();
  }

  async #run(asked) {
    const { api, models, announce } = this.context;
    const history = new History(asked.top ? this.#shape : NO_NEURONS, asked.top || 1, asked.alternatives);
    this.#begin(history);
    const running = new AbortController();
    this.#running = running;
    this.form.running(true);
    announce("The model begins to read.");
    try {
      const body = { ...asked.body, model: models.chosen, echo: true, logprobs: asked.alternatives, stream: true };
      if (asked.top) body.neurons = { top: asked.top };
      await this.#read(api.chunks("v1/completions", { body, signal: running.signal }), history);
      announce(`Done: ${history.end} tokens.`);
    } catch (error) {
      if (!wasAborted(error)) this.#complain(error);
      else announce(`Stopped after ${history.end} tokens.`);
    } finally {
      this.#running = null;
      history.complete = true;
      this.form.running(false);
      this.#drawnSeldom = 0;
      this.#draw();
    }
  }

  async #read(chunks, history) {
    const upstream = !this.#shape.layers;
    let until = performance.now() + SLICE;
    const others = async () => {
      this.#draw();
      if (performance.now() < until) return;
      await new Promise((resolve) => { setTimeout(resolve); });
      until = performance.now() + SLICE;
    };
    for await (const { choices } of chunks) {
      for (const { text, logprobs, neurons } of choices) {
        for (const part of parts(logprobs)) {
          history.addNames(part);
          await others();
        }
        if (text && !logprobs && upstream) history.addNames({ tokens: [text], token_logprobs: [null] });
        if (neurons) history.addNeurons(neurons);
      }
      await others();
    }
  }

  /** One draw for all that has come since the last. */
  #frame() {
    const history = this.#history;
    this.letters.draw();
    const live = this.#selected === null;
    if (live && history.shape.layers) {
      this.map.light(history, this.#lit, history.fired);
      if (this.map.fade()) this.#draw();
    }
    this.#lit = history.fired;
    if (performance.now() - this.#drawnSeldom < SELDOM) return;
    this.#drawnSeldom = performance.now();
    this.form.count(history.end);
    this.chart.draw();
    if (live) this.#showTable();
  }

  #select(position) {
    this.#selected = position;
    this.#live.hidden = false;
    this.token.show(this.#history, position);
    if (position < this.#history.fired) this.map.show(this.#history, position);
    this.chart.select(position);
    this.#showTable();
  }

  #goLive() {
    this.#selected = null;
    this.#live.hidden = true;
    this.chart.select(null);
    this.letters.follow = true;
    this.#draw();
  }

  #showTable() {
    const position = this.#selected ?? this.#history.fired - 1;
    const { begin, fired, shape } = this.#history;
    if (!this.tableOf.open) return;
    if (shape.layers && position >= begin && position < fired) this.#table.replaceChildren(mapTable(this.#history, position));
    else this.#table.replaceChildren(h("p", { class: "hint" }, "No token has been read."));
  }

  async #pick(neuron) {
    this.picked = neuron;
    const count = this.neuron.show(this.#history, neuron);
    this.letters.mark(neuron);
    this.map.ring(neuron);
    this.context.announce(`${neuronName(neuron)}: ${count} tokens of this text.`);
    if (this.#study === null) return this.neuron.showProblem(NO_STUDY);
    const query = new URLSearchParams({ model: this.#asked ?? "", ...neuron });
    try {
      const found = await this.context.api.json(`v1/neurons/contexts?${query}`);
      if (this.picked === neuron) this.neuron.showStudy(this.#study, found);
    } catch (error) {
      if (this.picked === neuron) this.neuron.showProblem(error.message);
    }
  }

  #complain(error) {
    this.#problem.textContent = error.message;
    this.#problem.hidden = false;
    this.form.blame(error.param);
  }
}

/** Log-probabilities of a chunk, a part at a time: those of a text come all at once. */
function* parts(logprobs) {
  for (let at = 0; at < (logprobs?.tokens.length ?? 0); at += AT_ONCE) {
    const { tokens, token_logprobs: own, top_logprobs: tops } = logprobs;
    yield { tokens: tokens.slice(at, at + AT_ONCE), token_logprobs: own.slice(at, at + AT_ONCE), top_logprobs: tops?.slice(at, at + AT_ONCE) };
  }
}
