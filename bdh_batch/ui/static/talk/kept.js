// Conversations that are kept: by the server, as stored responses, or else in this browser, within bounds.

import { outcomeOf } from "./generation.js";
import { fieldsIn } from "./requests.js";
import { Conversation } from "./tree.js";

const INDEX = "bdh-conversations"; // [{id, title, mode, updated}], the newest first
const MOST = 50; // conversations, and
const MOST_CHARACTERS = 2 << 20; // of all of them, in this browser: the oldest go
const PAGES = 5; // of the server's list at a time, and
const PAGE = 100; // responses of each
const OWNER = /^msg_([0-9a-f]{32})_(i?)\d+$/; // an item's id: of which response it is, and whether of its input

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

/** Those that the server keeps: its stored responses that this page has made. Each says in its `metadata` which one of its
 *  conversation was made just before it, so that all are found, however many others are newer. */
export class ServerKept {
  #listed = []; // what is known of the newest responses, the newest first
  #after = null; // the id behind which older ones would be listed; null where there are none

  constructor(api) {
    this.api = api;
  }

  /** Whether there are older responses than those that were listed. */
  get hasOlder() {
    return this.#after !== null;
  }

  /** Conversations of the responses that are known, as [{id, title, updated, mode, where}], the newest first. */
  get entries() {
    const entries = [...this.#grouped()].map(([id, all]) => ({ id, title: all[0].metadata.title ?? "Untitled", updated: all.at(-1).created_at * 1000, mode: "chat", where: "server" }));
    return entries.sort((a, b) => b.updated - a.updated);
  }

  /** Asks for the newest responses. */
  async list() {
    const [found, after] = await this.#pages(null);
    [this.#listed, this.#after] = [found, after];
  }

  /** Asks for those before them. */
  async listOlder() {
    const [found, after] = await this.#pages(this.#after);
    this.#listed.push(...found);
    this.#after = after;
  }

  /** Another response has been stored. */
  add({ id, created_at, model, previous_response_id, metadata, incomplete_details, usage }) {
    this.#listed.unshift({ id, created_at, model, previous_response_id, metadata, incomplete_details, usage });
  }

  /** Fetches a conversation of which a response is listed; null where it has gone since. */
  async get(id) {
    const known = await this.#all(id);
    const title = known[0]?.metadata.title ?? "Untitled";
    const texts = new Map(); // by response: {items, output}
    for (const response of known.toReversed()) if (!texts.has(response.id)) await this.#read(response.id, known, texts);
    const whole = known.filter((response) => texts.has(response.id)).map((response) => ({ response: { ...response, ...texts.get(response.id) }, items: texts.get(response.id).items }));
    return whole.length ? fromResponses(id, title, whole) : null;
  }

  /** Deletes all responses of a conversation. */
  async remove(conversation) {
    const known = [...conversation.nodes.values()].map(({ responseId }) => responseId).filter(Boolean);
    const listed = this.#grouped().get(conversation.id) ?? [];
    for (const id of new Set([...known, ...listed.map((response) => response.id)])) await this.#unless404(`v1/responses/${id}`, { method: "DELETE" });
    this.#listed = this.#listed.filter(({ metadata }) => metadata?.conversation !== conversation.id);
  }

  /** The listed responses by conversation, the oldest first. */
  #grouped() {
    return Map.groupBy(this.#listed.filter(({ metadata }) => metadata?.conversation).reverse(), ({ metadata }) => metadata.conversation);
  }

  async #pages(after) {
    const found = [];
    for (let page = 0; page < PAGES; page += 1) {
      const behind = after === null ? "" : `&after=${encodeURIComponent(after)}`;
      const { data, has_more: more, last_id: last } = await this.api.json(`v1/responses?limit=${PAGE}${behind}`);
      found.push(...data);
      if (!more) return [found, null];
      after = last;
    }
    return [found, after];
  }

  /** All responses of a conversation, the oldest first. Those that are not listed are fetched one by one. */
  async #all(id) {
    const listed = this.#grouped().get(id) ?? [];
    const known = new Set(listed.map((response) => response.id));
    const older = [];
    const waiting = listed.flatMap(before);
    while (waiting.length) {
      const next = waiting.pop();
      if (known.has(next)) continue;
      known.add(next);
      const response = await this.#unless404(`v1/responses/${encodeURIComponent(next)}`);
      if (response?.metadata?.conversation !== id) continue; // it has gone, or somebody else went on from another one
      older.push(response);
      waiting.push(...before(response));
    }
    return [...older.reverse(), ...listed].sort((a, b) => a.created_at - b.created_at);
  }

  /** Fills in the texts of a response, and of all before it, which are its items. `known` gets those before it that have
   *  gone meanwhile, too. */
  async #read(id, known, texts) {
    const response = await this.#unless404(`v1/responses/${encodeURIComponent(id)}`);
    if (response === null) return;
    const items = Map.groupBy(await this.#items(id), (item) => ownerOf(item) ?? id);
    let last = null;
    for (const [owner, all] of items) {
      const own = Map.groupBy(all, (item) => (OWNER.exec(item.id)?.[2] === "" ? "output" : "items"));
      if (!texts.has(owner)) texts.set(owner, { items: own.get("items") ?? [], output: own.get("output") ?? [] });
      if (known.every((each) => each.id !== owner)) known.splice(known.findIndex((each) => each.id === last) + 1, 0, { id: owner, previous_response_id: last });
      last = owner;
    }
    texts.set(id, { items: texts.get(id)?.items ?? [], output: response.output, instructions: response.instructions });
  }

  async #items(id) {
    const found = [];
    for (let after = ""; ; ) {
      const page = await this.#unless404(`v1/responses/${encodeURIComponent(id)}/input_items?limit=100&order=asc${after}`);
      found.push(...(page?.data ?? []));
      if (!page?.has_more) return found;
      after = `&after=${encodeURIComponent(page.last_id)}`;
    }
  }

  /** What the server returns, or null where there is nothing (any more). */
  async #unless404(path, options = {}) {
    try {
      return await this.api.json(path, options);
    } catch (error) {
      if (error.status === 404) return null;
      throw error;
    }
  }
}

/** The id of the response that an item was part of; null where others than the server have named it. */
function ownerOf(item) {
  const hex = OWNER.exec(item.id)?.[1];
  return hex ? `resp_${hex}` : null;
}

/** The responses that one names as made before it: last the one that was made just before it. */
function before({ previous_response_id: previous, metadata }) {
  return [previous, metadata?.earlier].filter(Boolean);
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
    const answer = conversation.add(parent, "model", text, { model: response.model, responseId: response.id, fields: fieldsIn(response.metadata), outcome: outcomeOf(response) });
    conversation.nodes.delete(answer.id);
    conversation.nodes.set(response.id, { ...answer, id: response.id });
    conversation.leaf = response.id;
    if (response.created_at) conversation.updated = response.created_at * 1000;
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
