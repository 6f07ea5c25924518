// What the user has chosen for all conversations. It is kept in the browser. A preference that was
// never chosen is undefined, and the server's default holds.

import { loadSettings, saveSettings } from "./store.js";

let chosen = loadSettings();
const watchers = [];

export const preference = (name) => chosen[name];

// values: {name: value}; undefined forgets a choice.
export function prefer(values) {
  chosen = { ...chosen, ...values };
  saveSettings(chosen);
  watchers.forEach((watcher) => watcher());
}

// watcher() is called after each change.
export const onPreference = (watcher) => watchers.push(watcher);
