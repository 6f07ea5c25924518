// Draws a conversation: messages, what stands below them, and the editor of a question.

import { copyButton, element, fitHeight, iconButton, sends } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { explain, shortly } from "./models.js";

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
  const speaker = message.role === "user" ? "You" : (message.model ?? "Answer");
  node.append(element("h2", { className: "spoken" }, speaker));
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
  node.setAttribute("aria-busy", Boolean(message.running)); // VoiceOver reads it when it is complete
  node.classList.toggle("running", Boolean(message.running));
  updateThinking(node, body, message);
  if (message.running && !message.content) showWaiting(body, message);
  else {
    body.querySelector(":scope > .waiting")?.remove();
    renderMarkdown(body, message.content);
  }
}

// read: the share of the question that the model has read, as a short question is at once. loading:
// whether the model is not there yet.
function showWaiting(body, { read, loading }) {
  let node = body.querySelector(":scope > .waiting");
  if (!node) {
    node = element("span", { className: "waiting" });
    node.append(element("i"), element("i"), element("i"), element("span"));
    node.setAttribute("role", "status");
    body.replaceChildren(node);
  }
  const share = read > 0 && read < 1 ? `${Math.floor(100 * read)} % read` : "";
  node.setAttribute("aria-label", loading ? "The model is being loaded" : "The model is reading");
  node.lastChild.textContent = loading ? "Loading the model …" : share;
}

function updateThinking(node, body, message) {
  if (!message.reasoning) return;
  let details = node.querySelector(".thinking");
  if (!details) {
    details = element("details", { className: "thinking" });
    details.append(element("summary", {}, "Thoughts"), element("div"));
    body.before(details);
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

// What stands below a message: notices, buttons, figures. can: {edit, again, compare}, functions for
// what can be done with the message.
function actionsOf(message, can) {
  const parts = [];
  const { error, stopped, finish, content, stats } = message;
  if (error) parts.push(notice(error, can.again));
  else if (stopped) parts.push(notice("Stopped before the end."));
  else if (finish === "length") {
    parts.push(notice("The longest answer is reached. Settings can make it longer."));
  }
  const row = element("div", { className: "actions" });
  if (content) row.append(copyButton("Copy", () => content));
  if (can.edit) row.append(iconButton("edit", "Edit the question", can.edit));
  // a notice of an error has the button already
  if (can.again && !error) row.append(iconButton("again", "Answer again", can.again));
  if (can.compare) row.append(compareButton(can.compare));
  if (stats) row.append(statsOf(message));
  parts.push(row);
  return parts;
}

function compareButton(onclick) {
  const title = "The same question with FlashHead and with the normal (dense) head, side by side";
  return element("button", { type: "button", className: "text", title, onclick }, "Compare");
}

// again: for what went wrong, a function that tries again.
export function notice(text, again) {
  const node = element("div", { className: "notice" }, element("span", {}, text));
  if (!again) {
    node.classList.add("mild");
    return node;
  }
  node.setAttribute("role", "alert");
  const button = element("button", { type: "button", className: "text strong" }, "Try again");
  button.addEventListener("click", again);
  node.append(button);
  return node;
}

// stats: {tokens, speed (tokens/s, null for a single token), first (seconds to the first token)}
export function figuresOf({ stats: { tokens, first }, decoding }) {
  const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`, `first after ${first.toFixed(1)} s`];
  return decoding ? [shortly(decoding), ...parts] : parts;
}

function statsOf(message) {
  const { speed } = message.stats;
  const parts = figuresOf(message);
  if (speed !== null) parts.unshift(`${speed.toFixed(1)} tokens/s`);
  if (message.model) parts.push(message.model);
  const title = explain(message.decoding);
  return element("span", { className: "stats", title }, parts.join(" · "));
}

// Puts an editor into the element of a question. replaced: whether more than its own answer follows.
// handlers: {save(text), cancel()}
function editQuestion(node, text, replaced, handlers) {
  const area = element("textarea", { className: "editor", value: text, rows: 1 });
  area.setAttribute("aria-label", "Your question");
  const save = element("button", { type: "button", className: "text strong" }, "Ask again");
  const cancel = element("button", { type: "button", className: "text" }, "Cancel");
  const row = element("div", { className: "editor-row" }, cancel, save);
  if (replaced) row.prepend(element("span", {}, "The messages below it will be replaced."));
  const form = element("div", { className: "editing" }, area, row);

  const finish = () => {
    if (area.value.trim()) handlers.save(area.value.trim());
  };
  save.addEventListener("click", finish);
  cancel.addEventListener("click", handlers.cancel);
  area.addEventListener("input", () => {
    save.disabled = !area.value.trim();
    fitHeight(area);
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing) {
      event.stopPropagation(); // it stops no answer
      handlers.cancel();
    }
    if (!sends(event)) return;
    event.preventDefault();
    finish();
  });
  node.replaceChildren(form);
  fitHeight(area);
  area.focus();
  area.setSelectionRange(text.length, text.length);
}
