async () => {
  const { BrowserKept, fromResponses } = await import("/ui/talk/kept.js");
  const { Conversation, titleOf } = await import("/ui/talk/tree.js");
  const items = new Map();
  const storage = { getItem: (name) => items.get(name) ?? null, setItem: (name, value) => items.set(name, value), removeItem: (name) => items.delete(name) };
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
  return {
    all: fits.every(Boolean), huge: kept.put(huge), titles: left.map(({ title }) => title.slice(0, 2)), stored: items.size,
    path: tree.path().map(({ text }) => text), siblings: tree.siblings(tree.nodes.get("r2")).length, isStored: tree.isStored,
    markdown: tree.toMarkdown(), title: titleOf("a".repeat(58) + "😀".repeat(9)),
  };
}
