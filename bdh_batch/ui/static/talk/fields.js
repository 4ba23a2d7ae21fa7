// Which parameters there are: from /openapi.json, by the types of their values. It knows no elements.

// What the page says itself, what is about more than one text, and what other views show.
const OWN = new Set([
  ...["model", "prompt", "messages", "stream", "stream_options", "n", "best_of", "echo", "store", "state", "metadata", "user"],
  ...["tools", "tool_choice", "parallel_tool_calls", "response_format", "structured_outputs", "request_id", "safety_identifier"],
  ...["guided_json", "guided_regex", "guided_choice", "guided_grammar", "prompt_cache_key", "max_completion_tokens"],
  ...["logprobs", "top_logprobs", "prompt_logprobs", "neurons", "return_token_ids", "return_tokens_as_token_ids"],
  ...["add_generation_prompt", "continue_final_message"],
]);
/** Shown first, where they exist; all others follow. */
export const FIRST = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop", "repetition_penalty"];

/** The parameters of a body, as `{name, kind, help, range, fallback, options}`; what can only say one thing is left out. */
export function fieldsOf(schema) {
  const found = Object.entries(schema?.properties ?? {})
    .filter(([name]) => !OWN.has(name))
    .map(([name, described]) => ({ name, ...kindOf(described), help: described.description ?? "", fallback: described.default ?? null }))
    .filter(({ kind }) => kind !== null);
  const order = ({ name }) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
  return found.toSorted((a, b) => order(a) - order(b));
}

function kindOf(described) {
  const kinds = flat(described).filter(({ type }) => type !== "null");
  const types = kinds.map(({ type }) => type);
  const known = kinds[0] ?? {};
  const list = kinds.find(({ type }) => type === "array");
  if (types.includes("integer") || types.includes("number")) return { kind: known.type, range: rangeOf(known) };
  if (list) return { kind: list.items?.type === "integer" ? "integers" : "lines" };
  if (known.type === "boolean" || known.type === "string" || known.type === "object") return { kind: known.type };
  return { kind: null };
}

function flat(described) {
  return described.anyOf ? described.anyOf.flatMap(flat) : [described];
}

function rangeOf({ minimum, maximum, exclusiveMinimum }) {
  return { min: minimum ?? exclusiveMinimum, max: maximum, open: exclusiveMinimum !== undefined };
}

/** What a person typed, as the value of a field; undefined where nothing is. Throws RangeError, with the field's name. */
export function valueOf({ name, kind }, typed) {
  const text = typed.trim();
  if (text === "") return undefined;
  if (kind === "boolean") return text === "true";
  if (kind === "string") return typed;
  if (kind === "lines") return typed.split("\n").filter((line) => line !== "").map((line) => line.replaceAll("\\n", "\n"));
  if (kind === "integers") return text.split(/[\s,]+/).map((each) => whole(name, each));
  if (kind === "integer") return whole(name, text);
  if (kind === "number") return number(name, text);
  try {
    return JSON.parse(text);
  } catch {
    throw new RangeError(`${name} should be JSON.`);
  }
}

function number(name, text) {
  const found = Number(text);
  if (!Number.isFinite(found)) throw new RangeError(`${name} should be a number, not ${text}.`);
  return found;
}

function whole(name, text) {
  if (!/^[+-]?\d+$/.test(text)) throw new RangeError(`${name} should be an integer, not ${text}.`);
  if (!Number.isSafeInteger(Number(text))) throw new RangeError(`${name} should lie between -2^53 and 2^53.`);
  return Number(text);
}

export const STRUCTURED = {
  "": { label: "Any text" },
  json: { label: "JSON that fits a schema", example: '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}' },
  regex: { label: "A regular expression", example: "[A-Z][a-z]+ (loves|hates) [A-Z][a-z]+\\." },
  choice: { label: "One of these, a line each", example: "red\ngreen" },
  grammar: { label: "A grammar (Lark)", example: 'start: "yes" | "no"' },
};

/** The field `structured_outputs`, or undefined. Throws RangeError. */
export function structured(kind, typed) {
  if (!kind || typed.trim() === "") return undefined;
  if (kind === "choice") return { choice: typed.split("\n").filter((line) => line !== "") };
  if (kind !== "json") return { [kind]: typed };
  try {
    return { json: JSON.parse(typed) };
  } catch (error) {
    throw new RangeError(`The JSON schema is not JSON: ${error.message}`);
  }
}
