// Reads server-sent events from the body of a response.

const MOST = 16 << 20; // characters of one event: no server of ours sends nearly as many

/** Yields `{event, data, id}` of each event. Comments are left out. Throws RangeError where one does not end. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let block = []; // parts of the event that has not ended
  let size = 0;
  let held = ""; // half of an end of line, perhaps
  try {
    for (let read = await reader.read(); !read.done; read = await reader.read()) {
      let text = held + read.value;
      held = text.endsWith("\r") ? "\r" : "";
      text = text.slice(0, text.length - held.length).replaceAll(/\r\n?/g, "\n");
      if (!text) continue;
      if (text[0] === "\n" && block.at(-1)?.endsWith("\n")) text = `${block.pop()}${text}`; // an empty line, in two pieces
      for (const [at, part] of text.split("\n\n").entries()) {
        if (at > 0) {
          const found = parse(block.join(""));
          if (found) yield found;
          [block, size] = [[], 0];
        }
        if (part) block.push(part);
        size += part.length;
      }
      if (size > MOST) throw new RangeError("An event of the stream is too long.");
    }
  } finally {
    await reader.cancel().catch(() => {}); // it may have failed already: whoever reads knows
  }
}

function parse(block) {
  const found = { event: "message", data: "", id: null };
  const data = [];
  for (const line of block.split("\n")) {
    const colon = line.indexOf(":");
    if (colon === 0) continue;
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
    if (name === "data") data.push(value);
    else if (name === "event") found.event = value;
    else if (name === "id") found.id = value;
  }
  if (!data.length) return null;
  found.data = data.join("\n");
  return found;
}
