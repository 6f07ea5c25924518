// Light, dark or the system's appearance, before the page is drawn: so it is not a module.

globalThis.applyTheme = (theme) => {
  for (const node of document.querySelectorAll("[data-theme]")) {
    const own = node.dataset.theme;
    const fixed = theme === own ? "all" : "not all";
    node.media = ["light", "dark"].includes(theme) ? fixed : `(prefers-color-scheme: ${own})`;
  }
};

try {
  globalThis.applyTheme(JSON.parse(localStorage.getItem("flashhead.settings"))?.theme);
} catch {
  // nothing chosen, or no storage: the system's
}
