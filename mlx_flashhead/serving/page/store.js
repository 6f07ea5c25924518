// What the browser keeps: conversations, settings, the unsent draft. A conversation has a key of
// its own, so that two windows do not overwrite each other's.

const CHAT = "flashhead.chat.";
const memory = new Map(); // when the browser keeps nothing: what lives as long as the page

function read(key) {
  if (memory.has(key)) return memory.get(key);
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

// Returns whether it will be there after a reload.
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

export function newChat() {
  // crypto.randomUUID needs https
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  const id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, updated: Date.now(), messages: [] };
}

export function chatTitle(chat) {
  const first = chat.messages.find((message) => message.role === "user");
  return first ? first.content.trim().replace(/\s+/g, " ").slice(0, 80) : "New conversation";
}

// All conversations, the latest first.
export function loadChats() {
  const chats = [];
  for (const key of keys()) {
    const chat = key.startsWith(CHAT) ? parsed(read(key), null) : null;
    if (!Array.isArray(chat?.messages)) continue;
    for (const message of chat.messages) {
      if (message.running) Object.assign(message, { running: false, stopped: true });
    }
    chats.push(chat);
  }
  return chats.sort((a, b) => b.updated - a.updated);
}

export const saveChat = (chat) => write(CHAT + chat.id, JSON.stringify(chat));

export function deleteChat(chat) {
  memory.delete(CHAT + chat.id);
  try {
    localStorage.removeItem(CHAT + chat.id);
  } catch {
    // it was in memory alone
  }
}

export const loadSettings = () => parsed(read("flashhead.settings"), {});
export const saveSettings = (settings) => write("flashhead.settings", JSON.stringify(settings));
export const loadDraft = () => read("flashhead.draft") ?? "";
export const saveDraft = (text) => write("flashhead.draft", text);
export const loadCurrent = () => read("flashhead.current");
export const saveCurrent = (id) => write("flashhead.current", id);
