// The browser's storage: conversations, settings, the unsent draft. Each conversation has its own
// key, so that two windows do not overwrite each other's.

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

const isText = (value) => typeof value === "string";
const isNumber = (value) => Number.isFinite(value);

// Whether the page can draw a stored message.
function isMessage(message) {
  const { role, content, reasoning = "", error = "", stats } = message ?? {};
  return (
    ["user", "assistant"].includes(role) &&
    [content, reasoning, error].every(isText) &&
    (!stats ||
      ([stats.tokens, stats.first].every(isNumber) &&
        (stats.speed === null || isNumber(stats.speed))))
  );
}

// All conversations, the latest first, without damaged ones.
export function loadChats() {
  const chats = [];
  for (const key of keys()) {
    const chat = key.startsWith(CHAT) ? parsed(read(key), null) : null;
    if (!Array.isArray(chat?.messages) || !chat.messages.every(isMessage)) continue;
    for (const message of chat.messages) {
      if (message.running) Object.assign(message, { running: false, stopped: true });
    }
    const updated = isNumber(chat.updated) ? chat.updated : 0;
    chats.push({ id: key.slice(CHAT.length), updated, messages: chat.messages });
  }
  return chats.sort((a, b) => b.updated - a.updated);
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

export function loadSettings() {
  const kept = Object.entries(Object(parsed(read("flashhead.settings"), {})));
  return Object.fromEntries(
    kept.filter(([name, value]) => (name === "dense" ? value === Boolean(value) : isNumber(value))),
  );
}
export const saveSettings = (settings) => write("flashhead.settings", JSON.stringify(settings));
export const loadDraft = () => read("flashhead.draft") ?? "";
export const saveDraft = (text) => write("flashhead.draft", text);
export const loadCurrent = () => read("flashhead.current");
export const saveCurrent = (id) => write("flashhead.current", id);
