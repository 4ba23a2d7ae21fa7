// The API key: kept in this tab's session storage, sent in a header, never part of an address.

const NAME = "bdh-api-key";

/** Fires "change" when another key is used. */
export class Keys extends EventTarget {
  #dialog = document.getElementById("key-dialog");
  #input = document.getElementById("key-input");
  #reason = document.getElementById("key-reason");

  constructor(opener) {
    super();
    opener.addEventListener("click", () => this.ask(""));
    this.#dialog.addEventListener("close", () => this.#closed());
  }

  get key() {
    return sessionStorage.getItem(NAME) ?? "";
  }

  headers() {
    return this.key ? { authorization: `Bearer ${this.key}` } : {};
  }

  /** Asks for a key, and says why. */
  ask(reason) {
    this.#reason.textContent = reason;
    this.#reason.className = reason ? "error" : "";
    if (this.#dialog.open) return;
    this.#input.value = this.key;
    this.#dialog.returnValue = "cancel";
    this.#dialog.showModal();
    this.#input.select();
  }

  #closed() {
    const chosen = this.#dialog.returnValue;
    const typed = this.#input.value.trim();
    this.#input.value = "";
    if (chosen === "save" && typed) sessionStorage.setItem(NAME, typed);
    else if (chosen === "forget" || chosen === "save") sessionStorage.removeItem(NAME);
    if (chosen !== "cancel") this.dispatchEvent(new Event("change"));
  }
}
