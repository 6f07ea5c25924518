// The same question with FlashHead and without: one after the other, so that each has the whole
// machine, side by side on the screen.

import { notice } from "./actions.js";
import { element } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { Run } from "./run.js";
import { drawsRandomly, requestSettings } from "./settings.js";

const dialog = document.getElementById("compare");
const verdict = document.getElementById("verdict");
const SIDES = [
  { name: "FlashHead", dense: false },
  { name: "Dense", dense: true },
];
let asked = null; // {messages, onFailure}
let run = null;

// messages: of the request, with the question as their end. onFailure(error) hears of a ServerError.
export function compare(messages, onFailure) {
  asked = { messages, onFailure };
  document.getElementById("compare-question").textContent = messages.at(-1).content;
  dialog.showModal();
  start();
}

async function start() {
  run?.stop();
  const seed = drawsRandomly() ? { seed: Math.floor(Math.random() * 2 ** 32) } : {};
  const sides = SIDES.map((side) => ({ ...side, ...drawSide(side.name) }));
  document.getElementById("sides").replaceChildren(...sides.map(({ node }) => node));
  const answers = [];
  for (const { name, dense, body, speed, figures } of sides) {
    verdict.textContent = `${name} answers …`;
    const answer = { role: "assistant", content: "", running: true };
    const mine = new Run(asked.messages, answer, { ...requestSettings(dense), ...seed }, () =>
      renderMarkdown(body, answer.content || answer.reasoning || ""),
    );
    run = mine;
    const failure = await mine.finish();
    if (run !== mine || !dialog.open) return;
    if (answer.error) {
      verdict.textContent = "";
      body.append(notice(answer.error, start));
      if (failure) asked.onFailure(failure);
      return;
    }
    drawFigures(answer.stats, speed, figures);
    answers.push(answer);
  }
  run = null;
  verdict.textContent = `${textsSentence(...answers)} ${speedSentence(...answers)}`.trim();
}

function drawSide(name) {
  const speed = element("output", { className: "speed" }, "…");
  const figures = element("small");
  const body = element("div", { className: "body" });
  const head = element("header", {}, element("h3", {}, name), speed, figures);
  return { node: element("article", {}, head, body), body, speed, figures };
}

function drawFigures(stats, speed, figures) {
  if (stats?.speed) speed.replaceChildren(stats.speed.toFixed(1), element("span", {}, " tokens/s"));
  else speed.textContent = "–";
  if (stats) figures.textContent = `${stats.tokens} tokens · first after ${stats.first.toFixed(1)} s`;
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
  return `FlashHead has ${times} times the speed in this run.`;
}

document.getElementById("compare-again").addEventListener("click", start);
dialog.addEventListener("close", () => {
  run?.stop();
  run = null;
});
