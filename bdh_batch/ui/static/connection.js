// Knows whether the server can be asked: it looks at /readyz now and then, and more often once it could not.

import { pause } from "./api.js";

const LOOK = 10000; // milliseconds between looks while all is well and the page is seen
const FIRST = 500; // milliseconds to the first look after a failure, then half as long again each time, up to
const MOST = 8000;
const PATIENCE = 20000; // milliseconds for an answer: a server that is stopped, or cut off, may never give one

/** Fires "change" when `problem`, a text or null, changes, and "back" when the server can be asked again. */
export class Connection extends EventTarget {
  problem = null;
  #probing = false;

  constructor(url, patience = PATIENCE) {
    super();
    Object.assign(this, { url, patience });
  }

  /** Looks every now and then, as long as the page is seen. */
  async watch() {
    for (;;) {
      await pause(LOOK);
      if (document.visibilityState === "visible" && !this.#probing) await this.#look();
    }
  }

  /** A request failed with `error`: the server is gone, or busy with its start or end. */
  lost(error) {
    this.#set(error.status === 503 ? `The server says: ${error.message}` : "The server cannot be reached.");
    if (!this.#probing) this.#probe();
  }

  async #probe() {
    this.#probing = true;
    for (let wait = FIRST; this.problem !== null; wait = Math.min(MOST, wait * 1.5)) {
      await pause(wait * (0.75 + Math.random() / 2));
      await this.#look();
    }
    this.#probing = false;
  }

  async #look() {
    let problem = null;
    try {
      const response = await fetch(this.url, { cache: "no-store", signal: AbortSignal.timeout(this.patience) });
      if (!response.ok) problem = `The server says: ${(await response.json()).error.message}`;
    } catch {
      problem = "The server cannot be reached.";
    }
    this.#set(problem);
    if (problem !== null && !this.#probing) this.#probe();
  }

  #set(problem) {
    if (problem === this.problem) return;
    const wasLost = this.problem !== null;
    this.problem = problem;
    this.dispatchEvent(new Event("change"));
    if (wasLost && problem === null) this.dispatchEvent(new Event("back"));
  }
}
