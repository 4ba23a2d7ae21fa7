// Where text goes out of the page: a file, or a dialog to copy from.

import { button, freshId, h } from "../dom.js";

/** Has the browser save a file. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name.replaceAll(/[^\p{L}\p{N}._ -]/gu, "_").slice(0, 80) }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** Shows text, and copies it where the browser lets pages do so. */
export function showCode(title, text, announce) {
  const heading = freshId("code");
  const shown = h("pre", { tabIndex: 0 }, text);
  const copy = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(text);
      announce("Copied.");
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(shown); // without HTTPS the browser has no clipboard for pages
    }
  }, { class: "primary" });
  const dialog = h("dialog", { class: "code-dialog", aria: { labelledby: heading } }, h("h2", { id: heading }, title), shown, h("p", { class: "row" }, copy, button("Close", () => dialog.close())));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}
