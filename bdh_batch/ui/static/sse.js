// Reads server-sent events from the body of a response.

const MOST = 16 << 20; // characters of one event: no server of ours sends nearly as many

/** Yields `{event, data, id}` of each event. Comments are left out. Throws RangeError where one does not end. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  try {
    for (let read = await reader.read(); !read.done; read = await reader.read()) {
      left += read.value;
      if (left.includes("\r")) left = left.replaceAll(/\r\n|\r(?!$)/g, "\n");
      let begin = 0;
      for (let end = left.indexOf("\n\n"); end >= 0; end = left.indexOf("\n\n", begin)) {
        const found = parse(left.slice(begin, end));
        begin = end + 2;
        if (found) yield found;
      }
      left = left.slice(begin);
      if (left.length > MOST) throw new RangeError("An event of the stream is too long.");
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
