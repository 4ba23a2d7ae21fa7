// What is read, and how much is generated.

import { button, h } from "../dom.js";

const MOST_OF_TEXT = 1 << 18; // bytes of the text, its alternatives, and its neurons: they come in one piece
const ALTERNATIVES = 5; // likeliest tokens that are asked for, where there is room
const FIELDS = [
  // name, label, attributes
  ["max_tokens", "Tokens to generate", { min: 0, max: 1_000_000, step: 1, value: 200, required: true }],
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.05, value: 0.8, required: true }],
  ["seed", "Seed", { step: 1, placeholder: "any" }],
  ["top", "Strongest neurons of a layer", { min: 1, max: 128, step: 1, value: 8, required: true }],
];

/** Calls `onRun({top, alternatives, body})`, where 0 is none, and `onStop()`. */
export class Form {
  #prompt = h("textarea", { name: "prompt", rows: 3, required: true, spellcheck: false, value: "ROMEO:\n" });
  #run = h("button", { class: "primary", disabled: true }, "Look");
  #stop = button("Stop", () => this.onStop(), { hidden: true });
  #count = h("span", { class: "hint" });
  #problem = h("p", { class: "error", role: "alert", hidden: true });
  #note = h("p", { class: "hint", role: "status", hidden: true });
  #layers = 0;
  #most = 0; // neurons of a response
  #idsOnly = false;

  constructor({ onRun, onStop }) {
    Object.assign(this, { onRun, onStop });
    this.inputs = Object.fromEntries(FIELDS.map(([name, , attributes]) => [name, h("input", { type: "number", name, ...attributes })]));
    this.label = h("span", {}, "Text that the model reads");
    const fields = FIELDS.map(([name, label]) => h("label", {}, label, this.inputs[name]));
    this.element = h("form", { class: "panel ask", onsubmit: (event) => this.#submit(event) },
      h("label", { class: "wide" }, this.label, this.#prompt), h("div", { class: "fields" }, fields), this.#problem, this.#note,
      h("div", { class: "row" }, this.#run, this.#stop, this.#count));
    this.#prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !this.#run.disabled) this.element.requestSubmit();
    });
  }

  /** The chosen model is known. */
  ready({ layers, most, idsOnly }) {
    this.#layers = layers;
    this.#most = most;
    this.#run.disabled = false;
    this.inputs.top.parentElement.hidden = !layers;
    this.label.textContent = idsOnly ? "Token ids that the model reads" : "Text that the model reads";
    if (idsOnly && !this.#idsOnly) this.#prompt.value = "1, 2, 3";
    this.#idsOnly = idsOnly;
  }

  running(does) {
    this.#run.disabled = does;
    this.#stop.hidden = !does;
    if (does) this.blame(null);
  }

  count(tokens) {
    this.#count.textContent = tokens ? `${tokens.toLocaleString()} tokens` : "";
  }

  /** Marks the field that an error is about. */
  blame(param) {
    const name = param?.split(/[.[]/).at(-1);
    for (const field of [this.#prompt, ...Object.values(this.inputs)]) {
      if (param !== null && (field.name === name || field.name === param)) field.setAttribute("aria-invalid", "true");
      else field.removeAttribute("aria-invalid");
    }
  }

  #submit(event) {
    event.preventDefault();
    const { max_tokens: most, temperature, seed, top } = this.inputs;
    const problem = this.#idsOnly ? this.#wrongIds() : null;
    const size = this.#idsOnly ? this.#ids().length : new TextEncoder().encode(this.#prompt.value).length;
    if (problem !== null) return this.#refuse(problem, "prompt");
    if (size > MOST_OF_TEXT) return this.#refuse(`The text has ${size.toLocaleString()} bytes: at most ${MOST_OF_TEXT.toLocaleString()} can be looked at.`, "prompt");
    const shown = this.#layers ? Math.min(top.valueAsNumber, this.#room(size, most.valueAsNumber)) : 0;
    this.#problem.hidden = true;
    this.#tell(shown, top.valueAsNumber);
    const body = { prompt: this.#idsOnly ? this.#ids() : this.#prompt.value, max_tokens: most.valueAsNumber, temperature: temperature.valueAsNumber };
    if (!Number.isNaN(seed.valueAsNumber)) body.seed = seed.valueAsNumber;
    this.onRun({ top: shown, alternatives: Math.min(ALTERNATIVES, Math.floor(MOST_OF_TEXT / Math.max(1, size))), body });
  }

  /** How many neurons of a layer there is room for, of a text of so many bytes and what is generated. */
  #room(size, generated) {
    const ofText = Math.floor(MOST_OF_TEXT / Math.max(1, size * this.#layers)) - 1; // shares take room, too
    return Math.max(0, Math.min(ofText, Math.floor(this.#most / ((size + generated + 1) * this.#layers))));
  }

  #tell(shown, wanted) {
    this.#note.hidden = !this.#layers || shown >= wanted;
    this.#note.textContent = shown ? `Of so many tokens, the ${shown} strongest neurons of a layer are shown, not ${wanted}.` : "These are too many tokens to show their neurons.";
  }

  #ids() {
    return this.#prompt.value.split(/[\s,]+/).filter(Boolean).map(Number);
  }

  #wrongIds() {
    const wrong = this.#ids().some((id) => !Number.isInteger(id) || id < 0);
    return wrong || !this.#ids().length ? "Token ids are whole numbers, from 0, with spaces or commas between them." : null;
  }

  #refuse(text, name) {
    this.#problem.textContent = text;
    this.#problem.hidden = false;
    this.blame(name);
  }
}
