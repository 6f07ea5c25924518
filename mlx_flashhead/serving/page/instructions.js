// The instructions of a conversation, which its requests begin with, and those of new ones.

import { fitHeight } from "./dom.js";
import { prefer, preference } from "./preferences.js";

const area = document.getElementById("system");
const button = document.getElementById("system-default");
const dialog = document.getElementById("settings");
let chat = null;
let changed = () => {};

export const defaultInstructions = () => preference("system") ?? "";

// onChange(chat) is called after the user has changed a conversation's instructions.
export function useInstructions(onChange) {
  changed = onChange;
}

export function showInstructions(ofChat) {
  chat = ofChat;
  area.value = chat.system;
  draw();
}

function draw() {
  const same = area.value.trim() === defaultInstructions();
  button.hidden = same && !area.value.trim();
  button.disabled = same;
  button.textContent = same ? "New conversations have them, too" : "Use for new conversations, too";
  if (dialog.open) fitHeight(area);
}

area.addEventListener("input", () => {
  chat.system = area.value.trim();
  draw();
  changed(chat);
});
button.addEventListener("click", () => {
  prefer({ system: area.value.trim() });
  draw();
});
document.getElementById("open-settings").addEventListener("click", draw);
