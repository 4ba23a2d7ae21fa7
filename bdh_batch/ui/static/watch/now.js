// What the server does now, in tables: models with their buttons, engine processes, tenants and keys.

import { button, h } from "../dom.js";
import { number } from "./format.js";
import { Table } from "./table.js";

const text = (value) => (value === null || value === undefined || value === "" ? "–" : String(value));

export class Now {
  #models;
  #engines;
  #tenants;
  #hint = h("p", { class: "hint" }, "An operator's key also shows models' states, engines, tenants and steps.");
  #operators;
  #figures = {}; // of models, from the last sample

  constructor({ api, models, announce }) {
    this.#models = new Table("Models", [
      { title: "Model", show: ({ name }) => name },
      { title: "State", show: ({ state }) => state },
      { title: "Requests", show: ({ requests }) => number(requests) },
      { title: "Generated/s", show: ({ name }) => number(this.#figures[name]?.generated) },
      { title: "Prompt/s", show: ({ name }) => number(this.#figures[name]?.prompt) },
      { title: "Running of slots", show: ({ name }) => this.#slots(name) },
      { title: "Waiting", show: ({ name }) => number(this.#figures[name]?.waiting) },
      { title: "", make: (name) => switches(name, api, models, announce) },
    ]);
    this.#engines = new Table(
      "Engine processes",
      [
        { title: "Process", show: ({ name }) => name },
        { title: "Model", show: ({ model }) => text(model) },
        { title: "State", show: ({ state }) => state },
        { title: "Streams", show: ({ streams }) => number(streams) },
        { title: "Device", show: ({ device }) => text(device) },
        { title: "Process id", show: ({ pid }) => text(pid) },
      ],
      "The engine is in the server's own process.",
    );
    this.#tenants = new Table(
      "Tenants and keys",
      [
        { title: "Tenant", show: ({ tenant }) => tenant },
        { title: "Key", show: ({ key }) => (key ? key.name || "without a name" : "none") },
        { title: "Waiting", show: ({ waiting }) => number(waiting) },
        { title: "Requests", show: ({ requests }) => number(requests) },
        { title: "Prompt tokens", show: ({ prompt_tokens: tokens }) => number(tokens) },
        { title: "Completion tokens", show: ({ completion_tokens: tokens }) => number(tokens) },
        { title: "Limits of this minute", show: ({ limits }) => limitsOf(limits) },
        { title: "Weight", show: ({ key }) => text(key?.weight) },
        { title: "Operator", show: ({ key }) => (key?.operator ? "yes" : "no") },
        { title: "Models", show: ({ key }) => (key?.models ? key.models.join(", ") : key ? "all" : "–") },
      ],
      "Nobody has asked for anything yet.",
    );
    this.#operators = h("div", { class: "now", hidden: true }, [this.#models, this.#engines, this.#tenants].map((each) => h("div", { class: "panel" }, each.element)));
    this.element = h("div", {}, this.#hint, this.#operators);
  }

  sample(sample) {
    this.#figures = sample?.models ?? {};
  }

  details(details) {
    this.#models.update(details.models, ({ name }) => name);
    this.#engines.update(details.engines, ({ name }) => name);
    this.#tenants.update(details.tenants, ({ tenant }) => tenant);
    this.operator(true);
  }

  /** Whether the key is an operator's. */
  operator(is) {
    this.#operators.hidden = !is;
    this.#hint.hidden = is;
  }

  #slots(name) {
    const figures = this.#figures[name];
    return figures?.slots ? `${number(figures.running)} of ${number(figures.slots)}` : "–";
  }
}

function limitsOf(limits) {
  const some = Object.entries(limits ?? {}).map(([name, { limit, remaining }]) => {
    return `${number(limit - remaining)} of ${number(limit)} ${name.replace("_per_minute", "")}`;
  });
  return some.length ? some.join(", ") : "–";
}

/** Buttons that load and unload a model, and what came of it. */
function switches(name, api, models, announce) {
  const problem = h("span", { class: "failed" });
  let busy = false;
  const change = async (verb, done) => {
    if (busy) return; // not disabled meanwhile: that would take the focus away
    busy = true;
    problem.textContent = "…";
    try {
      await api.json(`models/${verb}`, { body: { model: name } });
      problem.textContent = "";
      announce(`The model ${name} is ${done}.`);
      models.load();
    } catch (error) {
      problem.textContent = error.message;
      announce(error.message);
    }
    busy = false;
  };
  const buttons = [
    button("Load", () => change("load", "loaded"), { class: "small", aria: { label: `Load ${name}` } }),
    button("Unload", () => change("unload", "unloaded"), { class: "small", aria: { label: `Unload ${name}` } }),
  ];
  const element = h("div", { class: "row" }, buttons, problem);
  element.update = ({ state, owner }) => {
    element.hidden = owner === "upstream";
    buttons[0].hidden = state === "loaded";
    buttons[1].hidden = state !== "loaded";
  };
  return element;
}
