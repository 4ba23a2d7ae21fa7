// The frame: tabs, key, theme, models, and what is wrong with the connection. Each view is a module of its own:
// `mount(element, context)` fills the element once, and may return `{ show(), hide() }`, called as its tab is opened and left.

import { Api } from "./api.js";
import { Connection } from "./connection.js";
import { h } from "./dom.js";
import { Keys } from "./keys.js";
import { mount as look } from "./look/view.js";
import { Models } from "./models.js";
import { mount as talk } from "./talk/view.js";
import { switchThemes } from "./theme.js";
import { mount as watch } from "./watch/view.js";

// All are loaded at once: a server that is gone when a tab is first opened, or is another version, could not load it.
const VIEWS = {
  talk: { title: "Talk", mount: talk },
  look: { title: "Look", mount: look },
  watch: { title: "Watch", mount: watch },
};

const find = (id) => document.getElementById(id);

function announcer(element) {
  return (text) => { element.textContent = text; };
}

function makeContext() {
  const keys = new Keys(find("key"));
  const connection = new Connection(new URL("../readyz", import.meta.url).href);
  const api = new Api(keys, connection);
  return { api, connection, keys, models: new Models(api, find("model")), announce: announcer(find("announcer")) };
}

class Frame {
  #mounted = new Map(); // by name: {section, view}
  #shown = null;

  constructor(context) {
    this.context = context;
    find("tabs").append(...Object.entries(VIEWS).map(([name, { title }]) => h("a", { href: `#${name}`, data: { view: name } }, title)));
    addEventListener("hashchange", () => this.open());
  }

  /** Shows the view that the address names, else the first. */
  open() {
    const named = location.hash.slice(1).split("/")[0];
    const name = Object.hasOwn(VIEWS, named) ? named : Object.keys(VIEWS)[0];
    if (name === this.#shown) return;
    this.#mounted.get(this.#shown)?.view?.hide?.();
    this.#shown = name;
    document.title = `${VIEWS[name].title} · bdh_batch`;
    for (const link of find("tabs").children) {
      if (link.dataset.view === name) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    for (const [other, { section }] of this.#mounted) section.hidden = other !== name;
    if (this.#mounted.has(name)) this.#mounted.get(name).view?.show?.();
    else this.#mount(name);
  }

  #mount(name) {
    const section = h("section", { id: `view-${name}`, aria: { label: VIEWS[name].title } });
    find("view").append(section);
    const view = VIEWS[name].mount(section, this.context) ?? null;
    this.#mounted.set(name, { section, view });
    view?.show?.();
  }
}

function showProblems({ connection, models, announce }) {
  const banner = find("banner");
  connection.addEventListener("change", () => {
    banner.hidden = connection.problem === null;
    banner.textContent = connection.problem === null ? "" : `${connection.problem} This page tries again by itself.`;
  });
  connection.addEventListener("back", () => {
    announce("The server is back.");
    models.load();
  });
}

// The address stays that of the view.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  find("view").focus();
});
const context = makeContext();
switchThemes(find("theme"));
showProblems(context);
context.keys.addEventListener("change", () => context.models.load());
context.models.load();
context.connection.watch();
new Frame(context).open();
document.documentElement.dataset.ready = "";
