// Sends what a form holds to the server that this page is from, and shows the response as it comes.
"use strict";

async function send(form, shown) {
  const fields = form.elements;
  const headers = {};
  const key = document.getElementById("key").value;
  if (key) headers.authorization = `Bearer ${key}`;
  if (fields.body) headers["content-type"] = "application/json";
  // Relative: a proxy may serve all this below a path of its own.
  const id = fields.id ? fields.id.value : "";
  const path = form.dataset.path.slice(1).replace("{id}", encodeURIComponent(id)) || "./";
  const response = await fetch(path, { method: form.dataset.method, headers, body: fields.body && fields.body.value });
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

for (const form of document.querySelectorAll("form[data-path]")) {
  const shown = form.querySelector("output");
  form.hidden = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    shown.hidden = false;
    shown.textContent = "…";
    send(form, shown).catch((error) => { shown.textContent = String(error); });
  });
  for (const button of form.querySelectorAll("button[data-example]")) {
    button.addEventListener("click", () => { form.elements.body.value = button.dataset.example; });
  }
}

function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target) target.open = true;
}
addEventListener("hashchange", openTarget);
openTarget();
