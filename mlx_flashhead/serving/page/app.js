// The chat: ties the parts of the page together.

import { closeHistory, drawHistory } from "./history.js";
import { connect, lost } from "./connection.js";
import { requestSettings, useDefaults } from "./settings.js";
import { Run } from "./run.js";
import * as store from "./store.js";
import { drawChat, drawMessage } from "./view.js";
import { follow } from "./viewport.js";

const SAVE_MS = 500; // between savings while an answer grows
const input = document.getElementById("input");
const sendButton = document.getElementById("send");
const stopButton = document.getElementById("stop");
const hasPointer = matchMedia("(any-pointer: fine)"); // and so, most likely, a keyboard

const chats = store.loadChats();
const runs = new Map(); // conversation → its running answer
let current = chats.find((chat) => chat.id === store.loadCurrent()) ?? store.newChat();

const handlers = { again };

function open(chat) {
  current = chat;
  store.saveCurrent(chat.id);
  closeHistory();
  drawChat(current, handlers);
  drawFrame();
}

function remove(chat) {
  if (!confirm(`Delete “${store.chatTitle(chat)}”?`)) return;
  runs.get(chat)?.stop();
  runs.delete(chat);
  chats.splice(chats.indexOf(chat), 1);
  store.deleteChat(chat);
  if (chat === current) open(store.newChat());
  else drawFrame();
}

// Everything but the messages: title, list, buttons.
function drawFrame() {
  document.getElementById("title").textContent = store.chatTitle(current);
  drawHistory(chats, current, { open, remove });
  drawComposer();
}

function drawComposer() {
  const running = runs.has(current);
  stopButton.hidden = !running;
  sendButton.hidden = running;
  sendButton.disabled = !input.value.trim();
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function save(chat) {
  if (!chats.includes(chat)) return; // deleted meanwhile
  document.getElementById("full").hidden = store.saveChat(chat);
}

function send() {
  const content = input.value.trim();
  if (!content || runs.has(current)) return;
  input.value = "";
  store.saveDraft("");
  if (!hasPointer.matches) input.blur(); // the keyboard makes room for the answer
  current.messages.push({ role: "user", content });
  answer(current);
}

// Answers the last question again and replaces its answer.
function again() {
  if (runs.has(current)) return;
  if (current.messages.at(-1)?.role === "assistant") current.messages.pop();
  answer(current);
}

async function answer(chat) {
  const asked = chat.messages
    .filter(({ role, content }) => role === "user" || content)
    .map(({ role, content }) => ({ role, content }));
  const message = { role: "assistant", content: "", running: true };
  chat.messages.push(message);
  chat.updated = Date.now();
  if (chats.includes(chat)) chats.splice(chats.indexOf(chat), 1);
  chats.unshift(chat);
  store.saveCurrent(chat.id);

  const run = new Run(asked, message, requestSettings(), painter(chat, message));
  runs.set(chat, run);
  save(chat);
  drawChat(chat, handlers);
  drawFrame();
  const failure = await run.finish();
  runs.delete(chat);
  save(chat);
  if (chat === current) {
    drawMessage(chat, message, handlers);
    drawComposer();
  }
  if (failure) lost(failure);
}

// A function that draws the growing message once per frame, and saves it now and then.
function painter(chat, message) {
  let waiting = false;
  let saved = performance.now();
  return () => {
    if (performance.now() - saved > SAVE_MS) {
      saved = performance.now();
      save(chat);
    }
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      if (chat === current && chat.messages.includes(message)) drawMessage(chat, message, handlers);
    });
  };
}

document.getElementById("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
input.addEventListener("input", () => {
  store.saveDraft(input.value);
  drawComposer();
});
// With a keyboard and a pointer Return sends. On a touch screen alone it begins a new line.
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  if ((hasPointer.matches && !event.shiftKey) || event.metaKey || event.ctrlKey) {
    event.preventDefault();
    send();
  }
});
stopButton.addEventListener("click", () => runs.get(current)?.stop());
document.getElementById("new-chat").addEventListener("click", () => {
  open(current.messages.length ? store.newChat() : current);
  input.focus();
});
// Some browsers break answers off before they hide the page, which looks like a lost server.
for (const event of ["beforeunload", "pagehide"]) {
  window.addEventListener(event, () => {
    runs.forEach((run, chat) => {
      save(chat);
      run.stop();
    });
  });
}

// The token came in the address. Now the browser has it as a cookie.
if (location.search) history.replaceState(null, "", location.pathname);
follow(window.visualViewport);
input.value = store.loadDraft();
drawChat(current, handlers);
drawFrame();
connect((info) => {
  document.getElementById("model").textContent = info.model ?? "";
  useDefaults(info);
});
