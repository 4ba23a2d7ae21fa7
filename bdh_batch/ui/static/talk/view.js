// Talk: conversations with the model. This module says what happens; the others say how.

import { wasAborted } from "../api.js";
import { button, h } from "../dom.js";
import { asCurl, asPython } from "./code.js";
import { download, showCode } from "./outlets.js";
import { generate } from "./generation.js";
import { BrowserKept, ServerKept } from "./kept.js";
import { layout } from "./layout.js";
import { Message } from "./message.js";
import { Parameters } from "./parameters.js";
import { requestFor } from "./requests.js";
import { Conversation } from "./tree.js";

const MOST_SHOWN = 200; // turns of a branch: the last ones
const NEAR = 80; // pixels from the end, where new text is followed

class Talk {
  #parts = layout();
  #parameters = new Parameters(this.#parts.parameters);
  #conversation = new Conversation();
  #running = null; // {controller, message}

  constructor(element, context) {
    this.context = context;
    this.browser = new BrowserKept();
    this.server = new ServerKept(context.api);
    element.append(this.#parts.root);
    this.#wire();
    const named = location.hash.split("/")[1];
    this.#open(this.#conversation);
    this.loading = this.#loadSchemas();
    this.#refresh().then(() => this.#resume(named));
  }

  #wire() {
    const { form, input, stop, fresh, mode, system, exportJson, exportText, remove, olderButton, root } = this.#parts;
    const { connection, keys } = this.context;
    form.addEventListener("submit", (event) => { event.preventDefault(); this.#send(); });
    input.addEventListener("keydown", (event) => {
      const plain = !event.shiftKey && this.#conversation.mode === "chat" && !event.isComposing;
      if (event.key === "Enter" && (plain || event.ctrlKey || event.metaKey)) { event.preventDefault(); this.#send(); }
    });
    root.addEventListener("keydown", (event) => { if (event.key === "Escape") this.#stop(); });
    stop.addEventListener("click", () => this.#stop());
    fresh.addEventListener("click", () => { this.#open(new Conversation({ mode: mode.value, system: system.value })); input.focus(); });
    mode.addEventListener("change", () => this.#open(new Conversation({ mode: mode.value, system: system.value })));
    system.addEventListener("change", () => { this.#conversation.system = system.value; });
    exportJson.addEventListener("click", () => download(`${this.#conversation.title || "conversation"}.json`, "application/json", JSON.stringify(this.#conversation, null, 2)));
    exportText.addEventListener("click", () => download(`${this.#conversation.title || "conversation"}.md`, "text/markdown", this.#conversation.toMarkdown()));
    remove.addEventListener("click", () => this.#remove());
    olderButton.addEventListener("click", () => this.#refresh(() => this.server.listOlder()));
    for (const source of [connection, keys]) {
      source.addEventListener(source === keys ? "change" : "back", () => { this.loading = this.#loadSchemas(); this.#refresh(); });
    }
  }

  async #loadSchemas() {
    try {
      const document = await this.context.api.json("openapi.json");
      this.schemas = document.components.schemas;
      this.#showParameters();
    } catch (error) {
      this.schemas = null;
      this.#parts.parameters.replaceChildren(h("p", { class: "error" }, error.message), button("Try again", () => { this.loading = this.#loadSchemas(); }));
    }
  }

  #showParameters() {
    if (this.schemas) this.#parameters.show(this.schemas, this.#conversation.mode === "chat" ? "ChatBody" : "CompletionBody");
  }

  // Conversations.

  #open(conversation) {
    this.#stop();
    const changed = conversation.mode !== this.#conversation.mode;
    this.#conversation = conversation;
    this.#parts.mode.value = conversation.mode;
    this.#parts.system.value = conversation.system;
    this.#parts.systemRow.hidden = conversation.mode === "text";
    this.#parts.hint.textContent = conversation.mode === "chat" ? "Enter sends, Shift+Enter is a new line" : "Ctrl+Enter sends";
    if (changed) this.#showParameters();
    this.#problem(null);
    this.#draw();
    this.#drawList();
    this.#address();
  }

  /** Asks for what the server keeps. */
  async #refresh(list = () => this.server.list()) {
    try {
      await list();
    } catch (error) {
      if (![0, 401, 404, 503].includes(error.status)) this.#problem(error); // the frame says those, or there is no store
    }
    this.#drawList();
  }

  get #listed() {
    const here = this.browser.list();
    const known = new Set(here.map(({ id }) => id));
    return [...here, ...this.server.entries.filter(({ id }) => !known.has(id))].sort((a, b) => b.updated - a.updated);
  }

  #drawList() {
    this.#parts.older.hidden = !this.server.hasOlder;
    this.#parts.list.replaceChildren(
      ...this.#listed.map((entry) => {
        const current = entry.id === this.#conversation.id ? { aria: { current: "true" } } : {};
        return h("li", {}, button([entry.title || "Untitled", h("small", {}, entry.where === "server" ? "kept by the server" : "kept in this browser")], () => this.#choose(entry), current));
      }),
    );
  }

  async #choose({ id, where }) {
    try {
      const found = where === "browser" ? this.browser.get(id) : await this.server.get(id);
      if (found) this.#open(found);
      else this.#problem(new Error("The server does not have this conversation any more."));
    } catch (error) {
      this.#problem(error);
    }
  }

  /** Opens the conversation that the address names, as after a reload. */
  #resume(id) {
    const entry = id && this.#listed.find((each) => each.id === id);
    if (entry && this.#conversation.leaf === null) this.#choose(entry);
  }

  #address() {
    if (!["", "#talk"].includes(location.hash.split("/")[0])) return; // another tab is open
    history.replaceState(null, "", this.#conversation.leaf === null ? "#talk" : `#talk/${this.#conversation.id}`);
  }

  #keep(conversation) {
    if (conversation.isStored) this.browser.remove(conversation.id);
    else if (!this.browser.put(conversation)) this.#problem(new Error("This conversation is too long to be kept in the browser. The export has all of it."));
    this.#address();
    this.#drawList();
  }

  async #remove() {
    const conversation = this.#conversation;
    try {
      await this.server.remove(conversation);
    } catch (error) {
      return this.#problem(error);
    }
    this.browser.remove(conversation.id);
    this.#open(new Conversation({ mode: this.#parts.mode.value }));
    await this.#refresh();
  }

  // What is shown.

  #draw() {
    const nodes = this.#conversation.path();
    const shown = nodes.slice(-MOST_SHOWN).map((node) => this.#message(node).element);
    const hidden = nodes.length - shown.length;
    if (hidden) shown.unshift(h("p", { class: "hint" }, `${hidden} earlier turns are not shown; the export has them.`));
    this.#parts.log.replaceChildren(...(shown.length ? shown : [h("p", { class: "empty" }, this.#conversation.mode === "chat" ? "Say something to the model." : "Write how the text begins; the model goes on.")]));
    this.#parts.log.scrollTop = this.#parts.log.scrollHeight;
  }

  #message(node) {
    const acts = {
      edit: (it, text) => this.#ask(text, it.parent),
      regenerate: (it) => this.#generate(it.parent),
      branch: (it) => { this.#conversation.branchAt(it); this.#draw(); this.#parts.input.focus(); },
      choose: (it) => { if (!this.#running) { this.#conversation.choose(it); this.#draw(); } },
      copy: (it) => showCode("Text", it.text, this.context.announce),
      code: (it, kind) => this.#showCode(it, kind),
    };
    return new Message(node, this.#conversation.siblings(node), acts, () => this.#follow());
  }

  /** New text is followed, unless somebody has scrolled away from the end. */
  #follow() {
    const { log } = this.#parts;
    const end = log.scrollHeight - log.clientHeight;
    if (this.lastEnd === null || log.scrollTop >= this.lastEnd - NEAR) log.scrollTop = end;
    this.lastEnd = end;
  }

  #problem(error, again = null) {
    const { problem } = this.#parts;
    problem.hidden = error === null;
    problem.replaceChildren(...(error === null ? [] : [error.message, ...(again ? [" ", button("Try again", again, { class: "small" })] : [])]));
  }

  #showCode(node, kind) {
    const { api, keys } = this.context;
    const request = requestFor(this.#conversation, node, this.schemas ?? {});
    const text = kind === "curl" ? asCurl(api.url(request.path), request.body, keys.key !== "") : asPython(api.root.href, request);
    showCode(kind === "curl" ? "As curl" : "As Python", text, this.context.announce);
  }

  // Requests.

  async #send() {
    await this.loading;
    const { input } = this.#parts;
    const text = input.value;
    const goesOn = this.#conversation.mode === "text" && text === "" && this.#conversation.leaf !== null;
    if (this.#running || (text.trim() === "" && !goesOn)) return;
    const asked = goesOn ? this.#generate(this.#conversation.leaf) : this.#ask(text, this.#conversation.leaf);
    if (asked) input.value = "";
  }

  /** Says `text` after `parent`, and has the model answer. Returns whether it was sent. */
  #ask(text, parent) {
    if (this.#running || this.#fields() === null) return false;
    const node = this.#conversation.add(parent, "user", text);
    this.#generate(node.id);
    return true;
  }

  /** The parameters, or null where one is wrong, which is said. */
  #fields() {
    if (!this.schemas) {
      this.#problem(new Error("The parameters could not be read from the server."));
      return null;
    }
    try {
      return this.#parameters.values();
    } catch (error) {
      this.#problem(error);
      return null;
    }
  }

  /** Has the model answer `parent`. Returns whether it was asked. */
  #generate(parent) {
    const fields = this.#fields();
    if (this.#running || fields === null) return false;
    const model = this.context.models.chosen;
    if (!model) {
      this.#problem(new Error(this.context.models.problem ?? "There is no model."));
      return false;
    }
    this.#problem(null);
    const outcome = {};
    const node = this.#conversation.add(parent, "model", "", { model, fields, outcome });
    this.#draw();
    const message = this.#message(node);
    this.#parts.log.lastElementChild.replaceWith(message.element);
    this.#run(node, message);
    return true;
  }

  async #run(node, message) {
    const controller = new AbortController();
    this.#running = { controller, message };
    this.lastEnd = null;
    this.#busy(true);
    message.begin();
    this.context.announce("The model is writing.");
    const conversation = this.#conversation;
    try {
      await this.#stream(conversation, node, message, controller.signal);
      this.context.announce(`Done: ${node.outcome.usage?.output ?? 0} tokens.`);
    } catch (error) {
      this.#failed(conversation, node, error);
    }
    message.text.flush();
    node.responseId = node.outcome.responseId ?? null;
    this.#running = null;
    this.#busy(false);
    if (conversation.nodes.has(node.id)) message.finish();
    else if (conversation === this.#conversation) this.#draw();
    this.#keep(conversation);
  }

  /** Streams the answer. A stored response that is gone is not gone on from: all of the conversation is sent. */
  async #stream(conversation, node, message, signal) {
    const request = requestFor(conversation, node, this.schemas);
    try {
      for await (const text of generate(this.context.api, request, signal, node.outcome, (stored) => this.server.add(stored))) {
        node.text += text;
        message.text.append(text);
      }
    } catch (error) {
      if (error.code !== "previous_response_not_found") throw error;
      const before = conversation.nodes.get(conversation.nodes.get(node.parent).parent);
      before.responseId = null;
      await this.#stream(conversation, node, message, signal);
    }
  }

  #failed(conversation, node, error) {
    if (wasAborted(error)) {
      node.outcome.finish = "aborted";
      this.context.announce("Stopped.");
    } else if (node.text) {
      node.error = error.message;
    } else {
      this.#problem(error, () => this.#generate(node.parent));
      this.#parameters.mark(error.param);
    }
    if (!node.text) conversation.remove(node);
  }

  #stop() {
    this.#running?.controller.abort();
  }

  #busy(running) {
    // One that is being written would be kept again after it was deleted.
    this.#parts.send.disabled = this.#parts.remove.disabled = running;
    this.#parts.stop.hidden = !running;
    if (!running && document.activeElement === document.body) this.#parts.input.focus();
  }
}

export function mount(element, context) {
  new Talk(element, context);
}
