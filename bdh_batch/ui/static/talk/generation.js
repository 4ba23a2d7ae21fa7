// Runs one request, and reads what comes, whichever of the three APIs it was sent to.

import { ApiError } from "../api.js";

/** Yields texts as they come, and fills in `outcome`: `{finish, usage, responseId, ttft, seconds}`, times in seconds.
 *  `onStored` gets the response, where it was stored.
 *  Throws ApiError, or AbortError where `signal` fired; `outcome` has what was known by then. */
export async function* generate(api, { path, body, kind }, signal, outcome, onStored) {
  const now = () => performance.now();
  const began = now();
  let first = null;
  for await (const text of READERS[kind](api, path, body, signal, outcome, onStored)) {
    first ??= now();
    outcome.ttft = (first - began) / 1000;
    outcome.seconds = (now() - first) / 1000;
    if (text) yield text;
  }
}

/** Tokens per second after the first one, or null where that cannot be said. */
export function rate({ usage, seconds }) {
  const tokens = usage?.output ?? 0;
  return tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null;
}

const READERS = { completion: (...given) => choices((choice) => choice.text, ...given), chat: (...given) => choices((choice) => choice.delta?.content, ...given), response };

async function* choices(textOf, api, path, body, signal, outcome) {
  for await (const chunk of api.chunks(path, { body, signal })) {
    if (chunk.usage) outcome.usage = usageOf(chunk.usage, "prompt", "completion");
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    outcome.finish = choice.finish_reason ?? outcome.finish;
    const text = textOf(choice);
    if (text) yield text;
  }
}

async function* response(api, path, body, signal, outcome, onStored) {
  for await (const { data } of api.events(path, { body, signal })) {
    const event = JSON.parse(data);
    if (event.type === "response.output_text.delta") yield event.delta;
    else if (event.type === "error") throw new ApiError(500, event.message ?? event.error?.message ?? "The response failed.");
    else if (event.type === "response.failed") throw new ApiError(500, event.response.error?.message ?? "The response failed.");
    else if (["response.completed", "response.incomplete"].includes(event.type)) {
      finish(event.response, outcome);
      if (event.response.store) onStored(event.response);
      return;
    }
  }
  throw new ApiError(0, "The stream was cut before the response was complete.");
}

function finish(response, outcome) {
  outcome.responseId = response.store ? response.id : null;
  Object.assign(outcome, outcomeOf(response));
}

/** How a response ended, and its tokens, as far as it says so. */
export function outcomeOf({ usage, incomplete_details: cut }) {
  if (!usage) return {};
  return { usage: usageOf(usage, "input", "output"), finish: cut ? { max_output_tokens: "length" }[cut.reason] ?? cut.reason : "stop" };
}

function usageOf(usage, prompt, completion) {
  return {
    input: usage[`${prompt}_tokens`],
    output: usage[`${completion}_tokens`],
    cached: usage[`${prompt}_tokens_details`]?.cached_tokens ?? 0,
  };
}
