import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { APICallError, Output, generateText, stepCountIs, streamText, tool } from "ai";
import { Scene, count, fits, key, model, url } from "./endpoint.mjs";

const provider = createOpenAI({ baseURL: url, apiKey: key }); // whose models ask /v1/responses
const asked = { model: provider(model), prompt: "Speak.", maxOutputTokens: 100 };
const played = [];
const play = tool({ description: "Plays a scene.", inputSchema: Scene, execute: async (scene) => played.push(scene) });

test("text", async () => {
  const { text, usage, finishReason } = await generateText({ ...asked, system: "You are Romeo." });
  assert.ok(text);
  assert.equal(usage.outputTokens, 100);
  assert.equal(finishReason, "length");
});

test("a stream", async () => {
  const result = streamText(asked);
  assert.ok((await count(result.textStream)) > 10);
  assert.equal((await result.usage).outputTokens, 100);
});

test("turns by the id of the response before", async () => {
  const first = await generateText({ ...asked, temperature: 0 });
  const { responseId } = first.providerMetadata.openai;
  const second = await generateText({ ...asked, providerOptions: { openai: { previousResponseId: responseId } } });
  assert.ok(second.usage.cachedInputTokens >= first.usage.totalTokens - 1);
});

test("messages, of which the stored ones are referred to", async () => {
  const first = await generateText(asked);
  const messages = [{ role: "user", content: "Speak." }, ...first.response.messages, { role: "user", content: "Go on." }];
  const { prompt, ...rest } = asked;
  const second = await generateText({ ...rest, messages });
  assert.ok(second.text);
});

test("a tool, and the way back", async () => {
  const { steps } = await generateText({
    ...asked,
    tools: { play },
    toolChoice: "required",
    stopWhen: stepCountIs(2),
  });
  assert.equal(steps.length, 2);
  assert.ok(played.length >= 2);
  played.forEach(fits);
});

test("a streamed tool", async () => {
  const result = streamText({ ...asked, tools: { play }, toolChoice: { type: "tool", toolName: "play" } });
  const [call] = await result.toolCalls;
  fits(call.input);
});

test("an object", async () => {
  const { output } = await generateText({ ...asked, output: Output.object({ schema: Scene }) });
  fits(output);
});

test("errors", async () => {
  const other = generateText({ ...asked, model: provider("other") });
  await assert.rejects(other, (error) => APICallError.isInstance(error) && error.statusCode === 404 && /does not exist/.test(error.message));
});
