// Watch: what the server has done in the last minutes and does now, for those whose key may see it.

import { button, h, oncePerFrame } from "../dom.js";
import { onThemeChange } from "../theme.js";
import { Chart } from "./chart.js";
import { clock, duration, number, share } from "./format.js";
import { Now } from "./now.js";
import { MINUTES, Samples, sum } from "./samples.js";
import { Steps } from "./steps.js";
import { Table } from "./table.js";

const SECONDS = 2; // between samples
const quantiles = (field) => ["median", "95 %", "99 %"].map((label, at) => ({ label, value: (sample) => sample[field]?.[at] ?? null }));
const CHARTS = [
  ["Tokens in a second", [{ label: "generated", value: (s) => s.generated }, { label: "prompt", value: (s) => s.prompt }], number],
  ["Sequences", [{ label: "running", value: (s) => s.running }, { label: "waiting", value: (s) => s.waiting }, { label: "in a step", value: (s) => s.occupancy }], number],
  ["Time to the first token", quantiles("first_token"), duration],
  ["Between tokens", quantiles("between_tokens"), duration],
  ["Slots and prefixes", [{ label: "slots", value: (s) => s.slots }, { label: "held", value: (s) => s.running }, { label: "cached prefixes", value: (s) => s.cached_prefixes }], number],
  ["Refused and moved", [{ label: "refused", value: (s) => count(s.rejections) }, { label: "failovers", value: (s) => count(s.failovers) }, { label: "preempted", value: (s) => s.preemptions }], number],
];
const FIGURES = [
  ["Generated", (s) => `${number(s.generated)} tokens/s`],
  ["Prompt", (s) => `${number(s.prompt)} tokens/s`],
  ["Running", (s) => `${number(s.running)} of ${number(s.slots)} slots`],
  ["Waiting", (s) => number(s.waiting)],
  ["In a step", (s) => `${number(s.occupancy)} sequences`],
  ["A step takes", (s) => duration(s.step_seconds)],
  ["From cached prefixes", (s) => (s.prefix_hits === null ? "–" : `${share(s.prefix_hits)} of prompt tokens`)],
  ["Open requests", (s) => number(s.in_flight)],
];

const count = (labelled) => sum(Object.values(labelled));

class Watch {
  #context;
  #samples = new Samples();
  #abort = null;
  #details = null; // the last ones, for operators
  #paused = false;
  #visible = false;
  #status = h("p", { class: "hint state", role: "status" }, "Connecting…");
  #pause = button("Pause", () => this.#toggle(), { aria: { pressed: "false" } });
  #figures = FIGURES.map(() => h("dd", {}, "–"));
  #totals = h("p", { class: "hint" });
  #charts = CHARTS.map((chart) => new Chart(...chart));
  #minutes = new Table(`Minute by minute`, [
    { title: "Minute", show: ({ minute }) => clock(minute).slice(0, 5) },
    { title: "Generated/s", show: ({ generated }) => number(generated) },
    { title: "Prompt/s", show: ({ prompt }) => number(prompt) },
    { title: "Running", show: ({ running }) => number(running) },
    { title: "Waiting", show: ({ waiting }) => number(waiting) },
    { title: "In a step", show: ({ occupancy }) => number(occupancy) },
    { title: "First token, 95 %", show: ({ first_token: value }) => duration(value) },
    { title: "Between tokens, 95 %", show: ({ between_tokens: value }) => duration(value) },
    { title: "Refused", show: ({ rejections }) => number(rejections) },
  ]);
  #numbers = h("details", { class: "panel" }, h("summary", {}, `The last ${MINUTES} minutes in numbers`), this.#minutes.element);
  #draw = oncePerFrame(() => this.#show());

  constructor(element, context) {
    this.#context = context;
    this.now = new Now(context);
    this.steps = new Steps(context);
    this.steps.element.hidden = true;
    this.#numbers.addEventListener("toggle", this.#draw);
    const list = h("dl", { class: "figures" }, FIGURES.map(([label], index) => h("div", {}, h("dt", {}, label), this.#figures[index])));
    const head = h("div", { class: "row" }, h("h2", {}, "The server"), this.#status, this.#pause);
    const charts = h("div", { class: "charts" }, this.#charts.map((chart) => chart.element));
    element.append(head, h("div", { class: "panel" }, list, this.#totals), charts, this.#numbers, this.now.element, this.steps.element);
    context.keys.addEventListener("change", () => this.#restart());
    document.addEventListener("visibilitychange", () => this.#attend());
    onThemeChange(this.#draw);
    new ResizeObserver(this.#draw).observe(charts);
  }

  show() {
    this.#visible = true;
    this.#attend();
    this.#draw();
  }

  hide() {
    this.#visible = false;
    this.#attend();
    this.steps.stop();
  }

  /** Has the server send samples while somebody sees them. The first are those that came meanwhile. */
  #attend() {
    const seen = this.#visible && document.visibilityState === "visible";
    if (seen && !this.#abort) this.#connect();
    if (seen) return;
    this.#abort?.abort();
    this.#abort = null;
  }

  #connect() {
    const abort = (this.#abort = new AbortController());
    const path = () => `watch/stream?since=${this.#samples.time}`;
    this.#context.api.follow(path, abort.signal, (event) => this.#took(event), (problem) => this.#lost(problem));
  }

  /** Another key may see more, or less. */
  #restart() {
    const visible = this.#visible;
    this.hide();
    this.#details = null;
    this.now.operator(false);
    this.steps.element.hidden = true;
    if (visible) this.show();
  }

  #took({ event, data }) {
    if (event === "sample") {
      if (!this.#samples.add(JSON.parse(data))) return;
    } else if (event === "details") {
      this.#details = JSON.parse(data);
    }
    if (!this.#paused) this.#status.textContent = `Live, ${clock(this.#samples.time)}`;
    this.#draw();
  }

  #lost(problem) {
    if (!this.#paused) this.#status.textContent = problem.message;
    if ([401, 403, 404].includes(problem.status)) this.#abort = null; // until there is another key
  }

  /** While it is paused, samples come in all the same, and nothing on the page changes. */
  #toggle() {
    this.#paused = !this.#paused;
    this.#pause.setAttribute("aria-pressed", String(this.#paused));
    this.#pause.textContent = this.#paused ? "Go on" : "Pause";
    if (this.#paused) this.#status.textContent = `Paused at ${clock(this.#samples.time)}`;
    else this.#draw();
  }

  #show() {
    const last = this.#samples.last;
    if (this.#paused || !this.#visible || !last) return;
    FIGURES.forEach(([, show], index) => { this.#figures[index].textContent = show(last); });
    const [refused, moved] = ["rejections", "failovers"].map((field) => this.#samples.total(field));
    this.#totals.textContent = `In ${MINUTES} minutes: refused ${spelled(refused)}; failovers ${spelled(moved)}.`;
    for (const chart of this.#charts) chart.draw(this.#samples.list, SECONDS);
    this.now.sample(last);
    if (this.#details) {
      this.now.details(this.#details);
      this.steps.element.hidden = false;
    }
    if (this.#numbers.open) this.#minutes.update(this.#samples.minutes(), ({ minute }) => minute);
  }
}

function spelled(counts) {
  const some = Object.entries(counts).map(([label, value]) => `${number(value)} (${label})`);
  return some.length ? some.join(", ") : "none";
}

export function mount(element, context) {
  return new Watch(element, context);
}
