// A table whose rows stay the same elements while what they show changes: focus and selection stay where they are.

import { h } from "../dom.js";

/** `columns` are `{title, show(row)}`, whose text is kept up, or `{title, make(key)}`, an element that is made once and may
 *  have `update(row)`. */
export class Table {
  #columns;
  #body = h("tbody");
  #rows = new Map(); // by key: {element, cells}
  #empty;

  constructor(caption, columns, empty = "None.") {
    this.#columns = columns;
    this.#empty = h("p", { class: "hint" }, empty);
    const head = h("tr", {}, columns.map(({ title }) => h("th", { scope: "col" }, title)));
    this.table = h("table", {}, h("caption", {}, caption), h("thead", {}, head), this.#body);
    this.element = h("div", { class: "wide", tabIndex: 0, role: "region", aria: { label: caption } }, this.table, this.#empty);
    this.update([], () => "");
  }

  /** Shows these rows, in this order; `keyOf(row, at)` names each, and no two alike. */
  update(rows, keyOf) {
    const keys = new Set();
    let before = null;
    for (const [at, row] of rows.entries()) {
      const key = keyOf(row, at);
      keys.add(key);
      if (!this.#rows.has(key)) this.#rows.set(key, this.#make(key));
      const { element, cells } = this.#rows.get(key);
      const next = before ? before.nextSibling : this.#body.firstChild;
      if (element !== next) this.#body.insertBefore(element, next);
      before = element;
      cells.forEach((cell, index) => this.#fill(cell, this.#columns[index], row));
    }
    for (const [key, { element }] of this.#rows) {
      if (keys.has(key)) continue;
      element.remove();
      this.#rows.delete(key);
    }
    this.table.hidden = rows.length === 0;
    this.#empty.hidden = rows.length > 0;
  }

  #make(key) {
    const cells = this.#columns.map(({ make }, index) => {
      const cell = h(index ? "td" : "th", index ? {} : { scope: "row" });
      if (make) cell.append(make(key));
      return cell;
    });
    return { element: h("tr", {}, cells), cells };
  }

  #fill(cell, { show }, row) {
    if (!show) return cell.firstChild.update?.(row);
    const text = show(row);
    if (cell.textContent !== text) cell.textContent = text;
  }
}
