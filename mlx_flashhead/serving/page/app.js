// The chat: ties the parts of the page together.

import { Run } from "./api.js";
import { compare } from "./compare.js";
import { drawComposer, focusComposer, follow, useComposer } from "./composer.js";
import { connect, keepPage, lost, refresh } from "./connection.js";
import { chatTitle, fromFile, newChat, rename, requestMessages, toFile } from "./conversation.js";
import { notify, saveFile } from "./dom.js";
import { closeHistory, drawHistory, isHistoryOpen, useImport } from "./history.js";
import { model, severalModels, useModels } from "./models.js";
import {
  defaultInstructions,
  openSettings,
  requestSettings,
  showInstructions,
  useDefaults,
  useInstructions,
} from "./settings.js";
import * as store from "./store.js";
import { drawActions, drawChat, drawMessage, drawSystem, isEditing } from "./view.js";

const SAVE_MS = 500; // between savings while an answer grows
const exportButton = document.getElementById("export");

const runs = new Map(); // conversation → its running answer
let chats = store.loadChats();
let current = null;

const handlers = () => ({
  edit,
  again,
  ...(model().flash_head && { compare: compareWith }),
});

function open(chat) {
  current = chat;
  store.saveCurrent(""); // one that cannot be drawn is not opened with the page again
  closeHistory();
  drawChat(current, handlers());
  drawFrame();
  store.saveCurrent(chat.id);
  focusComposer();
}

function begin() {
  open(current.messages.length ? newChat(defaultInstructions()) : current);
}

function renameChat(chat, text) {
  rename(chat, text);
  save(chat);
  drawFrame();
}

function remove(chat) {
  if (!confirm(`Delete “${chatTitle(chat)}”?`)) return;
  runs.get(chat)?.stop();
  runs.delete(chat);
  chats = chats.filter((other) => other !== chat);
  store.deleteChat(chat);
  if (chat === current) open(newChat(defaultInstructions()));
  else drawFrame();
}

// Another window has saved or deleted a conversation. One that is answered or edited here stays.
function reload(id) {
  const old = [current, ...chats].find((chat) => chat.id === id);
  if (runs.has(old) || (old === current && isEditing())) return;
  const chat = store.loadChat(id);
  chats = chats.filter((other) => other !== old);
  if (chat) chats = [...chats, chat].sort(store.latestFirst);
  if (chat && old === current) {
    current = chat;
    drawChat(current, handlers());
  }
  drawFrame();
}

// Everything but the messages: title, list, buttons.
function drawFrame() {
  document.getElementById("title").textContent = chatTitle(current);
  exportButton.hidden = !current.messages.length;
  drawHistory(chats, current, { open, rename: renameChat, remove });
  showRoom();
  showInstructions(current);
  drawComposer(runs.has(current));
}

const showRoom = () => (document.getElementById("full").hidden = store.allStored());

function save(chat) {
  if (!chats.includes(chat)) return; // deleted meanwhile
  const other = store.saveChat(chat);
  showRoom();
  if (!other) return;
  if (chat === current) store.saveCurrent(chat.id);
  reload(other);
  notify("Another window has changed this conversation, too: both are kept.");
}

function toFront(chat) {
  chat.updated = Date.now();
  chats = [chat, ...chats.filter((other) => other !== chat)];
}

function send(content) {
  current.messages.push({ role: "user", content });
  answer(current);
}

// Asks a question in other words. What followed it goes.
function edit(message, content) {
  if (runs.has(current)) return;
  current.messages.splice(current.messages.indexOf(message));
  send(content);
}

// Answers the last question again and replaces its answer.
function again() {
  if (runs.has(current)) return;
  if (current.messages.at(-1)?.role === "assistant") current.messages.pop();
  answer(current);
}

function compareWith(message) {
  if (runs.size) notify("An answer is still growing: compare when it is complete.");
  else compare(requestMessages(current, current.messages.indexOf(message)), refresh, lost);
}

async function answer(chat) {
  const messages = requestMessages(chat);
  const message = { role: "assistant", content: "", running: true };
  if (severalModels()) message.model = model().name;
  chat.messages.push(message);
  toFront(chat);
  store.saveCurrent(chat.id);

  const run = new Run(messages, message, requestSettings(), painter(chat, message));
  runs.set(chat, run);
  save(chat);
  drawChat(chat, handlers());
  drawFrame();
  const failure = await run.finish();
  runs.delete(chat);
  save(chat);
  if (chat === current) {
    drawMessage(chat, message, handlers());
    drawFrame();
  }
  if (failure) lost(failure);
  else refresh(); // the model may have got its FlashHead meanwhile
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
      if (chat === current && chat.messages.includes(message)) drawMessage(chat, message, handlers());
    });
  };
}

async function importFile(file) {
  try {
    const chat = await fromFile(file);
    toFront(chat);
    save(chat);
    open(chat);
  } catch (error) {
    closeHistory();
    notify(error.message);
  }
}

useComposer({ send, stop: () => runs.get(current)?.stop() });
useImport(importFile);
useInstructions((chat) => {
  save(chat);
  drawSystem(chat);
});
store.onPreference(() => drawActions(current, handlers())); // another model may have no FlashHead
document.getElementById("show-system").addEventListener("click", openSettings);
exportButton.addEventListener("click", () => saveFile(toFile(current, model().name ?? "")));
document.getElementById("new-chat").addEventListener("click", begin);
// Ctrl-K deletes to the end of a line on a Mac.
const command = /Mac|iP/.test(navigator.platform) ? "metaKey" : "ctrlKey";
document.addEventListener("keydown", (event) => {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && isHistoryOpen()) closeHistory();
  else if (event.key === "Escape") runs.get(current)?.stop();
  else if (event[command] && !event.shiftKey && !event.altKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    begin();
  }
});
// Some browsers break answers off before they hide the page, which looks like a lost server.
for (const event of ["beforeunload", "pagehide"]) {
  window.addEventListener(event, () => {
    runs.forEach((run, chat) => {
      run.stop();
      save(chat);
    });
  });
}

// The token came in the address. Now the browser has it as a cookie.
if (location.search) history.replaceState(null, "", location.pathname);
follow(window.visualViewport);
open(chats.find((chat) => chat.id === store.loadCurrent()) ?? newChat(defaultInstructions()));
store.watchChats(reload);
connect((info) => {
  useModels(info.models);
  useDefaults(info);
  drawActions(current, handlers());
});
keepPage();
