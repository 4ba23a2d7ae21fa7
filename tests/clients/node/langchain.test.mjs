import assert from "node:assert/strict";
import { test } from "node:test";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { ChatOpenAI, OpenAIEmbeddings } from "@langchain/openai";
import { Scene, count, fits, key, model, url } from "./endpoint.mjs";

const chat = new ChatOpenAI({ model, apiKey: key, maxTokens: 100, configuration: { baseURL: url } });
const play = tool(async () => "done", { name: "play", description: "Plays a scene.", schema: Scene });

test("text and stream", async () => {
  const answer = await chat.invoke("Speak.");
  assert.equal(answer.usage_metadata.output_tokens, 100);
  assert.ok((await count(await chat.stream("Speak."))) > 10);
});

test("a tool, and the way back", async () => {
  const question = new HumanMessage("Speak.");
  const answer = await chat.bindTools([play], { tool_choice: "play" }).invoke([question]);
  const [call] = answer.tool_calls;
  fits(call.args);
  await chat.invoke([question, answer, new ToolMessage({ content: "done", tool_call_id: call.id })]);
});

for (const method of ["jsonSchema", "functionCalling"]) {
  test(`an object by ${method}`, async () => {
    fits(await chat.withStructuredOutput(Scene, { method, name: "scene" }).invoke("Speak."));
  });
}

test("embeddings", async () => {
  const embedder = new OpenAIEmbeddings({ model, apiKey: key, configuration: { baseURL: url } });
  assert.equal((await embedder.embedDocuments(["Verona", "Mantua"])).length, 2);
});
