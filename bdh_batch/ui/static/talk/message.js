// One turn of a conversation, with what can be done to it.

import { button, h } from "../dom.js";
import { rate } from "./generation.js";
import { StreamedText } from "./streamed_text.js";

const UNKNOWN = { disabled: true, title: "The parameters of this request were not kept." };
const NAMES = { user: "You", model: "Model" };

/** The element of a node. `acts` are what its buttons do: `{edit, regenerate, branch, choose, code, copy}`. */
export class Message {
  #foot = h("div", { class: "foot" });

  constructor(node, siblings, acts, drawn) {
    Object.assign(this, { node, siblings, acts });
    this.body = h("div", { class: "body" });
    this.text = new StreamedText(this.body, drawn);
    this.element = h("article", { class: `message ${node.author}`, aria: { label: NAMES[node.author] } }, h("h3", {}, NAMES[node.author]), this.body, this.#foot);
    this.text.append(node.text);
    this.text.flush();
    this.finish();
  }

  /** While the model writes: no buttons that need all of it. */
  begin() {
    this.element.classList.add("running");
    this.#foot.replaceChildren(h("span", { class: "hint" }, "…"));
  }

  /** Shows what is known once it is written, and the buttons. */
  finish() {
    this.element.classList.remove("running");
    const { node, acts } = this;
    const small = (label, act, more = {}) => button(label, () => act(node), { class: "small", ...more });
    const code = (label, kind) => small(label, (it) => acts.code(it, kind), { aria: { label: `Copy as ${label}` }, ...(node.fields ? {} : UNKNOWN) });
    const own = node.author === "user" ? [small("Edit", () => this.edit())] : [small("Regenerate", acts.regenerate), small("Branch here", acts.branch), code("curl", "curl"), code("Python", "python")];
    this.#foot.replaceChildren(
      ...this.#switch(),
      ...own,
      small("Copy", acts.copy),
      ...(node.author === "model" ? [h("span", { class: "hint stats" }, statsOf(node))] : []),
      ...(node.error ? [h("p", { class: "error" }, node.error)] : []),
    );
  }

  /** Asks for other words in place of these. */
  edit() {
    const input = h("textarea", { rows: Math.min(12, this.node.text.split("\n").length + 1), value: this.node.text, aria: { label: "Edit the message" } });
    const cancel = () => this.finish();
    const send = () => this.acts.edit(this.node, input.value);
    input.addEventListener("keydown", (event) => {
      if (event.key === "Escape") cancel();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
    });
    this.#foot.replaceChildren(input, h("div", { class: "row" }, button("Send as a new branch", send, { class: "primary small" }), button("Cancel", cancel, { class: "small" })));
    input.focus();
  }

  /** ‹ 2 / 3 ›, where there are several. */
  #switch() {
    const at = this.siblings.findIndex(({ id }) => id === this.node.id);
    if (this.siblings.length < 2) return [];
    const step = (by, label, name) => button(label, () => this.acts.choose(this.siblings[at + by]), { class: "small", disabled: !this.siblings[at + by], aria: { label: name } });
    return [h("span", { class: "switch" }, step(-1, "‹", "Branch before"), h("span", {}, ` ${at + 1} / ${this.siblings.length} `), step(1, "›", "Next branch"))];
  }
}

const ENDS = { length: "reached max_tokens", stop: "", aborted: "stopped" };

function statsOf({ outcome = {}, model, fields = {} }) {
  const { usage, ttft, finish } = outcome;
  const speed = rate(outcome);
  return [
    usage ? `${usage.output} tokens` : "",
    speed === null ? "" : `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`,
    ttft === undefined ? "" : `TTFT ${(ttft * 1000).toFixed(0)} ms`,
    usage ? `prompt ${usage.input}${usage.cached ? ` (${usage.cached} cached)` : ""}` : "",
    ENDS[finish] ?? finish ?? "",
    fields.seed === undefined ? "" : `seed ${fields.seed}`,
    model ?? "",
  ].filter(Boolean).join(" · ");
}
