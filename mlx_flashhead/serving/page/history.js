// The list of conversations, a drawer on small screens: to open, search, rename and delete them.

import { element, iconButton } from "./dom.js";
import { chatTitle, holds } from "./conversation.js";

const list = document.getElementById("chats");
const search = document.getElementById("search");
const nothing = document.getElementById("nothing-found");
const panel = document.getElementById("history");
const main = document.getElementById("main");
const opener = document.getElementById("open-history");
const picker = document.getElementById("import-file");
const wide = matchMedia("(min-width: 900px)");
let draw = () => {};

// handlers: {open(chat), rename(chat, text), remove(chat)}
export function drawHistory(chats, current, handlers) {
  draw = () => {
    if (list.querySelector("input")) return; // the user is writing a name
    const query = search.value.trim();
    const matches = chats.filter((chat) => holds(chat, query));
    list.replaceChildren(...matches.map((chat) => itemOf(chat, chat === current, handlers)));
    search.hidden = !chats.length;
    nothing.hidden = !query || matches.length > 0;
  };
  draw();
}

function itemOf(chat, isCurrent, handlers) {
  const title = chatTitle(chat);
  const open = element(
    "button",
    { type: "button", className: "open", onclick: () => handlers.open(chat) },
    element("span", { className: "name", title }, title),
    element("span", { className: "when" }, when(chat.updated)),
  );
  const item = element("li", { className: isCurrent ? "current" : "" }, open);
  if (isCurrent) open.setAttribute("aria-current", "true");
  item.append(
    iconButton("edit", `Rename “${title}”`, () => editName(item, chat, handlers)),
    iconButton("delete", `Delete “${title}”`, () => handlers.remove(chat)),
  );
  return item;
}

// Return and leaving the field save the name, Escape does not.
function editName(item, chat, handlers) {
  const before = chatTitle(chat);
  const field = element("input", { type: "text", value: before, maxLength: 80 });
  field.setAttribute("aria-label", "Name of the conversation");
  let open = true;
  const end = (save) => {
    if (!open) return;
    open = false;
    field.remove();
    if (save && field.value !== before) handlers.rename(chat, field.value);
    else draw();
  };
  field.addEventListener("blur", () => end(true));
  field.addEventListener("keydown", (event) => {
    if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
    event.stopPropagation(); // Escape stops no answer
    end(event.key === "Enter");
  });
  item.replaceChildren(field);
  field.select();
}

function when(time) {
  const date = new Date(time);
  const today = new Date().toDateString() === date.toDateString();
  return today
    ? date.toLocaleTimeString(locale, { hour: "2-digit", minute: "2-digit", hourCycle })
    : date.toLocaleDateString(locale, { day: "numeric", month: "short", year: "numeric" });
}

// The user's first language, which is not always the browser's own. A clock has 24 hours where
// either of them has.
const locale = navigator.language;
const cycles = [undefined, locale].map(
  (each) => new Intl.DateTimeFormat(each, { hour: "numeric" }).resolvedOptions().hourCycle,
);
const hourCycle = cycles.includes("h23") ? "h23" : undefined;

export const isHistoryOpen = () => document.body.classList.contains("history-open");
export const closeHistory = () => setOpen(false);

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
search.addEventListener("input", () => draw());
wide.addEventListener("change", closeHistory);
