// The settings. A setting that the user has not moved keeps the server's default and is not sent.

import { loadSettings, saveSettings } from "./store.js";

const dialog = document.getElementById("settings");
const sliders = ["temperature", "top_p", "n_probes", "max_tokens"];
const denseSwitch = document.getElementById("dense");
let chosen = loadSettings();
let defaults = {};

const input = (name) => document.getElementById(name);

// The settings of a request.
export function requestSettings() {
  const settings = {};
  for (const name of sliders) {
    if (chosen[name] !== undefined) settings[name] = chosen[name];
  }
  if (defaults.model !== undefined && !defaults.n_clusters) {
    delete settings.n_probes; // chosen for a model with a FlashHead
    return settings;
  }
  const dense = chosen.dense ?? defaults.dense;
  if (chosen.dense !== undefined) settings.dense = dense;
  if (dense) {
    delete settings.n_probes; // of no meaning without clusters
  } else if (settings.n_probes > (defaults.n_clusters ?? Infinity)) {
    settings.n_probes = defaults.n_clusters; // chosen for another model
  }
  return settings;
}

// info: of the server; a dense model has no n_clusters.
export function useDefaults(info) {
  defaults = info;
  const flash = Boolean(info.n_clusters);
  document.getElementById("probes-field").hidden = !flash;
  denseSwitch.closest(".field").hidden = !flash;
  if (flash) input("n_probes").max = info.n_clusters;
  show();
}

function show() {
  for (const name of sliders) {
    const field = input(name);
    const value = chosen[name] ?? defaults[name];
    if (value === undefined) continue;
    if (name === "max_tokens") field.max = Math.max(8192, value);
    field.value = value;
    const suffix = chosen[name] === undefined ? " (default)" : "";
    document.querySelector(`output[for="${name}"]`).textContent = `${value}${suffix}`;
  }
  denseSwitch.checked = chosen.dense ?? defaults.dense ?? false;
  document.getElementById("probes-field").classList.toggle("off", denseSwitch.checked);
  input("n_probes").disabled = denseSwitch.checked;
}

function choose(name, value) {
  chosen = { ...chosen, [name]: value };
  saveSettings(chosen);
  show();
}

for (const name of sliders) {
  input(name).addEventListener("input", () => choose(name, Number(input(name).value)));
}
denseSwitch.addEventListener("change", () => choose("dense", denseSwitch.checked));
document.getElementById("reset-settings").addEventListener("click", () => {
  chosen = {};
  saveSettings(chosen);
  show();
});
document.getElementById("open-settings").addEventListener("click", () => dialog.showModal());
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
