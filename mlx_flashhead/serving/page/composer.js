// The text box at the bottom. Its text is stored until it is sent.

import { fitHeight, hasPointer, leaveKeyboard, sends } from "./dom.js";
import { loadDraft, saveDraft } from "./store.js";

const input = document.getElementById("input");
const sendButton = document.getElementById("send");
const stopButton = document.getElementById("stop");
const KEYBOARD = 120; // pixels: more than a browser's bars, less than a keyboard
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
  stopButton.addEventListener("click", () => {
    handlers.stop();
    focusComposer(); // the button goes
  });
  input.addEventListener("input", () => {
    saveDraft(input.value);
    draw();
  });
  input.value = loadDraft();
}

// On a touch screen a keyboard would cover the conversation.
export const focusComposer = () => hasPointer.matches && input.focus();

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

// Keeps the page inside its visible part. An on-screen keyboard on iOS covers the page without
// making it smaller, and only the visual viewport shows it.
export function follow(viewport, root = document.documentElement) {
  const fit = () => {
    if (Math.abs(viewport.scale - 1) > 0.01) return; // magnified with two fingers
    root.style.setProperty("--height", `${viewport.height}px`);
    root.style.setProperty("--top", `${viewport.offsetTop}px`);
    root.classList.toggle("keyboard", root.clientHeight - viewport.height > KEYBOARD);
  };
  viewport.addEventListener("resize", fit);
  viewport.addEventListener("scroll", fit);
  fit();
}
