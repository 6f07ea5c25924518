// The input at the bottom: its text is kept while it is unsent.

import { fitHeight, leaveKeyboard, sends } from "./dom.js";
import { loadDraft, saveDraft } from "./store.js";

const input = document.getElementById("input");
const sendButton = document.getElementById("send");
const stopButton = document.getElementById("stop");
let running = false;

// handlers: {send(text), stop()}
export function useComposer(handlers) {
  const send = () => {
    const text = input.value.trim();
    if (!text || running) return;
    input.value = "";
    saveDraft("");
    leaveKeyboard(input); // which makes room for the answer
    handlers.send(text);
  };
  document.getElementById("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  input.addEventListener("keydown", (event) => {
    if (!sends(event)) return;
    event.preventDefault();
    send();
  });
  stopButton.addEventListener("click", handlers.stop);
  input.addEventListener("input", () => {
    saveDraft(input.value);
    draw();
  });
  input.value = loadDraft();
}

export const focusComposer = () => input.focus();

// isRunning: whether the conversation waits for an answer.
export function drawComposer(isRunning) {
  running = isRunning;
  draw();
}

function draw() {
  stopButton.hidden = !running;
  sendButton.hidden = running;
  sendButton.disabled = !input.value.trim();
  fitHeight(input);
}
