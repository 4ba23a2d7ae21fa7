async () => {
  const { events } = await import("/ui/sse.js");
  const bytes = new TextEncoder().encode(": hello\r\n\r\nevent: a\r\ndata: ä1\r\n\r\ndata: 2\ndata:3\nid: 7\n\ndata: cut");
  const body = new ReadableStream({ start(sink) { for (const byte of bytes) sink.enqueue(Uint8Array.of(byte)); sink.close(); } });
  const found = [];
  for await (const event of events(body)) found.push([event.event, event.data, event.id]);
  return found;
}
