import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, embedMany, generateText, stepCountIs, streamText, tool } from "ai";
import { Scene, count, fits, key, model, url } from "./endpoint.mjs";

const provider = createOpenAICompatible({
  name: "bdh",
  baseURL: url,
  apiKey: key,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
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

test("embeddings", async () => {
  const { embeddings } = await embedMany({
    model: provider.embeddingModel(model),
    values: ["Verona", "Mantua"],
  });
  assert.equal(embeddings.length, 2);
});

test("a completion", async () => {
  const { text } = await generateText({ ...asked, model: provider.completionModel(model) });
  assert.ok(text);
});

test("errors", async () => {
  const other = generateText({ ...asked, model: provider("other") });
  await assert.rejects(other, (error) => APICallError.isInstance(error) && error.statusCode === 404 && /does not exist/.test(error.message));
});
