// The samples of the last minutes: as many as the server keeps, and no more.

export const MINUTES = 15;
const SPAN = MINUTES * 60; // seconds
const MOST = 1000; // samples, whatever their times say
const AVERAGED = ["generated", "prompt", "running", "waiting", "occupancy"];

export class Samples {
  list = [];

  /** The time of the last one, in Unix seconds; 0 without any. */
  get time() {
    return this.list.at(-1)?.time ?? 0;
  }

  get last() {
    return this.list.at(-1) ?? null;
  }

  /** Takes one more; false where it is not newer than the last one. A server that has set its clock back begins anew. */
  add(sample) {
    if (sample.time < this.time - SPAN) this.list = [];
    if (sample.time <= this.time) return false;
    this.list.push(sample);
    const first = this.list.findIndex(({ time }) => time > sample.time - SPAN);
    this.list.splice(0, Math.max(first, this.list.length - MOST));
    return true;
  }

  /** Sums up a field of counts by label, as rejections by reason. */
  total(field) {
    const found = {};
    for (const sample of this.list) for (const [label, count] of Object.entries(sample[field])) found[label] = (found[label] ?? 0) + count;
    return found;
  }

  /** One row for each minute, the latest first: means, and the worst p95 of each latency. */
  minutes() {
    const found = new Map();
    for (const sample of this.list) {
      const minute = Math.floor(sample.time / 60) * 60;
      if (!found.has(minute)) found.set(minute, []);
      found.get(minute).push(sample);
    }
    return [...found].reverse().map(([minute, some]) => ({
      minute,
      ...Object.fromEntries(AVERAGED.map((field) => [field, mean(some.map((sample) => sample[field]))])),
      first_token: worst(some.map((sample) => sample.first_token)),
      between_tokens: worst(some.map((sample) => sample.between_tokens)),
      rejections: sum(some.map((sample) => sum(Object.values(sample.rejections)))),
    }));
  }
}

export function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

function mean(values) {
  const known = values.filter((value) => value !== null);
  return known.length ? sum(known) / known.length : null;
}

function worst(quantiles) {
  const known = quantiles.filter((each) => each !== null).map((each) => each[1]);
  return known.length ? Math.max(...known) : null;
}
