// The browser's storage: conversations, preferences, the unsent draft. Each conversation has its own
// key. Where two windows write the same one, both texts are kept.

import { fromRecord, newId } from "./conversation.js";

const CHAT = "flashhead.chat.";
const memory = new Map(); // what the browser has no room for; lives as long as the page
const known = new Map(); // key of a conversation → its stored text when this window last saw it

const read = (key) => memory.get(key) ?? stored(key);

function stored(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

// Whether another window has written a conversation since this one last saw it.
function isChanged(key) {
  const text = stored(key);
  return text !== null && text !== known.get(key);
}

function write(key, text) {
  try {
    localStorage.setItem(key, text);
    memory.delete(key);
    if (key.startsWith(CHAT)) known.set(key, text);
  } catch {
    memory.set(key, text);
  }
}

function keys() {
  try {
    return [...new Set([...Object.keys(localStorage), ...memory.keys()])];
  } catch {
    return [...memory.keys()];
  }
}

function parsed(text, otherwise) {
  try {
    return JSON.parse(text) ?? otherwise;
  } catch {
    return otherwise;
  }
}

// All conversations, the latest first, without damaged ones.
export function loadChats() {
  const ids = keys().filter((key) => key.startsWith(CHAT)).map((key) => key.slice(CHAT.length));
  return ids.map(loadChat).filter(Boolean).sort(latestFirst);
}

export const latestFirst = (a, b) => b.updated - a.updated;

// A conversation as it is stored now; null if it is missing or damaged.
export function loadChat(id) {
  const text = read(CHAT + id);
  known.set(CHAT + id, stored(CHAT + id));
  return fromRecord(id, parsed(text, null));
}

// Returns the id under which another window has saved the same conversation meanwhile, or
// undefined. The one that is saved here gets an id of its own then.
export function saveChat(chat) {
  const key = CHAT + chat.id;
  const other = isChanged(key) ? chat.id : undefined;
  if (other) {
    memory.delete(key);
    chat.id = newId();
  }
  write(CHAT + chat.id, JSON.stringify(chat));
  return other;
}

export function deleteChat(chat) {
  memory.delete(CHAT + chat.id);
  known.delete(CHAT + chat.id);
  try {
    localStorage.removeItem(CHAT + chat.id);
  } catch {
    // it was in memory only
  }
}

// Whether all conversations survive a reload. Tries once more to store those that had no room.
export function allStored() {
  const waiting = [...memory].filter(([key]) => key.startsWith(CHAT));
  waiting.forEach(([key, text]) => isChanged(key) || write(key, text));
  return waiting.every(([key]) => !memory.has(key));
}

// changed(id) hears of a conversation that another window has saved or deleted. An answer that
// grows there is heard of when it is complete.
export function watchChats(changed) {
  window.addEventListener("storage", ({ key, newValue }) => {
    if (!key?.startsWith(CHAT)) return;
    const messages = parsed(newValue, {}).messages;
    if (!Array.isArray(messages) || !messages.at(-1)?.running) changed(key.slice(CHAT.length));
  });
}

// Others are numbers.
const TYPES = { dense: "boolean", model: "string", system: "string", theme: "string" };

// {name: value}, without damaged ones.
function loadPreferences() {
  const all = Object.entries(Object(parsed(read("flashhead.settings"), {})));
  const isWhole = ([name, value]) => typeof value === (TYPES[name] ?? "number");
  return Object.fromEntries(all.filter(isWhole));
}

// What the user has chosen for all conversations. A preference that was never chosen is undefined,
// and the server's default holds.
let preferences = loadPreferences();
const watchers = [];

export const preference = (name) => preferences[name];

// values: {name: value}; undefined forgets a choice.
export function prefer(values) {
  preferences = { ...preferences, ...values };
  write("flashhead.settings", JSON.stringify(preferences));
  watchers.forEach((watcher) => watcher());
}

// watcher() is called after each change.
export const onPreference = (watcher) => watchers.push(watcher);

export const loadDraft = () => read("flashhead.draft") ?? "";
export const saveDraft = (text) => write("flashhead.draft", text);
export const loadCurrent = () => read("flashhead.current");
export const saveCurrent = (id) => write("flashhead.current", id);
