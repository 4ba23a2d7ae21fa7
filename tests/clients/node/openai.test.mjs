import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodTextFormat } from "openai/helpers/zod";
import { Scene, count, fits, key, model, url } from "./endpoint.mjs";

const client = new OpenAI({ baseURL: url, apiKey: key });
const asked = { model, instructions: "You are Romeo.", input: "Speak.", max_output_tokens: 60 };
const play = {
  type: "function",
  name: "play",
  description: "Plays a scene.",
  parameters: {
    type: "object",
    properties: { act: { enum: [1, 2, 3] }, place: { enum: ["Verona", "Mantua"] } },
    required: ["act", "place"],
    additionalProperties: false,
  },
  strict: true,
};

test("turns", async () => {
  const first = await client.responses.create(asked);
  const second = await client.responses.create({ ...asked, input: "Go on.", previous_response_id: first.id });
  assert.ok(second.output_text);
  assert.ok(second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1);
  const roles = [];
  for await (const item of client.responses.inputItems.list(second.id, { order: "asc" })) roles.push(item.role);
  assert.deepEqual(roles, ["user", "assistant", "user"]);
  assert.equal((await client.responses.retrieve(first.id)).output_text, first.output_text);
  await client.responses.delete(first.id);
  await assert.rejects(client.responses.retrieve(first.id), OpenAI.NotFoundError);
});

test("streams", async () => {
  assert.ok((await count(await client.responses.create({ ...asked, stream: true }))) > 10);
  const final = await client.responses.stream(asked).finalResponse();
  assert.equal(final.usage.output_tokens, 60);
});

test("an object", async () => {
  const parsed = await client.responses.parse({ ...asked, text: { format: zodTextFormat(Scene, "scene") } });
  fits(parsed.output_parsed);
});

test("a tool, and the way back", async () => {
  const tools = { ...asked, tools: [play], max_output_tokens: 200 };
  const first = await client.responses.create({ ...tools, tool_choice: "required", parallel_tool_calls: false });
  const [call] = first.output;
  fits(JSON.parse(call.arguments));
  const input = [{ type: "function_call_output", call_id: call.call_id, output: "done" }];
  const after = await client.responses.create({ ...tools, input, previous_response_id: first.id, tool_choice: "none" });
  assert.ok(after.output_text);
});

test("in the background", async () => {
  const begun = await client.responses.create({ ...asked, max_output_tokens: 50_000, background: true });
  assert.equal(begun.status, "queued");
  assert.equal((await client.responses.cancel(begun.id)).status, "cancelled");
});
