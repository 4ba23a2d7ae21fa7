import assert from "node:assert/strict";
import { test } from "node:test";
import { InferenceClient } from "@huggingface/inference";
import { count, key, model, url } from "./endpoint.mjs";

const client = new InferenceClient(key, { endpointUrl: url });
const asked = { model, messages: [{ role: "user", content: "Speak." }], max_tokens: 100 };

test("text and stream", async () => {
  const { usage } = await client.chatCompletion(asked);
  assert.equal(usage.completion_tokens, 100);
  assert.ok((await count(client.chatCompletionStream(asked))) > 10);
});
