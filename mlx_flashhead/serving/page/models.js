// The models that the server has: the choice between several, and how the chosen one decodes.

import { element } from "./dom.js";
import { onPreference, prefer, preference } from "./store.js";

const label = document.getElementById("model");
const choice = document.getElementById("model-choice");
const mode = document.getElementById("mode");
const explanation = document.getElementById("decoding");
let models = [];

// The chosen model: {name, dense, decoding}, with a FlashHead also {flash_head, n_probes}; {} before
// the server has answered. decoding says how a request is decoded that chooses nothing, flash_head
// how one with dense=false is: "verified", "unverified", or "dense: …" with the reason.
export const model = () => models.find(({ name }) => name === preference("model")) ?? models[0] ?? {};

export const severalModels = () => models.length > 1;
export const isDense = (decoding) => Boolean(decoding?.startsWith("dense"));
export const reason = (decoding) => decoding.replace(/^dense:?\s*/, "");

// Every place of the page has these words.
const EXPLANATIONS = {
  verified:
    "Verified: FlashHead proposes tokens and the normal (dense) head verifies them. " +
    "The text is the normal model’s.",
  unverified:
    "Unverified: FlashHead alone chooses the tokens. The text can differ from the normal model’s.",
  dense: "Dense: the normal head scores every token, as without FlashHead",
};

export function explain(decoding) {
  if (!isDense(decoding)) return EXPLANATIONS[decoding] ?? "";
  return reason(decoding) ? `${EXPLANATIONS.dense} (${reason(decoding)}).` : `${EXPLANATIONS.dense}.`;
}

// As few words as fit beside a figure or a name.
export const shortly = (decoding) => (isDense(decoding) ? "dense" : decoding);

// How the next answer is decoded; undefined before the server has answered.
function decoding() {
  const { flash_head, decoding: usual } = model();
  if (!flash_head || preference("dense") === undefined) return usual;
  return preference("dense") ? "dense: chosen in the settings" : flash_head;
}

// served: the server's models, the default first.
export function useModels(served) {
  models = served;
  choice.replaceChildren(...models.map(({ name }) => element("option", { value: name }, name)));
  draw();
}

function draw() {
  const { name = "" } = model();
  choice.hidden = !severalModels();
  choice.parentElement.classList.toggle("several", severalModels());
  choice.value = name;
  label.textContent = name;
  mode.textContent = decoding() ? `· ${shortly(decoding())}` : "";
  label.parentElement.title = explain(decoding());
  explanation.textContent = explain(decoding());
}

choice.addEventListener("change", () => prefer({ model: choice.value }));
onPreference(draw);
