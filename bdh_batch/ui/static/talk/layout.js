// The elements of Talk, and no behaviour.

import { h } from "../dom.js";

export function layout() {
  const parts = {
    list: h("ul", { class: "conversations" }),
    older: h("p", { class: "hint", hidden: true }, "The server has older responses. "),
    olderButton: h("button", { type: "button", class: "small" }, "Show older"),
    fresh: h("button", { type: "button", class: "primary" }, "New conversation"),
    mode: h("select", { id: "talk-mode" }, h("option", { value: "chat" }, "Chat"), h("option", { value: "text" }, "Text")),
    system: h("textarea", { id: "talk-system", rows: 2 }),
    systemRow: h("div", { class: "parameter" }),
    parameters: h("div", { class: "parameters" }),
    log: h("div", { class: "log", tabIndex: 0, role: "region", aria: { label: "Conversation" } }),
    problem: h("div", { class: "error", role: "alert", hidden: true }),
    input: h("textarea", { id: "talk-input", rows: 3, placeholder: "Write to the model" }),
    send: h("button", { type: "submit", class: "primary" }, "Send"),
    stop: h("button", { type: "button", hidden: true }, "Stop"),
    exportJson: h("button", { type: "button", class: "small" }, "Export JSON"),
    exportText: h("button", { type: "button", class: "small" }, "Export text"),
    remove: h("button", { type: "button", class: "small" }, "Delete"),
    hint: h("span", { class: "hint" }),
  };
  parts.older.append(parts.olderButton);
  parts.systemRow.append(h("label", { htmlFor: "talk-system" }, "System message"), parts.system);
  parts.form = h(
    "form",
    { class: "composer" },
    h("label", { class: "unseen", htmlFor: "talk-input" }, "Message"),
    parts.input,
    h("div", { class: "row" }, parts.send, parts.stop, parts.hint, h("span", { class: "end row" }, parts.exportText, parts.exportJson, parts.remove)),
  );
  const wide = matchMedia("(min-width: 900px)").matches;
  const side = (title, label, ...children) => h("details", { class: "side", open: wide, aria: { label } }, h("summary", {}, title), ...children);
  parts.root = h(
    "div",
    { class: "talk" },
    side("Conversations", "Conversations", parts.fresh, parts.list, parts.older),
    h("div", { class: "middle" }, parts.log, parts.problem, parts.form),
    side("Parameters", "Parameters", h("div", { class: "parameter" }, h("label", { htmlFor: "talk-mode" }, "Mode"), parts.mode, h("p", { class: "hint" }, "A chat uses the model's template. Text goes on as it is.")), parts.systemRow, parts.parameters),
  );
  return parts;
}
