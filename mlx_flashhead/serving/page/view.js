// Draws a conversation. Knows elements and messages, but not the server.

import { copyButton, element, iconButton } from "./dom.js";
import { renderMarkdown } from "./markdown.js";

const scroller = document.getElementById("scroller");
const list = document.getElementById("messages");
const toEnd = document.getElementById("to-end");
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

// handlers: {again()}, called for the last answer.
export function drawChat(chat, handlers) {
  list.replaceChildren(...chat.messages.map((message) => create(message)));
  document.getElementById("welcome").hidden = chat.messages.length > 0;
  drawActions(chat, handlers);
  scrollToEnd();
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

// The buttons below each message; "again" below the last answer only.
function drawActions(chat, handlers) {
  const last = chat.messages.at(-1);
  for (const message of chat.messages) {
    const footer = drawn.get(message).querySelector("footer");
    const state = JSON.stringify([message === last, message.running, message.error, message.stats]);
    if (footer.state === state) continue;
    footer.state = state;
    const parts = message.running ? [] : actionsOf(message, message === last && handlers);
    footer.replaceChildren(...parts);
  }
}

function actionsOf(message, handlers) {
  const parts = [];
  const answer = message.role === "assistant";
  if (message.error) parts.push(notice(message.error, "", handlers));
  else if (message.stopped) parts.push(notice("Stopped before the end.", "mild"));
  else if (message.finish === "length") {
    parts.push(notice("The longest answer is reached. Settings can make it longer.", "mild"));
  }
  const actions = element("div", { className: "actions" });
  if (message.content) actions.append(copyButton("Copy", () => message.content));
  if (answer && handlers) actions.append(iconButton("again", "Answer again", handlers.again));
  if (message.stats) actions.append(element("span", { className: "stats" }, statsText(message.stats)));
  parts.push(actions);
  return parts;
}

function notice(text, className, handlers) {
  const node = element("div", { className: `notice ${className}` }, element("span", {}, text));
  if (!className) node.setAttribute("role", "alert");
  if (handlers) {
    const button = element("button", { type: "button", className: "text strong" }, "Try again");
    button.addEventListener("click", handlers.again);
    node.append(button);
  }
  return node;
}

// stats: {tokens, speed (tokens/s, null for a single token), first (seconds to the first token)}
function statsText({ tokens, speed, first }) {
  const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`, `first after ${first.toFixed(1)} s`];
  if (speed !== null) parts.unshift(`${speed.toFixed(1)} tokens/s`);
  return parts.join(" · ");
}
