async () => {
  const { BrowserKept, ServerKept, fromResponses } = await import("/ui/talk/kept.js");
  const { Conversation, titleOf } = await import("/ui/talk/tree.js");
  const stored = new Map();
  const storage = { getItem: (name) => stored.get(name) ?? null, setItem: (name, value) => stored.set(name, value), removeItem: (name) => stored.delete(name) };
  const kept = new BrowserKept(storage);
  const fits = [];
  for (let at = 0; at < 60; at += 1) {
    const one = new Conversation({ mode: "text" });
    one.add(null, "user", `${at} ` + "x".repeat(at < 55 ? 10 : 500000));
    fits.push(kept.put(one));
  }
  const huge = new Conversation();
  huge.add(null, "user", "x".repeat(3 << 20));
  const left = kept.list();
  const said = (role, content) => ({ type: "message", role, content });
  const response = (id, previous, text) => ({ id, previous_response_id: previous, created_at: 1, model: "m", output: [said("assistant", [{ text }])] });
  const tree = fromResponses("c", "t", [
    { response: response("r1", null, "one"), items: [said("system", "s"), said("user", "a")] },
    { response: response("r2", "r1", "two"), items: [said("user", "b")] },
    { response: response("r3", "r1", "three"), items: [said("user", "b")] },
  ]);
  const hex = (digit) => digit.repeat(32);
  const part = (id, role, text) => ({ id: `msg_${id}`, ...said(role, [{ text }]) });
  const last = { id: `resp_${hex("2")}`, created_at: 9, model: "m", previous_response_id: `resp_${hex("1")}`, metadata: { conversation: "c", title: "t", earlier: `resp_${hex("1")}` } };
  const items = [part(`${hex("1")}_i0`, "user", "a"), part(`${hex("1")}_0`, "assistant", "one"), part(`${hex("2")}_i0`, "user", "b")];
  const api = {
    async json(path) {
      if (path.includes("/input_items")) return { data: items, has_more: false };
      if (path.includes("?limit")) return { data: [last], has_more: false, last_id: last.id };
      if (path.endsWith(hex("2"))) return { ...last, output: [part(`${hex("2")}_0`, "assistant", "two")] };
      throw Object.assign(new Error("gone"), { status: 404 });
    },
  };
  const server = new ServerKept(api);
  await server.list();
  const shortened = await server.get("c");
  return {
    shortened: shortened.path().map(({ text, responseId }) => [text, responseId?.at(-1) ?? null]),
    all: fits.every(Boolean), huge: kept.put(huge), titles: left.map(({ title }) => title.slice(0, 2)), stored: stored.size,
    path: tree.path().map(({ text }) => text), siblings: tree.siblings(tree.nodes.get("r2")).length, isStored: tree.isStored,
    markdown: tree.toMarkdown(), title: titleOf("a".repeat(58) + "😀".repeat(9)),
  };
}
