// The chat: ties the parts of the page together.

import { compare } from "./compare.js";
import { drawComposer, focusComposer, useComposer } from "./composer.js";
import { connect, lost } from "./connection.js";
import { chatTitle, fromFile, newChat, requestMessages, toFile } from "./conversation.js";
import { saveFile } from "./dom.js";
import { closeHistory, drawHistory, useImport } from "./history.js";
import { defaultInstructions, showInstructions, useInstructions } from "./instructions.js";
import { model, severalModels, useModels } from "./models.js";
import { tell } from "./notice.js";
import { keepPage } from "./offline.js";
import { onPreference } from "./preferences.js";
import { openSettings, requestSettings, useDefaults } from "./settings.js";
import { Run } from "./run.js";
import * as store from "./store.js";
import { drawActions, drawChat, drawMessage, drawSystem, isEditing } from "./view.js";
import { follow } from "./viewport.js";

const SAVE_MS = 500; // between savings while an answer grows
const exportButton = document.getElementById("export");

const runs = new Map(); // conversation → its running answer
let chats = store.loadChats();
let current = null;

const handlers = () => ({
  edit,
  again,
  ...(model().n_clusters && { compare: compareWith }),
});

function open(chat) {
  current = chat;
  store.saveCurrent(""); // one that cannot be drawn is not opened with the page again
  closeHistory();
  drawChat(current, handlers());
  drawFrame();
  store.saveCurrent(chat.id);
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
  drawHistory(chats, current, { open, remove });
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
  tell("Another window has changed this conversation, too: both are kept.");
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
  if (runs.size) tell("An answer is still growing: compare when it is complete.");
  else compare(requestMessages(current, current.messages.indexOf(message)), lost);
}

async function answer(chat) {
  const asked = requestMessages(chat);
  const message = { role: "assistant", content: "", running: true };
  if (severalModels()) message.model = model().name;
  chat.messages.push(message);
  toFront(chat);
  store.saveCurrent(chat.id);

  const run = new Run(asked, message, requestSettings(), painter(chat, message));
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
    tell(error.message);
  }
}

useComposer({ send, stop: () => runs.get(current)?.stop() });
useImport(importFile);
useInstructions((chat) => {
  save(chat);
  drawSystem(chat);
});
onPreference(() => drawActions(current, handlers())); // another model may have no FlashHead
document.getElementById("show-system").addEventListener("click", openSettings);
exportButton.addEventListener("click", () => saveFile(toFile(current, model().name ?? "")));
document.getElementById("new-chat").addEventListener("click", () => {
  open(current.messages.length ? newChat(defaultInstructions()) : current);
  focusComposer();
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
