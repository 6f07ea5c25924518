// Code in an answer: its bar, its colours, its growth. highlight.js writes HTML, of which DOMPurify
// lets only spans with a class through.

import DOMPurify from "./vendor/dompurify/purify.es.mjs";
import highlighter from "./vendor/highlightjs/highlight.min.js";
import { copyButton, element } from "./dom.js";

// Longer code stays plain: a pattern's time can grow with the square of a text's length.
const LONGEST = 10_000; // characters
const LONG_LINE = /.{500}/;
const AT_ONCE = 4000; // characters that are coloured before they are shown
const REST_MS = 100; // between two colourings while code grows
const REST = 10; // and this many times as long as the last one took
const SPANS = { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true };

const languageOf = (pre) => pre.querySelector(".language").textContent;

export function addBar(pre) {
  const code = pre.querySelector("code");
  const bar = element("div", { className: "code-bar" });
  bar.append(pre.querySelector(".language"), copyButton("Copy the code", () => code.textContent));
  pre.prepend(bar);
}

// Appends to a code block what another one has in addition. Returns whether that was possible.
export function growCode(present, node) {
  if (present.tagName !== "PRE" || node.tagName !== "PRE") return false;
  const [code, grown] = [present, node].map((pre) => pre.querySelector("code"));
  const text = code.textContent;
  const longer = grown.textContent;
  if (!text || languageOf(present) !== languageOf(node) || !longer.startsWith(text)) return false;
  code.append(longer.slice(text.length));
  colourLater(code);
  return true;
}

// Colours the code blocks of a node: long ones after they are shown.
export function colourCode(node) {
  const blocks = node.tagName === "PRE" ? [node] : node.querySelectorAll("pre");
  for (const code of [...blocks].map((pre) => pre.querySelector("code"))) {
    if (code.textContent.length <= AT_ONCE) colour(code);
    else colourLater(code);
  }
}

function colourLater(code) {
  code.timer ??= setTimeout(() => {
    code.timer = undefined;
    if (!code.isConnected) return;
    if (isSelected(code)) colourLater(code);
    else colour(code);
  }, Math.max(REST_MS, REST * (code.took ?? 0)));
}

// New elements would take a selection away.
function isSelected(code) {
  const selection = getSelection();
  return !selection.isCollapsed && selection.containsNode(code, true);
}

function colour(code) {
  const text = code.textContent;
  const language = languageOf(code.closest("pre"));
  if (text.length > LONGEST || LONG_LINE.test(text) || !highlighter.getLanguage(language)) return;
  const start = performance.now();
  const { value } = highlighter.highlight(text, { language, ignoreIllegals: true });
  const colours = DOMPurify.sanitize(value, SPANS);
  if (colours.textContent === text) code.replaceChildren(colours); // colours change no code
  code.took = performance.now() - start;
}
