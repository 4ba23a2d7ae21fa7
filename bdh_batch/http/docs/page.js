// Sends what a form holds to the server that this page is from, and shows the response as it comes. The fields of a form
// are made of the OpenAPI document when they are first opened; what is sent is the JSON that stands below them.
"use strict";

const KEY = "bdh-api-key"; // as in the page at /ui, which shares it: until the tab is closed
const THEME = "bdh-theme";
const NEXT = { system: "light", light: "dark", dark: "system" };
const key = document.getElementById("key");
let described = null; // the OpenAPI document, once somebody needs it

function authorization() {
  return key.value ? { authorization: `Bearer ${key.value}` } : {};
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

async function send(form, shown) {
  const fields = form.elements;
  const headers = authorization();
  if (fields.body) headers["content-type"] = "application/json";
  // Relative: a proxy may serve all this below a path of its own.
  const inPath = [...form.querySelectorAll('input[data-in="path"]')];
  const inQuery = [...form.querySelectorAll('input[data-in="query"]')].filter((each) => each.value);
  const path = inPath.reduce((text, { name, value }) => text.replace(`{${name}}`, encodeURIComponent(value)), form.dataset.path.slice(1)) || "./";
  const query = new URLSearchParams(inQuery.map((each) => [each.name, each.value])).toString();
  const address = query ? `${path}?${query}` : path;
  const response = await fetch(address, { method: form.dataset.method, headers, body: fields.body && fields.body.value });
  shown.textContent = `${response.status} ${response.statusText}\n`;
  for (const name of ["x-request-id", "openai-processing-ms", "retry-after"]) {
    if (response.headers.has(name)) shown.textContent += `${name}: ${response.headers.get(name)}\n`;
  }
  shown.textContent += "\n";
  if (!(response.headers.get("content-type") || "").startsWith("application/json")) return pour(response, shown);
  shown.textContent += JSON.stringify(await response.json(), null, 2);
}

async function pour(response, shown) {
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let read = await reader.read(); !read.done; read = await reader.read()) shown.append(read.value);
}

// The fields of a body

async function documented() {
  if (!described) described = await (await fetch("openapi.json", { headers: authorization() })).json();
  return described;
}

function resolved(schema) {
  return schema.$ref ? described.components.schemas[schema.$ref.split("/").pop()] : schema;
}

/** What a field may be apart from null; of several kinds the first that a control can be made of. */
function kindOf(schema) {
  const kinds = (schema.anyOf || schema.oneOf || [schema]).map(resolved).filter(({ type }) => type !== "null");
  return kinds.find(({ type, enum: some }) => some || ["boolean", "integer", "number", "string"].includes(type)) || kinds[0] || {};
}

function control(kind, value) {
  const choices = kind.enum || (kind.type === "boolean" ? [true, false] : null);
  if (choices) {
    const options = ["", ...choices.map((each) => JSON.stringify(each))];
    return make("select", {}, ...options.map((text) => make("option", { value: text }, text)));
  }
  if (kind.type === "integer" || kind.type === "number") {
    return make("input", { type: "number", step: kind.type === "integer" ? 1 : "any", min: kind.minimum ?? "", max: kind.maximum ?? "", placeholder: value ?? "" });
  }
  return make("input", { type: "text", spellcheck: false, placeholder: kind.type === "string" ? value ?? "" : "JSON" });
}

/** The value that a control holds; undefined is none. Throws SyntaxError where it is no JSON. */
function read(element, kind) {
  if (element.value === "") return undefined;
  return kind.type === "string" && !kind.enum ? element.value : JSON.parse(element.value);
}

function write(element, kind, value) {
  if (value === undefined || value === null) element.value = "";
  else element.value = kind.type === "string" && !kind.enum && typeof value === "string" ? value : JSON.stringify(value);
}

function bodyOf(text) {
  try {
    const found = JSON.parse(text.value);
    return typeof found === "object" && found !== null && !Array.isArray(found) ? found : null;
  } catch {
    return null; // it is being written
  }
}

