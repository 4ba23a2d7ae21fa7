// The text, token by token: coloured by log-probability, reached by keyboard as one stop. It has one page of tokens at a
// time, so its size does not depend on the text's.

import { button, freshId, h } from "../dom.js";
import { LIKELIHOODS, likelihood, probability, quoted } from "./words.js";

export const PAGE = 1024; // tokens
const { format } = new Intl.NumberFormat(); // toLocaleString makes one each time

/** Calls `onSelect(position)`. `follow` keeps the last page in view, until somebody goes elsewhere. */
export class Letters {
  #history = null;
  #first = 0; // position of the first token shown
  #last = 0; // and behind the last one
  #selected = null;
  #neuron = null;
  #list = h("div", { class: "letters", role: "listbox", aria: { label: "Tokens", orientation: "horizontal" }, tabIndex: 0 });
  #tip = h("div", { class: "tip", role: "tooltip", id: freshId("tip"), hidden: true });
  #where = h("span", { class: "hint" });
  #buttons = [
    button("First", () => this.#turn(0), { class: "small" }),
    button("Earlier", () => this.#turn(this.#first - PAGE), { class: "small" }),
    button("Later", () => this.#turn(this.#first + PAGE), { class: "small" }),
    button("Last", () => this.#turn(Infinity), { class: "small" }),
  ];

  constructor(onSelect) {
    this.onSelect = onSelect;
    this.follow = true;
    const pages = h("div", { class: "row", role: "group", aria: { label: "Pages of tokens" } }, this.#buttons, this.#where);
    this.element = h("div", { class: "text" }, legend(), h("div", { class: "within" }, this.#list, this.#tip), pages);
    this.#list.addEventListener("click", ({ target }) => this.#pick(target));
    this.#list.addEventListener("focusin", ({ target }) => this.#focused(target));
    this.#list.addEventListener("focusout", () => this.#hideTip());
    this.#list.addEventListener("pointerover", ({ target }) => this.#showTip(target));
    this.element.addEventListener("pointerleave", () => this.#hideTip());
    this.#list.addEventListener("keydown", (event) => this.#key(event));
  }

  reset(history) {
    this.#history = history;
    this.#selected = this.#neuron = null;
    this.follow = true;
    this.#clear(0);
    this.#describe();
  }

  /** Shows what has come since. */
  draw() {
    const { begin, end } = this.#history;
    if (this.follow && end - this.#first > PAGE) this.#clear(pageOf(end - 1));
    if (this.#first < begin) this.#clear(Math.min(begin, end));
    const until = Math.min(end, this.#first + PAGE);
    if (until > this.#last) {
      const added = [];
      for (; this.#last < until; this.#last += 1) added.push(this.#letter(this.#last));
      this.#list.append(...added);
      if (this.follow) this.#list.scrollTop = this.#list.scrollHeight;
    }
    this.#describe();
  }

  /** Goes to a token, and selects it. */
  select(position, { focus = false } = {}) {
    const { begin, end } = this.#history;
    if (position < begin || position >= end) return;
    this.follow = false;
    this.#at(this.#selected)?.setAttribute("aria-selected", "false");
    this.#selected = position;
    if (position < this.#first || position >= this.#last) {
      this.#clear(Math.max(begin, pageOf(position)));
      this.draw();
    }
    const letter = this.#at(position);
    letter.setAttribute("aria-selected", "true");
    this.#rove(letter);
    letter.scrollIntoView({ block: "nearest" });
    if (focus && document.activeElement !== letter) letter.focus();
    this.onSelect(position);
  }

  /** Marks the tokens that fire a neuron; null marks none. */
  mark(neuron) {
    this.#neuron = neuron;
    for (let at = this.#first; at < this.#last; at += 1) this.#at(at).classList.toggle("fires", this.#fires(at));
  }

  #fires(position) {
    return this.#neuron !== null && position < this.#history.fired && this.#history.value(position, this.#neuron) > 0;
  }

  #letter(position) {
    const { label, name, logprob } = this.#history.token(position);
    const level = likelihood(logprob);
    const selected = position === this.#selected;
    return h(
      "span",
      {
        class: `letter${level === null ? "" : ` p${level}`}${this.#fires(position) ? " fires" : ""}`,
        role: "option",
        tabIndex: -1,
        data: { at: position },
        aria: { selected, label: `${quoted(name)}, ${probability(logprob)}` },
      },
      label === "\n" ? "⏎\n" : label,
    );
  }

  #at(position) {
    return position === null ? undefined : this.#list.children[position - this.#first];
  }

  #clear(first) {
    this.#hideTip();
    const hadFocus = this.#list.contains(document.activeElement) && document.activeElement !== this.#list;
    this.#first = this.#last = first;
    this.#list.replaceChildren();
    this.#list.tabIndex = 0;
    if (hadFocus) this.#list.focus();
  }

  #turn(first) {
    const { begin, end } = this.#history ?? { begin: 0, end: 0 };
    if (!end) return;
    this.follow = first === Infinity;
    this.#clear(Math.max(begin, Math.min(pageOf(Math.max(0, first)), pageOf(end - 1))));
    this.draw();
  }

  #describe() {
    const { begin, end } = this.#history;
    const gone = begin ? `; the first ${format(begin)} are no longer kept` : "";
    this.#where.textContent = end
      ? `Tokens ${format(this.#first + 1)} to ${format(this.#last)} of ${format(end)}${gone}`
      : "No tokens yet";
    const [first, earlier, later, last] = this.#buttons;
    first.disabled = earlier.disabled = this.#first <= begin;
    later.disabled = last.disabled = this.#last >= end;
  }

  #rove(letter) {
    this.#list.tabIndex = -1;
    this.#list.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
    letter.tabIndex = 0;
  }

  #pick(target) {
    const letter = target.closest(".letter");
    if (letter) this.select(Number(letter.dataset.at), { focus: true });
  }

  #focused(target) {
    if (target !== this.#list) return this.#showTip(target);
    // The list itself is the stop as long as none of its tokens is: it hands on.
    if (this.#last > this.#first) this.select(this.#at(this.#selected) ? this.#selected : this.#first, { focus: true });
  }

  #key(event) {
    if (event.key === "Escape") return this.#hideTip();
    const now = Number(event.target.dataset.at);
    if (Number.isNaN(now) || event.altKey || event.ctrlKey || event.metaKey) return;
    const { begin, end } = this.#history;
    const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now - 64, PageDown: now + 64, Home: begin, End: end - 1 };
    const to = moves[event.key] ?? { ArrowUp: this.#line(now, -1), ArrowDown: this.#line(now, 1) }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.select(Math.max(begin, Math.min(end - 1, to)), { focus: true });
  }

  /** The token above or below, as the lines have been broken. */
  #line(now, step) {
    const from = this.#at(now);
    for (let at = now + step, top = null; this.#at(at); at += step) {
      const { offsetTop, offsetLeft } = this.#at(at);
      if (offsetTop === from.offsetTop) continue;
      if (top !== null && offsetTop !== top) return at - step;
      top = offsetTop;
      if (step < 0 ? offsetLeft <= from.offsetLeft : offsetLeft >= from.offsetLeft) return at;
    }
    return step < 0 ? this.#first : this.#last - 1;
  }

  #showTip(target) {
    const letter = target.closest(".letter");
    if (!letter || !this.#history) return;
    this.#hideTip();
    const { name, logprob, others } = this.#history.token(Number(letter.dataset.at));
    const rows = others.map((each) => h("li", {}, `${quoted(each.name)} ${probability(each.logprob).slice(12)}`));
    const rest = rows.length ? [h("div", { class: "hint" }, "The likeliest here:"), h("ol", {}, rows)] : [];
    this.#tip.replaceChildren(h("strong", {}, `${quoted(name)}, ${probability(logprob)}`), ...rest);
    this.#tip.hidden = false;
    letter.setAttribute("aria-describedby", this.#tip.id);
    const within = this.#tip.parentElement.getBoundingClientRect();
    const box = letter.getBoundingClientRect();
    const left = Math.min(box.left - within.left, within.width - this.#tip.offsetWidth);
    this.#tip.style.left = `${Math.max(0, left)}px`;
    this.#tip.style.top = `${box.bottom - within.top + 4}px`;
  }

  #hideTip() {
    this.#tip.hidden = true;
    this.#list.querySelector("[aria-describedby]")?.removeAttribute("aria-describedby");
  }
}

function pageOf(position) {
  return position - (position % PAGE);
}

function legend() {
  const kinds = LIKELIHOODS.map(([, words], level) => h("li", {}, h("span", { class: `letter p${level}` }, "abc"), ` ${words}`));
  const fires = h("li", {}, h("span", { class: "letter fires" }, "abc"), " fires the chosen neuron");
  return h("ul", { class: "legend hint", aria: { label: "How likely the model found each token" } }, kinds, fires);
}
