// What stands below a message: notices, buttons, figures.

import { copyButton, element, iconButton } from "./dom.js";

// The footer's parts. can: {edit, again, compare}, functions for what can be done with the message.
export function actionsOf(message, can) {
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
  if (can.again) row.append(iconButton("again", "Answer again", can.again));
  if (can.compare) row.append(compareButton(can.compare));
  if (stats) row.append(element("span", { className: "stats" }, statsText(stats, message.model)));
  parts.push(row);
  return parts;
}

function compareButton(onclick) {
  const title = "The same question with FlashHead and without, side by side";
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
function statsText({ tokens, speed, first }, model) {
  const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`, `first after ${first.toFixed(1)} s`];
  if (speed !== null) parts.unshift(`${speed.toFixed(1)} tokens/s`);
  if (model) parts.push(model);
  return parts.join(" · ");
}
