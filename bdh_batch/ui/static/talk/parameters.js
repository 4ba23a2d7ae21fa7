// The form of parameters: made from /openapi.json, kept in the browser.

import { button, freshId, h } from "../dom.js";
import { FIRST, STRUCTURED, fieldsOf, structured, valueOf } from "./fields.js";

const STORED = "bdh-parameters";

/** The parameters of one kind of body. */
export class Parameters {
  #controls = new Map(); // by name: {field, control}
  #kind;
  #form;

  constructor(element) {
    this.element = element;
    this.schemas = {};
  }

  /** Shows the parameters of `body`, the name of a schema, with what was chosen before. */
  show(schemas, body) {
    this.schemas = schemas;
    this.#controls.clear();
    const fields = fieldsOf(schemas[body]);
    const rows = fields.map((field) => [field.name, this.#row(field)]);
    const often = rows.filter(([name]) => FIRST.includes(name)).map(([, row]) => row);
    const others = rows.filter(([name]) => !FIRST.includes(name)).map(([, row]) => row);
    this.element.replaceChildren(
      ...often,
      this.#structuredRow(),
      h("details", {}, h("summary", {}, `${others.length} more`), ...others),
      button("Defaults", () => this.#reset(), { class: "small" }),
    );
    this.#restore();
  }

  /** What a request says of them. Throws RangeError, and marks the field. */
  values() {
    const found = {};
    for (const [name, { field, control }] of this.#controls) {
      control.removeAttribute("aria-invalid");
      try {
        const value = valueOf(field, control.value);
        if (value !== undefined) found[name] = value;
      } catch (error) {
        this.mark(name);
        throw error;
      }
    }
    const form = structured(this.#kind.value, this.#form.value);
    return form === undefined ? found : { ...found, structured_outputs: form };
  }

  /** Marks the field that an error is about, and shows it. Returns whether there is one. */
  mark(name) {
    const wanted = { max_output_tokens: "max_tokens" }[name] ?? String(name ?? "").split(/[.[]/)[0];
    const control = wanted === "structured_outputs" ? this.#form : this.#controls.get(wanted)?.control;
    if (!control) return false;
    control.setAttribute("aria-invalid", "true");
    for (let parent = control.parentElement; parent; parent = parent.parentElement) if (parent.tagName === "DETAILS") parent.open = true;
    control.focus();
    return true;
  }

  #row(field) {
    const id = freshId("parameter");
    const control = h(...controlOf(field));
    control.id = id;
    control.setAttribute("aria-describedby", `${id}-help`);
    control.addEventListener("change", () => this.#store());
    this.#controls.set(field.name, { field, control });
    return h("div", { class: "parameter" }, h("label", { htmlFor: id }, h("code", {}, field.name)), control, h("p", { id: `${id}-help`, class: "hint" }, helpOf(field)));
  }

  #structuredRow() {
    const [kind, form] = [freshId("structured"), freshId("structured")];
    this.#kind = h("select", { id: kind }, ...Object.entries(STRUCTURED).map(([value, { label }]) => h("option", { value }, label)));
    this.#form = h("textarea", { id: form, rows: 4, spellcheck: false, hidden: true, aria: { label: "What the structured output has to look like" } });
    this.#kind.addEventListener("change", () => {
      this.#form.value = STRUCTURED[this.#kind.value].example ?? "";
      this.#form.hidden = this.#kind.value === "";
      this.#store();
    });
    this.#form.addEventListener("change", () => this.#store());
    return h("div", { class: "parameter" }, h("label", { htmlFor: kind }, "Structured output"), this.#kind, this.#form);
  }

  #store() {
    const chosen = Object.fromEntries([...this.#controls].map(([name, { control }]) => [name, control.value]).filter(([, value]) => value !== ""));
    localStorage.setItem(STORED, JSON.stringify({ chosen: { ...read().chosen, ...blank(this.#controls), ...chosen }, kind: this.#kind.value, form: this.#form.value }));
  }

  #restore() {
    const { chosen = {}, kind = "", form = "" } = read();
    for (const [name, { control }] of this.#controls) control.value = chosen[name] ?? "";
    this.#kind.value = kind in STRUCTURED ? kind : "";
    this.#form.value = form;
    this.#form.hidden = this.#kind.value === "";
  }

  #reset() {
    localStorage.removeItem(STORED);
    this.#restore();
  }
}

const blank = (controls) => Object.fromEntries([...controls.keys()].map((name) => [name, ""]));

function read() {
  try {
    return JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch {
    return {}; // of another version of the page
  }
}

function controlOf({ kind, fallback, range = {} }) {
  const placeholder = fallback === null ? "default" : String(fallback);
  if (kind === "boolean") return ["select", {}, h("option", { value: "" }, `default${fallback === null ? "" : ` (${fallback})`}`), h("option", {}, "true"), h("option", {}, "false")];
  if (kind === "lines") return ["textarea", { rows: 2, placeholder: "one a line; \\n is a line break", spellcheck: false }];
  if (kind === "object") return ["textarea", { rows: 2, placeholder: "JSON", spellcheck: false }];
  const decimal = kind === "number" || kind === "integer";
  return ["input", { type: "text", inputMode: decimal && range.min >= 0 ? "decimal" : "text", placeholder, autocomplete: "off", spellcheck: false }];
}

function helpOf({ help, range = {}, fallback }) {
  const { min, max, open } = range;
  const least = min === undefined ? "" : open ? `above ${min}` : `from ${min}`;
  const bounds = [least, max === undefined ? "" : `to ${max}`].filter(Boolean).join(" ");
  const rest = [bounds, fallback === null ? "" : `default ${fallback}`].filter(Boolean).join("; ");
  return rest ? `${help.replaceAll("`", "")} (${rest})` : help.replaceAll("`", "");
}
