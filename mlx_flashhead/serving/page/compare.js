// The same question with FlashHead and with the normal (dense) head: one after the other, so that
// each has the whole machine, side by side on the screen.

import { Run } from "./api.js";
import { element } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { explain, isDense, model, reason } from "./models.js";
import { drawsRandomly, requestSettings } from "./settings.js";
import { figuresOf, notice } from "./view.js";

const dialog = document.getElementById("compare");
const verdict = document.getElementById("verdict");
const sidesNode = document.getElementById("sides");
const againButton = document.getElementById("compare-again");
let question = null; // {messages, onFailure}
let forced = false; // whether FlashHead is used where the server would not
let run = null;

// messages: of the request, with the question as their end. refresh() reads the server's info again,
// as a FlashHead may have been built meanwhile; onFailure(error) hears of a ServerError.
export async function compare(messages, refresh, onFailure) {
  question = { messages, onFailure };
  forced = false;
  document.getElementById("compare-question").textContent = messages.at(-1).content;
  againButton.hidden = true;
  verdict.textContent = "";
  sidesNode.replaceChildren();
  dialog.showModal();
  await refresh();
  if (!dialog.open) return;
  if (isDense(model().flash_head)) offer();
  else start();
}

// A dense model would be compared with itself.
function offer() {
  verdict.textContent = nothingToCompare(model().flash_head);
  const force = () => {
    forced = true;
    start();
  };
  const properties = { type: "button", className: "primary", onclick: force };
  sidesNode.replaceChildren(element("button", properties, "Compare with FlashHead forced on"));
}

function nothingToCompare(decoding) {
  const why = reason(decoding);
  const dense = `This model answers with its normal (dense) head${why && `: ${why}`}.`;
  return `${dense} There is nothing to compare.`;
}

async function start() {
  run?.stop();
  againButton.hidden = false;
  const seed = drawsRandomly() ? { seed: Math.floor(Math.random() * 2 ** 32) } : {};
  const sides = [
    { name: "FlashHead", dense: false, forced },
    { name: "Normal head", dense: true, forced: false },
  ].map((side) => ({ ...side, ...drawSide(side.name) }));
  sidesNode.replaceChildren(...sides.map(({ node }) => node));
  const answers = [];
  for (const side of sides) {
    const { name, dense, body } = side;
    verdict.textContent = `${name} answers …`;
    const answer = { role: "assistant", content: "", running: true };
    const probes = side.forced ? { n_probes: model().n_probes } : {}; // which force FlashHead on
    const settings = { ...requestSettings(dense), ...probes, ...seed };
    const mine = new Run(question.messages, answer, settings, () =>
      renderMarkdown(body, answer.content || answer.reasoning || ""),
    );
    run = mine;
    const failure = await mine.finish();
    if (run !== mine || !dialog.open) return;
    if (answer.error) {
      verdict.textContent = "";
      againButton.hidden = true; // the notice has the one button
      body.append(notice(answer.error, start));
      if (failure) question.onFailure(failure);
      return;
    }
    drawFigures(answer, side);
    answers.push(answer);
  }
  run = null;
  verdict.textContent = verdictOn(...answers);
}

function drawSide(name) {
  const speed = element("output", { className: "speed" }, "…");
  const figures = element("small");
  const body = element("div", { className: "body" });
  const head = element("header", {}, element("h3", {}, name), speed, figures);
  return { node: element("article", {}, head, body), body, speed, figures };
}

function drawFigures(answer, { forced, speed, figures }) {
  const rate = answer.stats?.speed;
  if (rate) speed.replaceChildren(rate.toFixed(1), element("span", {}, " tokens/s"));
  else speed.textContent = "–";
  const parts = answer.stats ? figuresOf(answer) : [];
  figures.textContent = [...(forced ? ["forced on"] : []), ...parts].join(" · ");
  figures.title = explain(answer.decoding);
}

// What the server reports of an answer comes before what it had announced.
function verdictOn(flash, dense) {
  if (isDense(flash.decoding)) return nothingToCompare(flash.decoding);
  return `${textsSentence(flash, dense)} ${speedSentence(flash, dense)}`.trim();
}

const whole = ({ reasoning = "", content }) => `${reasoning}\n${content}`;

function textsSentence(flash, dense) {
  if (whole(flash) === whole(dense)) return "The texts are equal.";
  const [a, b] = [flash, dense].map((answer) => whole(answer).trim().split(/\s+/));
  const equal = a.findIndex((word, index) => word !== b[index]);
  const words = equal < 0 ? a.length : equal;
  return words ? `The first ${words} words are equal.` : "The texts differ from the first word.";
}

function speedSentence(flash, dense) {
  if (!flash.stats?.speed || !dense.stats?.speed) return "";
  const times = (flash.stats.speed / dense.stats.speed).toFixed(2);
  const name = flash.decoding === "unverified" ? "Unverified, FlashHead" : "FlashHead";
  return `${name}${forced ? ", forced on," : ""} has ${times} times the speed in this run.`;
}

againButton.addEventListener("click", start);
dialog.addEventListener("close", () => {
  run?.stop();
  run = null;
});
