// What is known of one token, and of one neuron, as text and tables: all that the map and the chart show is here, too.

import { button, h } from "../dom.js";
import { neuronName, percent, probability, quoted } from "./words.js";

const MOST_SHOWN = 16; // neurons of a layer
const MOST_TOKENS = 50;
const AROUND = 12; // tokens before one, in a list of them; after it, half as many

/** A token: its alternatives, and its strongest neurons. Calls `onNeuron(neuron)`. */
export class TokenDetails {
  element = h("section", { class: "panel token", aria: { label: "The chosen token" } });

  constructor(onNeuron) {
    this.onNeuron = onNeuron;
    this.reset();
  }

  reset() {
    this.element.replaceChildren(h("h2", {}, "Token"), h("p", { class: "hint" }, "Choose a token of the text to see what it fires."));
  }

  show(history, position) {
    const { name, id, logprob, others } = history.token(position);
    const facts = [`Number ${(position + 1).toLocaleString()}`, id === null ? null : `id ${id}`, probability(logprob)];
    const shown = [h("h2", {}, `Token ${quoted(name)}`), h("p", { class: "hint" }, facts.filter(Boolean).join(", "))];
    if (others.length) shown.push(h("h3", {}, "The likeliest in its place"), likeliest(others));
    if (position < history.fired && history.shape.layers) shown.push(h("h3", {}, "Its strongest neurons"), this.#strongest(history, position));
    this.element.replaceChildren(...shown);
  }

  #strongest(history, position) {
    const rows = Array.from({ length: history.shape.layers }, (_, layer) => {
      const neurons = [];
      history.strongest(position, layer, (head, neuron, value) => {
        if (neurons.length < MOST_SHOWN) neurons.push(this.#button({ layer, head, neuron }, value));
      });
      return h("tr", {}, h("th", { scope: "row" }, `${layer}`), h("td", {}, percent(history.active(position, layer))), h("td", {}, h("div", { class: "row" }, neurons)));
    });
    return table("Strongest neurons of each layer", ["Layer", "Fire", "Head:neuron and activation"], rows);
  }

  #button(neuron, value) {
    const label = `${neuronName(neuron)}, activation ${value.toFixed(2)}`;
    return button(`${neuron.head}:${neuron.neuron} ${value.toFixed(2)}`, () => this.onNeuron(neuron), { class: "small", aria: { label } });
  }
}

/** A neuron: the tokens of this text that fire it, and where it fires in the text that `model neurons` read.
 *  Calls `onToken(position)`, and `onNeuron(neuron)` for one that is asked for by its numbers. */
export class NeuronDetails {
  element = h("section", { class: "panel neuron", aria: { label: "The chosen neuron" } });
  #body = h("div", {});
  #inputs = {};
  #studied = h("div", {});

