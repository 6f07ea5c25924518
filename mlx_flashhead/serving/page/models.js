// The models that the server knows: the name of the chosen one, and the choice between several.

import { element } from "./dom.js";
import { onPreference, prefer, preference } from "./preferences.js";

const label = document.getElementById("model");
const choice = document.getElementById("model-choice");
let models = [];

// The chosen model: {name, and with a FlashHead dense, n_probes, n_clusters}; {} before the server
// has answered.
export const model = () => models.find(({ name }) => name === preference("model")) ?? models[0] ?? {};

export const severalModels = () => models.length > 1;

// known: the server's models, the default first.
export function useModels(known) {
  models = known;
  choice.replaceChildren(...models.map(({ name }) => element("option", { value: name }, name)));
  draw();
}

function draw() {
  choice.hidden = !severalModels();
  choice.parentElement.classList.toggle("several", severalModels());
  choice.value = model().name;
  label.textContent = model().name ?? "";
}

choice.addEventListener("change", () => prefer({ model: choice.value }));
onPreference(draw);
