// The official Node client: a streamed chat, tools, a JSON schema, log-probabilities, embeddings.
// npm install && node chat.mjs

import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.OPENAI_BASE_URL ?? "http://127.0.0.1:8000/v1",
  apiKey: process.env.OPENAI_API_KEY ?? "none",
});

const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "Speak." }];
const scene = {
  type: "object",
  properties: { act: { type: "integer", minimum: 1, maximum: 5 }, place: { enum: ["Verona", "Mantua"] } },
  required: ["act", "place"],
  additionalProperties: false,
};

const stream = client.chat.completions.stream({
  model,
  messages,
  max_tokens: 100,
  stream_options: { include_usage: true },
});
stream.on("content", (text) => process.stdout.write(text));
const { usage } = await stream.finalChatCompletion();
console.log(`\n# ${usage.completion_tokens} tokens`);

const structured = await client.chat.completions.create({
  model,
  messages,
  response_format: { type: "json_schema", json_schema: { name: "scene", schema: scene, strict: true } },
});
const { act, place } = JSON.parse(structured.choices[0].message.content);
console.log(`# a scene: act ${act}, ${place}`);

const called = await client.chat.completions.create({
  model,
  messages,
  tools: [{ type: "function", function: { name: "play", parameters: scene } }],
  tool_choice: { type: "function", function: { name: "play" } },
});
const { name, arguments: args } = called.choices[0].message.tool_calls[0].function;
console.log(`# a call: ${name} in ${JSON.parse(args).place}`);

const scored = await client.chat.completions.create({
  model,
  messages,
  max_tokens: 1,
  logprobs: true,
  top_logprobs: 3,
});
const likeliest = scored.choices[0].logprobs.content[0].top_logprobs;
console.log(`# the likeliest first tokens: ${likeliest.map(({ token }) => JSON.stringify(token)).join(" ")}`);

const embedded = await client.embeddings.create({ model, input: ["Verona", "Mantua"], dimensions: 8 });
console.log(`# ${embedded.data.length} embeddings of ${embedded.data[0].embedding.length}`);

try {
  await client.completions.create({ model, prompt: "a", suffix: "b" });
} catch (error) {
  if (!(error instanceof OpenAI.BadRequestError)) throw error;
  console.log(`# refused: ${error.param} (${error.code})`);
}