  constructor(onToken, onNeuron) {
    this.onToken = onToken;
    for (const name of ["layer", "head", "neuron"]) {
      this.#inputs[name] = h("input", { type: "number", name, min: 0, step: 1, value: 0, required: true });
    }
    const fields = Object.entries(this.#inputs).map(([name, input]) => h("label", {}, `${name} `, input));
    const form = h("form", { class: "row numbers", onsubmit: (event) => this.#asked(event, onNeuron) }, fields, h("button", { class: "small" }, "Show"));
    this.element.append(h("h2", {}, "Neuron"), form, this.#body);
    this.reset({ layers: 1, heads: 1, perHead: 1 });
  }

  reset({ layers, heads, perHead }) {
    for (const [name, count] of [["layer", layers], ["head", heads], ["neuron", perHead]]) this.#inputs[name].max = Math.max(0, count - 1);
    this.#body.replaceChildren(h("p", { class: "hint" }, "Choose a dot of the map, or a neuron of a token, to see for which tokens it fires."));
  }

  /** Returns how many tokens of the text it fires for. */
  show(history, neuron) {
    const found = history.occurrences(neuron);
    for (const [name, value] of Object.entries(neuron)) this.#inputs[name].value = value;
    this.#studied = h("div", { aria: { live: "polite" } }, h("p", { class: "hint" }, "Looking it up…"));
    this.#body.replaceChildren(h("h3", {}, "In this text"), ...this.#here(history, found), h("h3", {}, "In the text it was studied with"), this.#studied);
    return found.length;
  }

  /** Shows what /v1/neurons/contexts returned, of the text that `study` is of. */
  showStudy(study, { active, contexts }) {
    const rows = contexts.map(({ value, before, token, after }) =>
      h("tr", {}, h("td", {}, value.toFixed(2)), h("td", {}, h("code", {}, before, h("mark", {}, token), after))),
    );
    const of = study ? ` of ${study.text} (${study.tokens.toLocaleString()})` : "";
    const share = h("p", { class: "hint" }, active ? `It fires for ${percent(active)} of the tokens${of}.` : `It fires for no token${of}.`);
    this.#studied.replaceChildren(share, ...(rows.length ? [table("Where it fires most", ["Activation", "Text"], rows)] : []));
  }

  showProblem(text) {
    this.#studied.replaceChildren(h("p", { class: "hint" }, text));
  }

  #here(history, found) {
    const seen = history.fired - history.begin;
    const text = `It is among its layer's ${history.top} strongest for ${found.length.toLocaleString()} of ${seen.toLocaleString()} tokens`;
    const most = found.length > MOST_TOKENS ? `; the strongest ${MOST_TOKENS} are:` : ".";
    const items = found.slice(0, MOST_TOKENS).map(([position, value]) => h("li", {}, this.#occurrence(history, position, value)));
    return [h("p", { class: "hint" }, text + most), ...(items.length ? [h("ol", { class: "occurrences" }, items)] : [])];
  }

  #occurrence(history, position, value) {
    const text = (from, until) => {
      let joined = "";
      for (let at = Math.max(history.begin, from); at < Math.min(history.end, until); at += 1) joined += history.token(at).label;
      return joined;
    };
    const { label, name } = history.token(position);
    const shown = h("code", {}, text(position - AROUND, position), h("mark", {}, label), text(position + 1, position + 1 + AROUND / 2));
    const spoken = `${quoted(name)}, token ${position + 1}, activation ${value.toFixed(2)}`;
    const occurrence = button(`${value.toFixed(2)} `, () => this.onToken(position), { class: "small", aria: { label: spoken } });
    occurrence.append(shown);
    return occurrence;
  }

  #asked(event, onNeuron) {
    event.preventDefault();
    const numbers = Object.entries(this.#inputs).map(([name, input]) => [name, input.valueAsNumber]);
    onNeuron(Object.fromEntries(numbers));
  }
}

/** The map as a table, of one token: how many of a layer's strongest are of each head, and the strongest of them. */
export function mapTable(history, position) {
  const { layers, heads } = history.shape;
  const rows = Array.from({ length: layers }, (_, layer) => {
    const counts = new Uint32Array(heads);
    const most = new Float32Array(heads);
    history.strongest(position, layer, (head, neuron, value) => {
      counts[head] += 1;
      most[head] = Math.max(most[head], value);
    });
    const cells = Array.from(counts, (count, head) => h("td", {}, count ? `${count}, up to ${most[head].toFixed(2)}` : "none"));
    return h("tr", {}, h("th", { scope: "row" }, `${layer}`), cells);
  });
  const headings = ["Layer", ...Array.from({ length: heads }, (_, head) => `Head ${head}`)];
  return table(`Of token ${position + 1}, ${quoted(history.token(position).name)}: strongest neurons by layer and head`, headings, rows);
}

function likeliest(others) {
  const rows = others.map(({ name, logprob }) =>
    h("tr", {}, h("td", {}, h("code", {}, quoted(name))), h("td", {}, percent(Math.exp(logprob))), h("td", {}, logprob.toFixed(2))),
  );
  return table("The likeliest tokens in its place", ["Token", "Probability", "Logarithm"], rows);
}

function table(caption, headings, rows) {
  const head = h("thead", {}, h("tr", {}, headings.map((text) => h("th", { scope: "col" }, text))));
  return h("div", { class: "scroll", tabIndex: 0, role: "region", aria: { label: caption } }, h("table", {}, h("caption", { class: "unseen" }, caption), head, h("tbody", {}, rows)));
}
