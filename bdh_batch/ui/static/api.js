// Speaks to the server that this page is from: JSON, streams, and what went wrong.

import { events } from "./sse.js";

/** What the server refused or reported, with its own words. `status` 0: it was not reached, or the stream was cut. */
export class ApiError extends Error {
  constructor(status, message, { param = null, code = null, retryAfter = null } = {}) {
    super(message);
    this.name = "ApiError";
    Object.assign(this, { status, param, code, retryAfter });
  }
}

export const wasAborted = (error) => error instanceof DOMException && error.name === "AbortError";

/** Requests with the key that was given. `connection` hears of what cannot be reached, `keys` of refused keys. */
export class Api {
  constructor(keys, connection, root = new URL("../", import.meta.url)) {
    Object.assign(this, { keys, connection, root }); // a proxy may serve all this below a path of its own
  }

  url(path) {
    return new URL(path.replace(/^\//, ""), this.root).href;
  }

  /** The JSON of a response. Throws ApiError, or AbortError where `signal` fired. */
  async json(path, options = {}) {
    const response = await this.#send(path, options);
    return this.#reading(response.json());
  }

  /** The text of a response. */
  async text(path, options = {}) {
    const response = await this.#send(path, options);
    return this.#reading(response.text());
  }

  /** Yields the server-sent events of a response, as `{event, data, id}`. */
  async *events(path, options = {}) {
    const response = await this.#send(path, { ...options, accept: "text/event-stream" });
    const stream = events(response.body);
    try {
      for (;;) {
        const next = await this.#reading(stream.next());
        if (next.done) return;
        yield next.value;
      }
    } finally {
      await stream.return();
    }
  }

  /** Yields the JSON of each event of a stream of completions or chats, up to its [DONE]. */
  async *chunks(path, options = {}) {
    for await (const { data } of this.events(path, options)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw errorOf(500, chunk);
      yield chunk;
    }
    throw new ApiError(0, "The stream was cut before the response was complete.");
  }

  /** Follows a stream of events, and connects again whenever it ends, until `signal` fires. Waits longer after each failure.
   *  `path` may be a function that says where to go on. */
  async follow(path, signal, onEvent, onProblem) {
    for (let failures = 0; !signal.aborted; ) {
      try {
        for await (const event of this.events(typeof path === "function" ? path() : path, { signal })) {
          failures = 0;
          onEvent(event);
        }
        onProblem(new ApiError(0, "The stream ended."));
      } catch (error) {
        if (signal.aborted) return;
        onProblem(error);
        if ([401, 403, 404].includes(error.status)) return; // the same again, until somebody does something
      }
      failures += 1;
      await pause(Math.min(10000, 500 * 2 ** Math.min(failures, 5)) * (0.75 + Math.random() / 2), signal);
    }
  }

  async #send(path, { method, body, signal, headers = {}, accept = "application/json" }) {
    const key = this.keys.key;
    const sent = { accept, ...headers, ...this.keys.headers() };
    if (body !== undefined) sent["content-type"] = "application/json";
    const content = body === undefined ? undefined : JSON.stringify(body);
    const response = await this.#reading(
      fetch(this.url(path), { method: method ?? (body === undefined ? "GET" : "POST"), headers: sent, body: content, signal, cache: "no-store" }),
    );
    if (response.ok) return response;
    const error = errorOf(response.status, await response.json().catch(() => ({})), response.headers.get("retry-after"));
    if (error.status === 401 && key === this.keys.key) this.keys.ask(error.message); // else another was given meanwhile
    if (error.status === 503) this.connection.lost(error);
    throw error;
  }

  /** What fetch throws of a server that is gone, said by what it means. */
  async #reading(promise) {
    try {
      return await promise;
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      const gone = new ApiError(0, "The server cannot be reached.");
      this.connection.lost(gone);
      throw gone;
    }
  }
}

function errorOf(status, body, retryAfter = null) {
  const error = body?.error ?? {};
  const message = typeof error === "string" ? error : error.message ?? `The server responded with status ${status}.`;
  const seconds = retryAfter === null ? null : Number(retryAfter);
  return new ApiError(status, message, { param: error.param, code: error.code, retryAfter: seconds });
}

/** Waits, less long where `signal` fires. */
export function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(done, milliseconds);
    function done() {
      clearTimeout(timer);
      signal?.removeEventListener("abort", done);
      resolve();
    }
    signal?.addEventListener("abort", done);
    if (signal?.aborted) done();
  });
}
