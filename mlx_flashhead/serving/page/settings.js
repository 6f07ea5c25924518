// The settings: a conversation's instructions, and what holds for all of them. A setting that the
// user has not moved keeps the server's default and is not sent.

import { fitHeight } from "./dom.js";
import { model, severalModels } from "./models.js";
import { onPreference, prefer, preference } from "./store.js";

const dialog = document.getElementById("settings");
const sliders = ["temperature", "top_p", "max_tokens"];
const longest = document.getElementById("max_tokens");
const together = document.getElementById("context");
const SHORTEST = 64; // tokens of an answer that can be chosen, and then twice as many at each step
const USUAL_CONTEXT = 8192; // before the server has answered
const denseSwitch = document.getElementById("dense");
const themes = [...document.querySelectorAll("input[name=theme]")];
const instructions = document.getElementById("system");
const instructionsButton = document.getElementById("system-default");
let defaults = {};
let chat = null;
let instructionsChanged = () => {};

const input = (name) => document.getElementById(name);

// The settings of a request. dense: whether every token is scored; undefined leaves it to the user.
export function requestSettings(dense = preference("dense")) {
  const settings = {};
  for (const name of sliders) {
    if (preference(name) !== undefined) settings[name] = preference(name);
  }
  const { name, flash_head } = model();
  if (severalModels()) settings.model = name;
  const choosable = name === undefined || flash_head; // before the server has answered: as chosen
  if (choosable && dense !== undefined) settings.dense = dense;
  return settings;
}

// Whether the draws of an answer are random.
export const drawsRandomly = () => (preference("temperature") ?? defaults.temperature ?? 0) > 0;

// info: of the server
export function useDefaults(info) {
  defaults = info;
  draw();
}

function draw() {
  denseSwitch.disabled = !model().flash_head;
  denseSwitch.checked = !model().flash_head || (preference("dense") ?? model().dense ?? false);
  for (const name of sliders) {
    const chosen = preference(name);
    const value = chosen ?? defaults[name];
    if (name === "max_tokens") drawLongest(value ?? context());
    else if (value === undefined) continue;
    else input(name).value = value;
    const shown = name === "max_tokens" ? tokens(value ?? context()) : value;
    const suffix = chosen === undefined ? " (default)" : "";
    document.querySelector(`output[for="${name}"]`).textContent = `${shown}${suffix}`;
  }
  for (const theme of themes) theme.checked = theme.value === (preference("theme") ?? "system");
  globalThis.applyTheme(preference("theme"));
}

const context = () => model().context ?? USUAL_CONTEXT;
const tokens = (number) => number.toLocaleString("en");

// Lengths of an answer, of which the slider has the places: the last one is the whole context.
function lengths() {
  const found = [];
  for (let length = SHORTEST; length < context(); length *= 2) found.push(length);
  return [...found, context()];
}

// length: tokens of the longest answer.
function drawLongest(length) {
  const places = lengths();
  longest.max = places.length - 1;
  longest.value = places.findIndex((place) => place >= length || place === context());
  longest.setAttribute("aria-valuetext", `${tokens(length)} tokens`);
  together.textContent = `Question and answer together have at most ${tokens(context())}.`;
}

longest.addEventListener("input", () => prefer({ max_tokens: lengths()[Number(longest.value)] }));
for (const name of sliders.filter((name) => name !== "max_tokens")) {
  input(name).addEventListener("input", () => prefer({ [name]: Number(input(name).value) }));
}
for (const theme of themes) theme.addEventListener("change", () => prefer({ theme: theme.value }));
denseSwitch.addEventListener("change", () => prefer({ dense: denseSwitch.checked }));
document.getElementById("reset-settings").addEventListener("click", () => {
  prefer(Object.fromEntries([...sliders, "dense", "theme"].map((name) => [name, undefined])));
});
document.getElementById("open-settings").addEventListener("click", openSettings);
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
onPreference(draw);

export function openSettings() {
  dialog.showModal();
  drawInstructions();
}

// The instructions that the requests of new conversations begin with.
export const defaultInstructions = () => preference("system") ?? "";

// onChange(chat) is called after the user has changed a conversation's instructions.
export function useInstructions(onChange) {
  instructionsChanged = onChange;
}

export function showInstructions(current) {
  chat = current;
  instructions.value = chat.system;
  drawInstructions();
}

function drawInstructions() {
  const text = instructions.value.trim();
  const same = text === defaultInstructions();
  instructionsButton.hidden = same && !text;
  instructionsButton.disabled = same;
  instructionsButton.textContent = same
    ? "New conversations have them, too"
    : "Use for new conversations, too";
  if (dialog.open) fitHeight(instructions);
}

instructions.addEventListener("input", () => {
  chat.system = instructions.value.trim();
  drawInstructions();
  instructionsChanged(chat);
});
instructionsButton.addEventListener("click", () => {
  prefer({ system: instructions.value.trim() });
  drawInstructions();
});
