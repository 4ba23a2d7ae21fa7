import assert from "node:assert/strict";
import { test } from "node:test";
import { Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, run, setTracingDisabled, tool } from "@openai/agents";
import OpenAI from "openai";
import { Scene, count, fits, key, model, url } from "./endpoint.mjs";

setTracingDisabled(true);
const client = new OpenAI({ baseURL: url, apiKey: key });
// The model ends no text of its own accord, and to the framework a response that ends by `maxTokens` is an error.
const providerData = { stop: ["e"], include_stop_str_in_output: true };
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

for (const [name, Model] of Object.entries({ OpenAIResponsesModel, OpenAIChatCompletionsModel })) {
  const asked = {
    name: "Romeo",
    instructions: "You are Romeo.",
    model: new Model(client, model),
    modelSettings: { maxTokens: 200, providerData },
  };

  test(`${name}: text`, async () => {
    const result = await run(new Agent(asked), "Speak.");
    assert.ok(result.finalOutput);
  });

  test(`${name}: a stream`, async () => {
    const result = await run(new Agent(asked), "Speak.", { stream: true });
    assert.ok((await count(result)) > 10);
  });

  test(`${name}: a tool, and the way back`, async () => {
    const modelSettings = { maxTokens: 200, providerData, toolChoice: "required", parallelToolCalls: false };
    await run(new Agent({ ...asked, tools: [play], modelSettings }), "Speak.");
    assert.ok(played.length >= 1);
    played.forEach(fits);
  });

  test(`${name}: an object`, async () => {
    const result = await run(new Agent({ ...asked, outputType: Scene, modelSettings: { maxTokens: 200 } }), "Speak.");
    fits(result.finalOutput);
  });
}

test("turns by the id of the response before", async () => {
  const agent = new Agent({ name: "Romeo", model: new OpenAIResponsesModel(client, model), modelSettings: { maxTokens: 200, providerData } });
  const first = await run(agent, "Speak.");
  const second = await run(agent, "Go on.", { previousResponseId: first.lastResponseId });
  assert.ok(second.finalOutput);
});
