// Which models there are, and which one is chosen, for all views.

import { h } from "./dom.js";

const NAME = "bdh-model";

/** Fires "change" when the list or the choice changes. `cards` are those of /v1/models. */
export class Models extends EventTarget {
  cards = [];
  problem = null;
  #api;
  #select;

  constructor(api, select) {
    super();
    this.#api = api;
    this.#select = select;
    select.addEventListener("change", () => {
      localStorage.setItem(NAME, select.value);
      this.dispatchEvent(new Event("change"));
    });
  }

  /** The name of the chosen model, or an empty string. */
  get chosen() {
    return this.#select.value;
  }

  /** The chosen model's card, or null. */
  get card() {
    return this.cards.find((card) => card.id === this.chosen) ?? null;
  }

  async load() {
    try {
      this.cards = (await this.#api.json("v1/models")).data;
      this.problem = null;
    } catch (error) {
      this.cards = [];
      this.problem = error.message;
    }
    const wanted = this.chosen || localStorage.getItem(NAME);
    this.#select.replaceChildren(...this.cards.map(({ id }) => h("option", { value: id }, id)));
    this.#select.disabled = this.cards.length === 0;
    if (this.cards.some(({ id }) => id === wanted)) this.#select.value = wanted;
    this.dispatchEvent(new Event("change"));
  }
}
