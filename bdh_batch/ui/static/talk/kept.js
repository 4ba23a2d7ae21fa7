// Conversations that are kept: by the server, as stored responses, or else in this browser, within bounds.

import { Conversation } from "./tree.js";

const INDEX = "bdh-conversations"; // [{id, title, mode, updated}], the newest first
const MOST = 50; // conversations, and
const MOST_CHARACTERS = 2 << 20; // of all of them, in this browser: the oldest go
const PAGES = 5; // of the server's list

const nameOf = (id) => `bdh-conversation-${id}`;

/** Those in this browser. */
export class BrowserKept {
  constructor(storage = localStorage) {
    this.storage = storage;
  }

  list() {
    try {
      const index = JSON.parse(this.storage.getItem(INDEX)) ?? [];
      return index.map((entry) => ({ ...entry, where: "browser" }));
    } catch {
      return [];
    }
  }

  get(id) {
    const found = this.storage.getItem(nameOf(id));
    return found === null ? null : new Conversation(JSON.parse(found));
  }

  /** Keeps a conversation; returns whether it fits. */
  put(conversation) {
    const { id, title, mode, updated } = conversation;
    const text = JSON.stringify(conversation);
    this.remove(id);
    if (text.length > MOST_CHARACTERS) return false;
    let index = [{ id, title, mode, updated }, ...this.#index()];
    let room = MOST_CHARACTERS - text.length;
    index = index.filter((entry, at) => {
      if (at === 0) return true;
      room -= this.storage.getItem(nameOf(entry.id))?.length ?? 0;
      if (at < MOST && room >= 0) return true;
      this.storage.removeItem(nameOf(entry.id));
      return false;
    });
    try {
      this.storage.setItem(nameOf(id), text);
      this.storage.setItem(INDEX, JSON.stringify(index));
      return true;
    } catch {
      this.storage.removeItem(nameOf(id)); // the browser has no room
      return false;
    }
  }

  remove(id) {
    this.storage.removeItem(nameOf(id));
    this.storage.setItem(INDEX, JSON.stringify(this.#index().filter((entry) => entry.id !== id)));
  }

  #index() {
    return this.list().map(({ id, title, mode, updated }) => ({ id, title, mode, updated }));
  }
}

/** Those that the server keeps: its stored responses that this page has made. */
export class ServerKept {
  #listed = []; // what is known of the newest responses, the newest first
  #responses = new Map(); // the same by conversation, the oldest first

  constructor(api) {
    this.api = api;
  }

  /** Asks for the newest, or, unless `whole`, for those that are new. Returns [{id, title, updated, mode, where}]. */
  async list(whole = true) {
    const news = whole ? null : await this.#news();
    this.#listed = news === null ? await this.#pages() : [...news, ...this.#listed];
    const ours = this.#listed.filter(({ metadata }) => metadata?.conversation).reverse();
    this.#responses = Map.groupBy(ours, ({ metadata }) => metadata.conversation);
    const entries = [...this.#responses].map(([id, all]) => ({ id, title: all[0].metadata.title ?? "Untitled", updated: all.at(-1).created_at * 1000, mode: "chat", where: "server" }));
    return entries.sort((a, b) => b.updated - a.updated);
  }

  async #pages() {
    const found = [];
    let after = "";
    for (let page = 0; page < PAGES; page += 1) {
      const { data, has_more: more, last_id: last } = await this.api.json(`v1/responses?limit=20${after}`);
      found.push(...data);
      if (!more) break;
      after = `&after=${encodeURIComponent(last)}`;
    }
    return found;
  }

  /** Those that came since the last list, or null where they are too many to tell. */
  async #news() {
    const { data } = await this.api.json("v1/responses?limit=5");
    const known = data.findIndex(({ id }) => id === this.#listed[0]?.id);
    return known < 0 ? null : data.slice(0, known);
  }

  /** Fetches a listed conversation. */
  async get(id) {
    const listed = this.#responses.get(id) ?? [];
    const whole = [];
    for (const { id: response } of listed) whole.push(await this.#whole(response));
    return fromResponses(id, listed[0]?.metadata?.title ?? "", whole.filter(Boolean));
  }

  async remove(id) {
    for (const { id: response } of this.#responses.get(id) ?? []) {
      await this.api.json(`v1/responses/${response}`, { method: "DELETE" }).catch((error) => {
        if (error.status !== 404) throw error;
      });
    }
    this.#listed = this.#listed.filter(({ metadata }) => metadata?.conversation !== id);
    this.#responses.delete(id);
  }

  /** A response, and the items that it was made of: of one that goes on from another, only its own; or null. */
  async #whole(id) {
    try {
      const response = await this.api.json(`v1/responses/${id}`);
      const which = response.previous_response_id ? "limit=1&order=desc" : "limit=100&order=asc";
      return { response, items: (await this.api.json(`v1/responses/${id}/input_items?${which}`)).data };
    } catch (error) {
      if (error.status === 404) return null; // it has gone since
      throw error;
    }
  }
}

/** The tree that responses make, the oldest first: those to the same words after the same response are siblings. */
export function fromResponses(id, title, whole) {
  const conversation = new Conversation({ id, title, mode: "chat" });
  for (const { response, items } of whole) {
    conversation.system = response.instructions ?? conversation.system;
    let parent = conversation.nodes.has(response.previous_response_id) ? response.previous_response_id : null;
    for (const item of items.filter((each) => each.type === "message")) {
      const author = item.role === "assistant" ? "model" : "user";
      if (item.role !== "system") parent = child(conversation, parent, author, textOf(item)).id;
    }
    const text = response.output.filter((item) => item.type === "message").map(textOf).join("");
    const answer = conversation.add(parent, "model", text, { model: response.model, responseId: response.id });
    conversation.nodes.delete(answer.id);
    conversation.nodes.set(response.id, { ...answer, id: response.id });
    conversation.leaf = response.id;
    conversation.updated = response.created_at * 1000;
  }
  return conversation;
}

function child(conversation, parent, author, text) {
  const same = [...conversation.nodes.values()].find((node) => node.parent === parent && node.author === author && node.text === text);
  return same ?? conversation.add(parent, author, text);
}

function textOf(item) {
  return typeof item.content === "string" ? item.content : item.content.map((part) => part.text ?? "").join("");
}
