// Draws a conversation. Knows elements and messages, but not the server.

import { actionsOf } from "./actions.js";
import { element } from "./dom.js";
import { editQuestion } from "./edit.js";
import { renderMarkdown } from "./markdown.js";

const scroller = document.getElementById("scroller");
const list = document.getElementById("messages");
const toEnd = document.getElementById("to-end");
const system = document.getElementById("show-system");
const NEAR = 80; // pixels from the end that count as the end

let following = true; // until the reader scrolls up
let lastTop = 0;
const drawn = new WeakMap(); // message → its element

const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;

scroller.addEventListener("scroll", () => {
  const up = scroller.scrollTop < lastTop;
  lastTop = scroller.scrollTop;
  if (up || atEnd()) following = atEnd(); // text that grows at the end does not scroll the reader
  toEnd.hidden = following;
});
toEnd.addEventListener("click", () => scrollToEnd());
new ResizeObserver(() => following && scrollToEnd()).observe(scroller);

export function scrollToEnd() {
  following = true;
  toEnd.hidden = true;
  scroller.scrollTop = scroller.scrollHeight;
}

// handlers: {edit(message, text), again(), compare(message)}; compare is missing where there is
// nothing to compare.
export function drawChat(chat, handlers) {
  list.replaceChildren(...chat.messages.map((message) => create(message)));
  document.getElementById("welcome").hidden = chat.messages.length > 0;
  drawSystem(chat);
  drawActions(chat, handlers);
  scrollToEnd();
}

// The instructions, in a line above the conversation.
export function drawSystem(chat) {
  system.hidden = !chat.system;
  system.querySelector("span").textContent = chat.system;
}

export function drawMessage(chat, message, handlers) {
  update(drawn.get(message), message);
  drawActions(chat, handlers);
  if (following) scrollToEnd();
}

function create(message) {
  const node = element("article", { className: `message ${message.role}` });
  node.append(element("div", { className: "body" }), element("footer"));
  drawn.set(message, node);
  update(node, message);
  return node;
}

function update(node, message) {
  const body = node.querySelector(".body");
  if (message.role === "user") {
    body.textContent = message.content;
    return;
  }
  node.classList.toggle("running", Boolean(message.running));
  updateThinking(node, message);
  if (message.running && !message.content) showWaiting(body, message.read);
  else {
    body.querySelector(":scope > .waiting")?.remove();
    renderMarkdown(body, message.content);
  }
}

// read: the share of the question that the model has read. A short question is read at once.
function showWaiting(body, read) {
  let node = body.querySelector(":scope > .waiting");
  if (!node) {
    node = element("span", { className: "waiting" });
    node.append(element("i"), element("i"), element("i"), element("span"));
    node.setAttribute("role", "status");
    node.setAttribute("aria-label", "The model is reading");
    body.replaceChildren(node);
  }
  const share = read > 0 && read < 1 ? `${Math.floor(100 * read)} % read` : "";
  node.lastChild.textContent = share;
}

function updateThinking(node, message) {
  if (!message.reasoning) return;
  let details = node.querySelector(".thinking");
  if (!details) {
    details = element("details", { className: "thinking" });
    details.append(element("summary", {}, "Thoughts"), element("div"));
    node.prepend(details);
  }
  details.lastChild.textContent = message.reasoning.trim();
}

// What stands below each message: "again" below the last answer only.
export function drawActions(chat, handlers) {
  const last = chat.messages.at(-1);
  for (const message of chat.messages) {
    const node = drawn.get(message);
    const footer = node.querySelector("footer");
    const can = message.running ? {} : possible(chat, message, last, handlers);
    const { running, error, stopped, finish, stats } = message;
    const state = JSON.stringify([Object.keys(can), running, error, stopped, finish, stats]);
    if (footer.state === state) continue;
    footer.state = state;
    footer.replaceChildren(...(running ? [] : actionsOf(message, can)));
  }
}

function possible(chat, message, last, handlers) {
  if (message.role === "user") return last.running ? {} : { edit: () => edit(chat, message, handlers) };
  const can = {};
  if (message === last) can.again = handlers.again;
  if (handlers.compare && message.content) can.compare = () => handlers.compare(message);
  return can;
}

export const isEditing = () => list.querySelector(".edited") !== null;

function edit(chat, message, handlers) {
  const node = drawn.get(message);
  const replaced = chat.messages.indexOf(message) < chat.messages.length - 2;
  const cancel = () => {
    node.classList.remove("edited");
    update(node, message);
  };
  node.classList.add("edited");
  editQuestion(node.querySelector(".body"), message.content, replaced, {
    save: (text) => handlers.edit(message, text),
    cancel,
  });
}
