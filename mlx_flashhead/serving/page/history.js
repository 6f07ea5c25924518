// The list of conversations, a drawer on small screens.

import { element, iconButton } from "./dom.js";
import { chatTitle } from "./conversation.js";

const list = document.getElementById("chats");
const panel = document.getElementById("history");
const main = document.getElementById("main");
const opener = document.getElementById("open-history");
const picker = document.getElementById("import-file");
const wide = matchMedia("(min-width: 900px)");

// handlers: {open(chat), remove(chat)}
export function drawHistory(chats, current, handlers) {
  list.replaceChildren(
    ...chats.map((chat) => {
      const open = element(
        "button",
        { type: "button", className: "open", onclick: () => handlers.open(chat) },
        element("span", { className: "name" }, chatTitle(chat)),
        element("span", { className: "when" }, when(chat.updated)),
      );
      const remove = iconButton("delete", "Delete the conversation", () => handlers.remove(chat));
      const item = element("li", { className: chat === current ? "current" : "" }, open, remove);
      if (chat === current) open.setAttribute("aria-current", "true");
      return item;
    }),
  );
}

function when(time) {
  const date = new Date(time);
  const today = new Date().toDateString() === date.toDateString();
  return today
    ? date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
    : date.toLocaleDateString([], { day: "numeric", month: "short", year: "numeric" });
}

export function closeHistory() {
  setOpen(false);
}

function setOpen(open) {
  document.body.classList.toggle("history-open", open);
  main.inert = open && !wide.matches;
  opener.setAttribute("aria-expanded", String(open));
  if (open) panel.querySelector("#close-history").focus();
}

// importFile(file) is called with a file that the user has chosen.
export function useImport(importFile) {
  document.getElementById("import").addEventListener("click", () => picker.click());
  picker.addEventListener("change", () => {
    const [file] = picker.files;
    picker.value = ""; // the same file can be chosen again
    if (file) importFile(file);
  });
}

opener.addEventListener("click", () => setOpen(true));
document.getElementById("close-history").addEventListener("click", closeHistory);
document.getElementById("scrim").addEventListener("click", closeHistory);
document.addEventListener("keydown", (event) => event.key === "Escape" && closeHistory());
wide.addEventListener("change", closeHistory);
