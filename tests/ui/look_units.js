// Run in the page: what the modules that know no element do.
async () => {
  const { History, MOST_NEURONS } = await import(new URL("ui/look/history.js", document.baseURI));
  const { Layout } = await import(new URL("ui/look/map.js", document.baseURI));
  const names = { tokens: ["bytes:\\xe2", "bytes:\\x80", "bytes:\\x9c", "bytes:\\xc3", "x", "7"],
    token_logprobs: [null, -1, -1, -1, -1, -2], top_logprobs: [null, {}, {}, {}, {}, { 7: -2, 1: -3, a: -0.5 }] };
  const text = new History({ layers: 0, heads: 0, perHead: 1 }, 1, 2);
  text.addNames(names);
  const tiny = new History({ layers: 1, heads: 1, perHead: 8 }, 2, 0);
  tiny.addNeurons([5, 6].map((id) => ({ token_id: id, layers: [{ active: 0, strongest: [] }] })));
  tiny.addNames({ tokens: ["a"], token_logprobs: [-1] });
  const ends = [tiny.end];
  tiny.complete = true; // a stop string's tokens have no names
  ends.push(tiny.end, tiny.token(1).label);
  const shape = { layers: 6, heads: 4, perHead: 1024 };
  const long = new History(shape, 64, 1);
  const layers = Array.from({ length: 6 }, (_, layer) => ({ active: 0.5, strongest: [{ head: 3, neuron: 1000 + layer, value: 2 }] }));
  for (let id = 0; id < 20000; id += 1) {
    long.addNeurons([{ token_id: id, layers }]);
    long.addNames({ tokens: [`${id % 300}`], token_logprobs: [-1], top_logprobs: [{ a: -1 }] });
  }
  const layout = new Layout({ layers: 3, heads: 5, perHead: 1000 });
  const dots = new Set();
  let wrong = 0;
  for (let each = 0; each < 15000; each += 1) {
    const [layer, head, neuron] = [Math.floor(each / 5000), Math.floor(each / 1000) % 5, each % 1000];
    const [x, y] = layout.at(layout.index(layer, head, neuron));
    const back = layout.neuron(x + 0.5, y + 0.5);
    if (x >= layout.width || y >= layout.height || back.layer !== layer || back.head !== head || back.neuron !== neuron) wrong += 1;
    dots.add(y * layout.width + x);
  }
  const coarse = new Layout({ layers: 64, heads: 64, perHead: 65536 });
  return {
    ends,
    labels: names.tokens.map((_, at) => text.token(at).label), others: text.token(5).others.map(({ name }) => name),
    begin: long.begin, end: long.end, bytes: long.bytes, most: MOST_NEURONS, oldest: long.token(long.begin).id,
    last: long.token(19999).label, fires: long.occurrences({ layer: 5, head: 3, neuron: 1005 }).length,
    silent: long.occurrences({ layer: 5, head: 3, neuron: 1004 }).length, dots: dots.size, wrong,
    pixels: coarse.width * coarse.height,
  };
}
