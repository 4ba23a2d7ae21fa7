// Talk.
import { h } from "../dom.js";

export function mount(element) {
  element.append(h("p", {}, "Talk"));
}
