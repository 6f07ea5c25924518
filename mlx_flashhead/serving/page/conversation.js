// A conversation: its form, its title, and its file. The file has the form of the terminal chat's
// /save, with some more fields for each message.

const LARGEST = 8 << 20; // bytes of a file

// crypto.randomUUID needs https
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// A new conversation with instructions for the model.
export const newChat = (system = "") => ({
  id: newId(),
  updated: Date.now(),
  system,
  messages: [],
});

const LONGEST_TITLE = 80;
const LONGEST_QUESTION = 400; // characters that a title is made of

function toTitle(text) {
  const title = text.trim().replace(/\s+/g, " ");
  if (title.length <= LONGEST_TITLE) return title;
  return `${title.slice(0, LONGEST_TITLE - 1).trimEnd()}…`;
}

// A question without the marks of Markdown: of headings, lists and quotes, of links, bold and code.
const unmarked = (text) =>
  text
    .replace(/^\s*(#{1,6}|>|[-*+]|```\S*)(\s+|$)/gm, "")
    .replace(/!?\[([^\]]*)\]\([^)]*\)/g, "$1")
    .replace(/(\*\*?\*?|~~|`+)([^\s*](?:.*?[^\s*])?)\1/gs, "$2");

// An empty title gives the first question back its place.
export function rename(chat, text) {
  const title = toTitle(text);
  if (title) chat.title = title;
  else delete chat.title;
}

// Whether every word of a query stands in the title or in the messages.
export function holds(chat, query) {
  const texts = [chatTitle(chat), ...chat.messages.map(({ content }) => content)];
  const text = texts.join("\n").toLowerCase();
  return query.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

// The title that the user has written, or the first question.
export function chatTitle(chat) {
  if (chat.title) return chat.title;
  const first = chat.messages.find((message) => message.role === "user");
  return (first && toTitle(unmarked(first.content.slice(0, LONGEST_QUESTION)))) || "New conversation";
}

// The messages before `end` as a request has them. An answer that failed without a word is left out.
export function requestMessages(chat, end = chat.messages.length) {
  const messages = chat.messages
    .slice(0, end)
    .filter(({ role, content }) => role === "user" || content)
    .map(({ role, content }) => ({ role, content }));
  return chat.system ? [{ role: "system", content: chat.system }, ...messages] : messages;
}

const isText = (value) => typeof value === "string";
const isNumber = (value) => Number.isFinite(value);

// Whether the page can draw a message.
export function isMessage(message) {
  const { role, content, reasoning = "", error = "", stats } = message ?? {};
  const { model = "", decoding = "" } = message ?? {};
  return (
    ["user", "assistant"].includes(role) &&
    [content, reasoning, error, model, decoding].every(isText) &&
    (!stats ||
      ([stats.tokens, stats.first].every(isNumber) &&
        (stats.speed === null || isNumber(stats.speed))))
  );
}

const titled = ({ title }) => (isText(title) && toTitle(title) ? { title: toTitle(title) } : {});

// A conversation from its stored record; null if that is damaged.
export function fromRecord(id, record) {
  if (!Array.isArray(record?.messages) || !record.messages.every(isMessage)) return null;
  for (const message of record.messages) {
    if (message.running) Object.assign(message, { running: false, stopped: true });
    delete message.read;
    delete message.loading;
  }
  return {
    id,
    updated: isNumber(record.updated) ? record.updated : 0,
    system: isText(record.system) ? record.system : "",
    messages: record.messages,
    ...titled(record),
  };
}

export function toFile(chat, model) {
  const system = chat.system ? [{ role: "system", content: chat.system }] : [];
  const messages = chat.messages.map(known);
  const text = JSON.stringify({ model, ...titled(chat), messages: [...system, ...messages] }, null, 2);
  const name = chatTitle(chat)
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, 50);
  return new File([`${text}\n`], `${name || "conversation"}.json`, { type: "application/json" });
}

// A new conversation from a file. Throws an Error of one sentence if the file does not hold one.
export async function fromFile(file) {
  try {
    if (file.size > LARGEST) throw new Error("it has more than 8 MB");
    const { system, ...others } = readFile(await file.text());
    return Object.assign(newChat(system), others);
  } catch (error) {
    const reason = `“${file.name}” holds no conversation (${error.message})`;
    throw new Error(`${reason}: choose a file that was exported here.`);
  }
}

function readFile(text) {
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    throw new Error("it is not JSON");
  }
  const all = content?.messages;
  if (!Array.isArray(all) || !all.length) throw new Error("it has no messages");
  const first = all[0]?.role === "system" ? 1 : 0;
  if (first && !isText(all[0].content)) throw new Error("its instructions are not text");
  const messages = all.slice(first);
  messages.forEach((message, index) => {
    if (!isMessage(message)) throw new Error(`its message ${index + first + 1} is damaged`);
    const expected = index % 2 ? "assistant" : "user";
    if (message.role !== expected) throw new Error("its questions and answers do not take turns");
  });
  if (messages.length % 2) throw new Error("its last question has no answer");
  if (!messages.length) throw new Error("it has no messages");
  return { system: first ? all[0].content : "", messages: messages.map(known), ...titled(content) };
}

// The fields of a message that the page knows.
const known = ({ role, content, reasoning, error, finish, stopped, model, decoding, stats }) =>
  ({ role, content, reasoning, error, finish, stopped, model, decoding, stats });
