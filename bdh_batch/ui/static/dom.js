// Makes elements. Text only ever becomes text: nothing here, and nothing in any view, makes markup of a string.

/** An element with properties and children; strings become text nodes, null and false nothing.
 *  `on…` properties are listeners, `data`, `aria` and `style` are objects, others properties or attributes. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "aria") for (const [key, text] of Object.entries(value)) element.setAttribute(`aria-${key}`, text);
    else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else if (name === "class") element.className = value;
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A button. */
export function button(label, onclick, properties = {}) {
  return h("button", { type: "button", onclick, ...properties }, label);
}

let last = 0;

/** An id that no other element has. */
export function freshId(prefix = "e") {
  last += 1;
  return `${prefix}-${last}`;
}

/** Calls `draw` once in the next animation frame, however often it is asked for before. */
export function oncePerFrame(draw) {
  let asked = 0;
  return () => {
    if (!asked) asked = requestAnimationFrame(() => { asked = 0; draw(); });
  };
}
