// The scheduler step by step: a number of steps is recorded on request, and looked at one by one.

import { wasAborted } from "../api.js";
import { button, freshId, h } from "../dom.js";
import { colour } from "../theme.js";
import { duration, number } from "./format.js";
import { Table } from "./table.js";

const COUNTS = [16, 50, 100, 200];
const SECONDS = 10; // that a recording waits for steps
const FOLLOW_SECONDS = 1; // between steps that are followed
const STRIP = 60; // height of the picture of all steps
const NONE = "There are no steps: none of this model's engines records them, as on Ray or where an upstream computes it.";
const REASONS = {
  no_slot: "no slot is free",
  max_running: "as many as may hold a state (scheduler.max_running)",
  prefix: "another request computes the beginning of its prompt",
  state_file: "its state is read from a file",
  preempted: "preempted: another one has its slot",
  step_full: "runs, but the step had no time left",
  copy: "runs, but its state is being copied",
};
const COMMON = [
  { title: "Request", show: ({ request, index }) => (index ? `${request} (${index})` : request) },
  { title: "Tenant", show: ({ tenant }) => tenant },
  { title: "Priority", show: ({ priority }) => number(priority) },
];
const PROGRESS = [
  { title: "Prompt", show: ({ prompt }) => number(prompt) },
  { title: "Generated", show: ({ generated }) => number(generated) },
];

export class Steps {
  #context;
  #engines = [];
  #abort = null;
  #following = null;
  #count = h("select", { id: freshId("steps") }, COUNTS.map((count) => h("option", { value: count }, String(count))));
  #record = button("Record", () => this.record(), { class: "primary" });
  #follow = button("Follow", () => this.#toggle(), { aria: { pressed: "false" } });
  #status = h("p", { class: "hint", role: "status" });
  #engine = h("select", { id: freshId("steps"), onchange: () => this.#show() });
  #slider = h("input", { id: freshId("steps"), type: "range", min: 0, max: 0, value: 0, oninput: () => this.#showStep() });
  #strip = h("canvas", { aria: { hidden: "true" } });
  #summary = h("p");
  #members = new Table("In this step", [...COMMON, { title: "Phase", show: ({ phase }) => phase }, { title: "Tokens", show: ({ tokens }) => number(tokens) }, { title: "From position", show: ({ position }) => number(position) }, ...PROGRESS]);
  #waiting = new Table("Waiting", [...COMMON, ...PROGRESS, { title: "Since", show: ({ seconds }) => duration(seconds) }, { title: "Why", show: ({ reason }) => REASONS[reason] ?? reason }], "Nobody waits.");
  #engineRow = h("span", { hidden: true }, h("label", { htmlFor: this.#engine.id }, "Engine "), this.#engine);
  #shown = h("div", { hidden: true });

