// Light, dark, or as the system has it; and colours for what draws by itself.

const NAME = "bdh-theme";
const NEXT = { system: "light", light: "dark", dark: "system" };
const listeners = new Set();

/** Has `button` go round the themes. */
export function switchThemes(button) {
  const stored = localStorage.getItem(NAME);
  show(stored in NEXT ? stored : "system");
  button.addEventListener("click", () => {
    const chosen = NEXT[document.documentElement.dataset.theme];
    localStorage.setItem(NAME, chosen);
    show(chosen);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", notify);

  function show(theme) {
    document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    notify();
  }
}

/** Calls `listener` whenever colours change. */
export function onThemeChange(listener) {
  listeners.add(listener);
}

function notify() {
  for (const listener of listeners) listener();
}

/** The colour of a custom property, as in `colour("--accent")`, as canvases take it. */
export function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}
