// The browser's storage: conversations, settings, the unsent draft. Each conversation has its own
// key, so that two windows do not overwrite each other's.

import { fromRecord } from "./conversation.js";

const CHAT = "flashhead.chat.";
const memory = new Map(); // for a browser without storage; lives as long as the page

function read(key) {
  if (memory.has(key)) return memory.get(key);
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

// Returns whether the record survives a reload.
function write(key, text) {
  try {
    localStorage.setItem(key, text);
    memory.delete(key);
    return true;
  } catch {
    memory.set(key, text);
    return false;
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
  const chats = keys()
    .filter((key) => key.startsWith(CHAT))
    .map((key) => fromRecord(key.slice(CHAT.length), parsed(read(key), null)));
  return chats.filter(Boolean).sort((a, b) => b.updated - a.updated);
}

export const saveChat = (chat) => write(CHAT + chat.id, JSON.stringify(chat));

export function deleteChat(chat) {
  memory.delete(CHAT + chat.id);
  try {
    localStorage.removeItem(CHAT + chat.id);
  } catch {
    // it was in memory only
  }
}

const TYPES = { dense: "boolean", model: "string", system: "string" }; // others are numbers

// {name: value}, without damaged ones.
export function loadSettings() {
  const kept = Object.entries(Object(parsed(read("flashhead.settings"), {})));
  return Object.fromEntries(
    kept.filter(([name, value]) => typeof value === (TYPES[name] ?? "number")),
  );
}

export const saveSettings = (settings) => write("flashhead.settings", JSON.stringify(settings));
export const loadDraft = () => read("flashhead.draft") ?? "";
export const saveDraft = (text) => write("flashhead.draft", text);
export const loadCurrent = () => read("flashhead.current");
export const saveCurrent = (id) => write("flashhead.current", id);