  constructor(context) {
    this.#context = context;
    this.#shown.append(
      h("div", { class: "row" }, this.#engineRow, h("label", { htmlFor: this.#slider.id }, "Step"), this.#slider),
      this.#strip,
      this.#summary,
      this.#members.element,
      this.#waiting.element,
    );
    this.element = h(
      "section",
      { class: "panel steps", aria: { label: "Steps of the scheduler" } },
      h("h2", {}, "Step by step"),
      h("p", { class: "hint" }, "Which sequences each step computes, who waits, and why. Nothing is recorded until you ask; no text is shown."),
      h("div", { class: "row" }, h("label", { htmlFor: this.#count.id }, "Steps "), this.#count, this.#record, this.#follow),
      this.#status,
      this.#shown,
    );
  }

  /** Has the next steps of the chosen model recorded, and shows them. */
  async record() {
    this.stop();
    this.#status.textContent = "Waiting for steps…";
    await this.#ask(Number(this.#count.value), SECONDS);
  }

  /** Ends what goes on. */
  stop() {
    clearTimeout(this.#following);
    this.#following = null;
    this.#follow.setAttribute("aria-pressed", "false");
    this.#abort?.abort();
  }

  #toggle() {
    const begins = this.#follow.getAttribute("aria-pressed") !== "true";
    this.stop();
    if (begins) {
      this.#follow.setAttribute("aria-pressed", "true");
      this.#next();
    }
  }

  async #next() {
    const seen = document.visibilityState === "visible";
    if (seen && !(await this.#ask(1, SECONDS))) return;
    this.#following = setTimeout(() => this.#next(), FOLLOW_SECONDS * 1000);
  }

  /** Whether it has gone well. */
  async #ask(steps, seconds) {
    const abort = (this.#abort = new AbortController());
    const query = new URLSearchParams({ model: this.#context.models.chosen, steps, seconds });
    try {
      const { engines } = await this.#context.api.json(`watch/steps?${query}`, { signal: abort.signal });
      this.#took(engines.filter((engine) => engine.steps.length), engines.length ? `No step in ${SECONDS} s: nothing runs.` : NONE);
      return true;
    } catch (error) {
      if (wasAborted(error)) return false;
      this.#follow.setAttribute("aria-pressed", "false");
      this.#status.textContent = error.message;
      return false;
    }
  }

  /** `otherwise` says why there are none. */
  #took(engines, otherwise) {
    if (!engines.length) {
      this.#status.textContent = otherwise;
      return;
    }
    this.#engines = engines;
    this.#status.textContent = `${number(engines[0].steps.length)} steps of ${engines.map(({ process }) => process).join(", ")}`;
    const chosen = this.#engine.value;
    this.#engine.replaceChildren(...engines.map(({ process }) => h("option", { value: process }, process)));
    if (engines.some(({ process }) => process === chosen)) this.#engine.value = chosen;
    this.#engineRow.hidden = engines.length < 2;
    this.#shown.hidden = false;
    this.#show();
  }

  get #recorded() {
    return this.#engines.find(({ process }) => process === this.#engine.value)?.steps ?? [];
  }

  #show() {
    this.#slider.max = this.#recorded.length - 1;
    this.#slider.value = 0;
    this.#showStep();
  }

  #showStep() {
    const step = this.#recorded[Number(this.#slider.value)];
    if (!step) return;
    const failed = step.error ? ` It failed: ${step.error}.` : "";
    this.#summary.textContent =
      `Step ${number(step.step)}: ${duration(step.seconds)}, ${number(step.decodes)} decode, ${number(step.prompt_tokens)} prompt tokens, ` +
      `${number(step.copies)} copies; ${number(step.running)} of ${number(step.slots)} slots are held, ${number(step.waiting_total)} are not in it.${failed}`;
    this.#slider.setAttribute("aria-valuetext", `step ${step.step}`);
    const key = (_, at) => at; // clients may give several requests one id
    this.#members.update(step.sequences, key);
    this.#waiting.update(step.waiting, key);
    this.#draw();
  }

  /** All recorded steps as bars as high as they were long: prompt tokens above, and the chosen one marked. */
  #draw() {
    const steps = this.#recorded;
    const width = this.#strip.clientWidth;
    if (!width) return;
    Object.assign(this.#strip, { width: width * devicePixelRatio, height: STRIP * devicePixelRatio });
    const context = this.#strip.getContext("2d");
    context.scale(devicePixelRatio, devicePixelRatio);
    const longest = Math.max(...steps.map(({ seconds }) => seconds)) || 1;
    const each = width / steps.length;
    const [plain, prompt, chosen] = ["--edge", "--warn", "--accent"].map(colour);
    steps.forEach((step, index) => {
      const height = Math.max(2, (step.seconds / longest) * (STRIP - 4));
      context.fillStyle = index === Number(this.#slider.value) ? chosen : step.prompt_tokens ? prompt : plain;
      context.fillRect(index * each, STRIP - height, Math.max(1, each - 1), height);
    });
  }
}
