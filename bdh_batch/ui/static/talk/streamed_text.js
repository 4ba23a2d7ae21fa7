// Shows text that may come fast and grow long: once a frame, in blocks that the browser need not lay out unseen.

import { h, oncePerFrame } from "../dom.js";

const BLOCK = 4096; // characters, then a new block begins at the next line
const FULL = 16384; // or here, where there is no line
const MOST = 1 << 20; // characters that are shown; of longer texts, their end

/** Text in `element`, which may be appended to. `drawn` is called after each drawing. */
export class StreamedText {
  #waiting = "";
  #shown = 0;
  #dropped = 0;
  #last = null; // the text node that grows
  #note = null;
  #ask;

  constructor(element, drawn = () => {}) {
    this.element = element;
    element.classList.add("streamed");
    this.#ask = oncePerFrame(() => { this.flush(); drawn(); });
  }

  append(text) {
    this.#waiting += text;
    this.#ask();
  }

  /** Draws at once what has come. */
  flush() {
    let text = this.#waiting;
    this.#waiting = "";
    while (text) {
      const room = this.#room(text);
      this.#node().appendData(text.slice(0, room));
      this.#shown += room;
      text = text.slice(room);
      if (text) this.#last = null;
    }
    this.#trim();
  }

  /** How much of `text` goes into the block that grows. */
  #room(text) {
    const has = this.#last?.length ?? 0;
    const line = text.indexOf("\n", Math.max(0, BLOCK - has));
    const whole = Math.min(text.length, Math.max(1, FULL - has));
    const room = line >= 0 ? Math.min(line + 1, whole) : whole;
    const cutsPair = room < text.length && /[\uD800-\uDBFF]/.test(text[room - 1]);
    return cutsPair ? room + 1 : room;
  }

  #node() {
    if (this.#last === null || (this.#last.length >= BLOCK && this.#last.data.endsWith("\n"))) {
      this.#last = document.createTextNode("");
      this.element.append(h("div", { class: "block" }, this.#last));
    }
    return this.#last;
  }

  #trim() {
    while (this.#shown > MOST) {
      const block = this.element.querySelector(".block");
      this.#shown -= block.firstChild.length;
      this.#dropped += block.firstChild.length;
      block.remove();
      this.#note ??= this.element.insertBefore(h("p", { class: "hint" }), this.element.firstChild);
      this.#note.textContent = `The first ${this.#dropped.toLocaleString("en")} characters are not shown; the export has them.`;
    }
  }
}
