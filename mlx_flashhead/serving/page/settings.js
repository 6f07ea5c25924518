// The settings. A setting that the user has not moved keeps the server's default and is not sent.

import { model, severalModels } from "./models.js";
import { onPreference, prefer, preference } from "./preferences.js";

const dialog = document.getElementById("settings");
const sliders = ["temperature", "top_p", "n_probes", "max_tokens"];
const denseSwitch = document.getElementById("dense");
let defaults = {};

const input = (name) => document.getElementById(name);
const isDense = () => preference("dense") ?? model().dense ?? false;

// The settings of a request. dense: whether every token is scored; undefined leaves it to the user.
export function requestSettings(dense = preference("dense")) {
  const settings = {};
  for (const name of sliders) {
    if (preference(name) !== undefined) settings[name] = preference(name);
  }
  const { name, n_clusters } = model();
  if (severalModels()) settings.model = name;
  if (name !== undefined && !n_clusters) {
    delete settings.n_probes; // chosen for a model with a FlashHead
    return settings;
  }
  if (dense !== undefined) settings.dense = dense;
  if (dense ?? isDense()) {
    delete settings.n_probes; // of no meaning without clusters
  } else if (settings.n_probes > (n_clusters ?? Infinity)) {
    settings.n_probes = n_clusters; // chosen for another model
  }
  return settings;
}

// Whether the draws of an answer are random.
export const drawsRandomly = () => (preference("temperature") ?? defaults.temperature ?? 0) > 0;

// info: of the server
export function useDefaults(info) {
  defaults = info;
  show();
}

function show() {
  const { n_probes, n_clusters } = model();
  document.getElementById("probes-field").hidden = !n_clusters;
  denseSwitch.closest(".field").hidden = !n_clusters;
  if (n_clusters) input("n_probes").max = n_clusters;
  for (const name of sliders) {
    const field = input(name);
    const value = preference(name) ?? { ...defaults, n_probes }[name];
    if (value === undefined) continue;
    if (name === "max_tokens") field.max = Math.max(8192, value);
    field.value = value;
    const suffix = preference(name) === undefined ? " (default)" : "";
    document.querySelector(`output[for="${name}"]`).textContent = `${value}${suffix}`;
  }
  denseSwitch.checked = isDense();
  document.getElementById("probes-field").classList.toggle("off", isDense());
  input("n_probes").disabled = isDense();
}

for (const name of sliders) {
  input(name).addEventListener("input", () => prefer({ [name]: Number(input(name).value) }));
}
denseSwitch.addEventListener("change", () => prefer({ dense: denseSwitch.checked }));
document.getElementById("reset-settings").addEventListener("click", () => {
  prefer(Object.fromEntries([...sliders, "dense"].map((name) => [name, undefined])));
});
document.getElementById("open-settings").addEventListener("click", openSettings);
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
onPreference(show);

export function openSettings() {
  dialog.showModal();
}
