// A question that is written anew, in the place where it stands.

import { element, fitHeight, sends } from "./dom.js";

// Puts an editor into a message's element. replaced: whether more than its own answer follows.
// handlers: {save(text), cancel()}
export function editQuestion(node, text, replaced, handlers) {
  const area = element("textarea", { className: "editor", value: text, rows: 1 });
  area.setAttribute("aria-label", "Your question");
  const save = element("button", { type: "button", className: "text strong" }, "Ask again");
  const cancel = element("button", { type: "button", className: "text" }, "Cancel");
  const row = element("div", { className: "editor-row" }, cancel, save);
  if (replaced) row.prepend(element("span", {}, "The messages below it will be replaced."));
  const form = element("div", { className: "editing" }, area, row);

  const finish = () => {
    if (area.value.trim()) handlers.save(area.value.trim());
  };
  save.addEventListener("click", finish);
  cancel.addEventListener("click", handlers.cancel);
  area.addEventListener("input", () => {
    save.disabled = !area.value.trim();
    fitHeight(area);
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") handlers.cancel();
    if (!sends(event)) return;
    event.preventDefault();
    finish();
  });
  node.replaceChildren(form);
  fitHeight(area);
  area.focus();
  area.setSelectionRange(text.length, text.length);
}