/** Makes a control for each field of a form's body. */
async function fill(fields, form) {
  const { paths } = await documented();
  fields.replaceChildren();
  const operation = paths[form.dataset.path][form.dataset.method.toLowerCase()];
  const { schema } = operation.requestBody.content["application/json"];
  const text = form.elements.body;
  const given = Object.keys(bodyOf(text) || {});
  const kinds = (schema.oneOf || [schema]).map(resolved); // the one that has the example's fields
  const { properties = {}, required = [] } = kinds.find((each) => given.every((name) => name in each.properties)) || kinds[0];
  const rank = ([name]) => (required.includes(name) ? 0 : 1);
  const controls = Object.entries(properties).sort((one, other) => rank(one) - rank(other)).map(([name, field]) => {
    const kind = kindOf(field);
    const element = control(kind, field.default);
    const help = make("span", { className: "hint", id: `${form.closest("[id]").id}-${name}` }, field.description || "");
    element.setAttribute("aria-describedby", help.id);
    element.addEventListener("change", () => change(text, name, element, kind));
    const label = make("label", {}, make("code", {}, required.includes(name) ? `${name} *` : name), element);
    fields.append(make("div", {}, label, help));
    return { name, kind, element };
  });
  const show = () => {
    const body = bodyOf(text);
    for (const { name, kind, element } of body ? controls : []) write(element, kind, body[name]);
  };
  text.addEventListener("input", show);
  show();
}

function change(text, name, element, kind) {
  const body = bodyOf(text) || {};
  try {
    const value = read(element, kind);
    if (value === undefined) delete body[name];
    else body[name] = value;
    element.setCustomValidity("");
    text.value = JSON.stringify(body, null, 2);
  } catch (error) {
    element.setCustomValidity(String(error));
    element.reportValidity();
  }
}

// The page

function prepare(form) {
  const shown = form.querySelector("output");
  const fields = form.querySelector(".fields");
  form.hidden = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    shown.hidden = false;
    shown.textContent = "…";
    send(form, shown).catch((error) => { shown.textContent = String(error); });
  });
  for (const button of form.querySelectorAll("button[data-example]")) {
    button.addEventListener("click", () => {
      form.elements.body.value = button.dataset.example;
      form.elements.body.dispatchEvent(new Event("input"));
    });
  }
  let filled = null; // once: it may be closed and opened again while the document is fetched
  fields?.parentElement.addEventListener("toggle", () => {
    filled ??= fill(fields, form).catch((error) => {
      fields.textContent = String(error);
      filled = null;
    });
  });
}

function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target) target.open = true;
}

/** Leaves what has all the words that are looked for. */
function find(words) {
  for (const section of document.querySelectorAll("article > section")) {
    const entries = [...section.querySelectorAll(":scope > details")];
    for (const entry of entries) {
      const text = (entry.id + entry.firstChild.textContent).toLowerCase();
      entry.hidden = !words.every((word) => text.includes(word));
    }
    section.hidden = entries.every(({ hidden }) => hidden);
  }
}

function showTheme(theme, button) {
  document.documentElement.dataset.theme = theme;
  button.textContent = `Theme: ${theme}`;
}

const theme = document.getElementById("theme");
const stored = localStorage.getItem(THEME);
showTheme(stored in NEXT ? stored : "system", theme);
theme.addEventListener("click", () => {
  const chosen = NEXT[document.documentElement.dataset.theme];
  localStorage.setItem(THEME, chosen);
  showTheme(chosen, theme);
});
key.value = sessionStorage.getItem(KEY) ?? "";
key.addEventListener("change", () => {
  if (key.value) sessionStorage.setItem(KEY, key.value);
  else sessionStorage.removeItem(KEY);
});
document.getElementById("find").addEventListener("input", (event) => {
  find(event.target.value.toLowerCase().split(/\s+/).filter(Boolean));
});
document.querySelectorAll("form[data-path]").forEach(prepare);
addEventListener("hashchange", openTarget);
openTarget();
