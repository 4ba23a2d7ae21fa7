import assert from "node:assert/strict";
import { test } from "node:test";
import { Agent, OpenAIChatCompletionsModel, run, setTracingDisabled, tool } from "@openai/agents";
import OpenAI from "openai";
import { Scene, count, fits, key, model, url } from "./endpoint.mjs";

setTracingDisabled(true);
const chat = new OpenAIChatCompletionsModel(new OpenAI({ baseURL: url, apiKey: key }), model);
const asked = { name: "Romeo", instructions: "You are Romeo.", model: chat, modelSettings: { maxTokens: 100 } };
const played = [];
const play = tool({
  name: "play",
  description: "Plays a scene.",
  parameters: Scene,
  execute: async (scene) => {
    played.push(scene);
    return "done";
  },
});

test("text", async () => {
  const result = await run(new Agent(asked), "Speak.");
  assert.ok(result.finalOutput);
});

test("a stream", async () => {
  const result = await run(new Agent(asked), "Speak.", { stream: true });
  assert.ok((await count(result)) > 10);
});

test("a tool, and the way back", async () => {
  const modelSettings = { maxTokens: 100, toolChoice: "required", parallelToolCalls: false };
  await run(new Agent({ ...asked, tools: [play], modelSettings }), "Speak.");
  assert.ok(played.length >= 1);
  played.forEach(fits);
});

test("an object", async () => {
  const result = await run(new Agent({ ...asked, outputType: Scene }), "Speak.");
  fits(result.finalOutput);
});
