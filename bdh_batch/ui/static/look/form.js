// What is read, and how much is generated.

import { button, h } from "../dom.js";

const MOST_OF_TEXT = 1 << 18; // neurons of the text: they come in one piece, which the browser takes apart at once
const FIELDS = [
  // name, label, attributes
  ["max_tokens", "Tokens to generate", { min: 0, max: 1_000_000, step: 1, value: 200, required: true }],
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.05, value: 0.8, required: true }],
  ["seed", "Seed", { step: 1, placeholder: "any" }],
  ["top", "Strongest neurons of a layer", { min: 1, max: 128, step: 1, value: 8, required: true }],
];

/** Calls `onRun({top, body})`, and `onStop()`. */
export class Form {
  #prompt = h("textarea", { name: "prompt", rows: 3, required: true, spellcheck: false, value: "ROMEO:\n" });
  #run = h("button", { class: "primary", disabled: true }, "Look");
  #stop = button("Stop", () => this.onStop(), { hidden: true });
  #count = h("span", { class: "hint" });
  #problem = h("p", { class: "error", role: "alert", hidden: true });
  #layers = 0;
  #idsOnly = false;

  constructor({ onRun, onStop }) {
    Object.assign(this, { onRun, onStop });
    this.inputs = Object.fromEntries(FIELDS.map(([name, , attributes]) => [name, h("input", { type: "number", name, ...attributes })]));
    this.label = h("span", {}, "Text that the model reads");
    const fields = FIELDS.map(([name, label]) => h("label", {}, label, this.inputs[name]));
    this.element = h("form", { class: "panel ask", onsubmit: (event) => this.#submit(event) },
      h("label", { class: "wide" }, this.label, this.#prompt), h("div", { class: "fields" }, fields), this.#problem,
      h("div", { class: "row" }, this.#run, this.#stop, this.#count));
    this.#prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !this.#run.disabled) this.element.requestSubmit();
    });
  }

  /** The chosen model is known. */
  ready({ layers, idsOnly }) {
    this.#layers = layers;
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
    const room = Math.max(0, Math.floor(MOST_OF_TEXT / Math.max(1, size * this.#layers)) - 1); // shares take room, too
    if (problem !== null) return this.#refuse(problem, "prompt");
    if (this.#layers && top.valueAsNumber > room) {
      const text = `The text has ${size.toLocaleString()} bytes: `;
      return this.#refuse(room ? `${text}at most ${room} neurons of a layer can be shown of it.` : `${text}too many to show its neurons.`, "top");
    }
    this.#problem.hidden = true;
    const body = { prompt: this.#idsOnly ? this.#ids() : this.#prompt.value, max_tokens: most.valueAsNumber, temperature: temperature.valueAsNumber };
    if (!Number.isNaN(seed.valueAsNumber)) body.seed = seed.valueAsNumber;
    this.onRun({ top: top.valueAsNumber, body });
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
