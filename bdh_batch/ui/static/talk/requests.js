// What is sent for an answer: a pure function of the conversation, the parameters and what the server's document knows.

/** @returns `{path, body, kind}`; `kind` is "completion", "chat" or "response".
 *  `node` is the answer that is asked for; `schemas` are those of /openapi.json. */
export function requestFor(conversation, node, schemas) {
  const { parent, model, fields = {} } = node;
  const nodes = conversation.path(parent);
  if (conversation.mode === "text") {
    const prompt = nodes.map((node) => node.text).join("");
    return { kind: "completion", path: "v1/completions", body: { model, prompt, ...streamed, ...fields } };
  }
  const stored = storedFields(fields, schemas.ResponseBody?.properties ?? {});
  if (stored === null) return chat(conversation, nodes, model, fields);
  return response(conversation, nodes, node, stored);
}

const streamed = { stream: true, stream_options: { include_usage: true } };
const MOST_METADATA = 512; // characters of a value
const RENAMED = { max_tokens: "max_output_tokens" };

/** The parameters as the Responses API has them, or null where it lacks one: then it is a chat that is not stored. */
function storedFields(fields, known) {
  const found = {};
  for (const [name, value] of Object.entries(fields)) {
    const own = RENAMED[name] ?? name;
    if (!(own in known)) return null;
    found[own] = value;
  }
  return Object.keys(known).length ? found : null;
}

/** The parameters as metadata, so that the request is known after a reload, too; nothing where they are too long for it. */
function kept(fields = {}) {
  const text = JSON.stringify(fields);
  return text.length <= MOST_METADATA ? { fields: text } : {};
}

function role(node) {
  return node.author === "user" ? "user" : "assistant";
}

function chat(conversation, nodes, model, fields) {
  const system = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  const messages = [...system, ...nodes.map((node) => ({ role: role(node), content: node.text }))];
  return { kind: "chat", path: "v1/chat/completions", body: { model, messages, ...streamed, ...fields } };
}

/** It goes on from the stored response before, if that is the same model's: a fork of its state. */
function response(conversation, nodes, node, fields) {
  const { model } = node;
  const earlier = earlierOf(conversation, node);
  const asked = nodes.at(-1);
  const before = nodes.at(-2);
  const known = before?.responseId && before.model === model;
  const all = nodes.map((node) => ({ type: "message", role: role(node), content: node.text }));
  const body = {
    model,
    ...(known ? { previous_response_id: before.responseId, input: asked.text } : { input: all.length > 1 ? all : asked.text }),
    ...(conversation.system ? { instructions: conversation.system } : {}),
    stream: true,
    store: true,
    metadata: { conversation: conversation.id, title: conversation.title, ...(earlier ? { earlier } : {}), ...kept(node.fields) },
    ...fields,
  };
  return { kind: "response", path: "v1/responses", body };
}

/** The stored response of the conversation, whatever its branch, that came just before a node, or null. */
function earlierOf(conversation, node) {
  const nodes = [...conversation.nodes.values()];
  return nodes.slice(0, nodes.findIndex(({ id }) => id === node.id)).findLast(({ responseId }) => responseId)?.responseId ?? null;
}

/** The parameters that metadata has, or undefined where it has none. */
export function fieldsIn(metadata) {
  try {
    const fields = JSON.parse(metadata?.fields ?? "null");
    return fields !== null && typeof fields === "object" && !Array.isArray(fields) ? fields : undefined;
  } catch {
    return undefined; // somebody else's
  }
}
