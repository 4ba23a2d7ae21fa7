// Requests as something to paste: for curl, and for Python with the openai package. The key is never part of it.

/** A command line for a POSIX shell. */
export function asCurl(url, body, withKey) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const key = withKey ? ` \\\n  -H "authorization: Bearer $OPENAI_API_KEY"` : "";
  return `curl -sN ${quoted(url)} \\\n  -H 'content-type: application/json'${key} \\\n  -d ${quoted(JSON.stringify(body, null, 2))}\n`;
}

const CALLS = {
  completion: { name: "completions", own: ["model", "prompt", "stream"], read: ["for event in stream:", "    for choice in event.choices:", '        print(choice.text, end="", flush=True)'] },
  chat: { name: "chat.completions", own: ["model", "messages", "stream"], read: ["for event in stream:", "    for choice in event.choices:", '        print(choice.delta.content or "", end="", flush=True)'] },
  response: { name: "responses", own: ["model", "input", "instructions", "previous_response_id", "stream"], read: ["for event in stream:", '    if event.type == "response.output_text.delta":', '        print(event.delta, end="", flush=True)'] },
};

/** A program. What openai's types may not know goes as `extra_body`, which takes any field. */
export function asPython(root, { kind, body }) {
  const { name, own, read } = CALLS[kind];
  const named = Object.entries(body).filter(([field]) => own.includes(field));
  const extra = Object.fromEntries(Object.entries(body).filter(([field]) => !own.includes(field)));
  const given = named.map(([field, value]) => `    ${field}=${literal(value)},`);
  if (Object.keys(extra).length) given.push(`    extra_body=${literal(extra)},`);
  return [
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(`${root}v1`)}, api_key=os.environ.get("OPENAI_API_KEY", "none"))`,
    `stream = client.${name}.create(`,
    ...given,
    ")",
    ...read,
    "",
  ].join("\n");
}

/** A JSON value as Python writes it. JSON's strings are Python's, but for escapes of lone surrogates, which both have. */
function literal(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${literal(item)}`).join(", ")}}`;
  return JSON.stringify(value);
}
