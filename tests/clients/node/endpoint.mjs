// What a client is told of the server, and what it asks for.

import assert from "node:assert/strict";
import { z } from "zod";

export const { BDH_URL: url, BDH_KEY: key, BDH_MODEL: model } = process.env;
export const Scene = z.object({ act: z.union([z.literal(1), z.literal(2), z.literal(3)]), place: z.enum(["Verona", "Mantua"]) });

export function fits({ act, place }) {
  assert.ok([1, 2, 3].includes(act));
  assert.ok(["Verona", "Mantua"].includes(place));
}

export async function count(stream) {
  let items = 0;
  for await (const _ of stream) items += 1;
  return items;
}
