// A conversation is a tree: each edit, each new answer and each branch is one more child. It knows no page and no server.

const FORMAT = 1;

/** An id that nobody else makes. `crypto.randomUUID` is for pages with HTTPS only. */
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A conversation. `mode` is "chat" or "text"; nodes are `{id, parent, author: "user" | "model", text, …}`. */
export class Conversation {
  constructor({ id = newId(), mode = "chat", title = "", system = "", updated = Date.now(), leaf = null, nodes = [] } = {}) {
    Object.assign(this, { id, mode, title, system, updated, leaf });
    this.nodes = new Map(nodes.map((node) => [node.id, node]));
  }

  /** Adds a child of `parent`, the id of a node or null, and goes there. */
  add(parent, author, text, more = {}) {
    const node = { id: newId(), parent, author, text, ...more };
    this.nodes.set(node.id, node);
    this.leaf = node.id;
    this.updated = Date.now();
    if (!this.title) this.title = titleOf(text);
    return node;
  }

  /** The nodes from the root to `leaf`. */
  path(leaf = this.leaf) {
    const found = [];
    for (let node = this.nodes.get(leaf); node; node = this.nodes.get(node.parent)) found.push(node);
    return found.reverse();
  }

  /** All that stand beside a node, itself included, in the order in which they came. */
  siblings(node) {
    return [...this.nodes.values()].filter((other) => other.parent === node.parent && other.author === node.author);
  }

  /** Goes to the end of the branch that `node` begins: along the newest children. */
  choose(node) {
    let last = node;
    const children = Map.groupBy(this.nodes.values(), (other) => other.parent);
    while (children.has(last.id)) last = children.get(last.id).at(-1);
    this.leaf = last.id;
  }

  /** Ends the branch at `node`: what is said next becomes another child of it. */
  branchAt(node) {
    this.leaf = node.id;
  }

  remove(node) {
    this.nodes.delete(node.id);
    this.leaf = node.parent;
  }

  /** Whether the server has all of it: each answer is a stored response. */
  get isStored() {
    const answers = [...this.nodes.values()].filter((node) => node.author === "model");
    return answers.length > 0 && answers.every((node) => node.responseId);
  }

  toJSON() {
    const { id, mode, title, system, updated, leaf } = this;
    return { format: FORMAT, id, mode, title, system, updated, leaf, nodes: [...this.nodes.values()] };
  }

  /** The branch that is shown, as Markdown. */
  toMarkdown() {
    if (this.mode === "text") return this.path().map((node) => node.text).join("");
    const names = { user: "You", model: "Model" };
    const turns = this.path().map((node) => `### ${names[node.author]}\n\n${node.text}\n`);
    return [`# ${this.title}\n`, ...(this.system ? [`> ${this.system.replaceAll("\n", "\n> ")}\n`] : []), ...turns].join("\n");
  }
}

export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  if (line.length <= 60) return line || "Untitled";
  return `${line.slice(0, 59).replace(/[\uD800-\uDBFF]$/, "")}…`; // half a character is in no JSON that a server takes
}
