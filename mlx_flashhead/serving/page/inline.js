// Markdown within a line: code, emphasis, links. Returns nodes.

import { element } from "./dom.js";

const SAFE = /^(?:https?:\/\/|mailto:)/i;
const BARE_URL = /https?:\/\/[^\s<>"'`*]+/iy;
const LINK = /!?\[([^\[\]]*)\]\(\s*<?([^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:\s+"[^"]*")?\s*\)/y;
const ANGLE = /<((?:https?:\/\/|mailto:)[^\s<>]*)>/iy;
const ESCAPE = /\\([!-/:-@[-`{-~])/y;
const TICKS = /`+/y;
const WORDS = /[^\\`*_~![<\nh]+|h(?!ttps?:)/iy;
// Marks, longest first, and the elements they become.
const MARKS = [
  ["***", "em", "strong"],
  ["___", "em", "strong"],
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];
const MAX_DEPTH = 6;

export function inline(text, depth = 0) {
  const nodes = [];
  const unclosed = new Set(); // marks without an end after this place; each is searched once
  let plain = "";
  let at = 0;
  const push = (node) => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
    nodes.push(node);
  };
  while (at < text.length) {
    const token = takeToken(text, at, depth, unclosed);
    if (token.node) push(token.node);
    else plain += token.text;
    at = token.end;
  }
  if (plain) nodes.push(document.createTextNode(plain));
  return nodes;
}

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

function takeToken(text, at, depth, unclosed) {
  const words = match(WORDS, text, at);
  if (words) return { text: words[0], end: at + words[0].length };
  const character = text[at];
  if (character === "\n") return takeBreak(text, at);
  const escaped = match(ESCAPE, text, at);
  if (escaped) return { text: escaped[1], end: at + 2 };
  if (character === "`") return takeCode(text, at, unclosed);
  const link = takeLink(text, at, depth);
  if (link) return link;
  return takeMarked(text, at, depth, unclosed) ?? { text: character, end: at + 1 };
}

function takeBreak(text, at) {
  return { node: element("br"), end: at + 1 };
}

function takeCode(text, at, unclosed) {
  const [ticks] = match(TICKS, text, at);
  const start = at + ticks.length;
  let end = unclosed.has(ticks) ? -1 : text.indexOf(ticks, start);
  while (end >= 0 && text[end + ticks.length] === "`") {
    end = text.indexOf(ticks, match(TICKS, text, end) ? TICKS.lastIndex : end + 1);
  }
  if (end < 0) {
    unclosed.add(ticks);
    return { text: ticks, end: start };
  }
  const code = text.slice(start, end).replaceAll("\n", " ");
  const padded = /^ .* $/.test(code) && code.trim();
  return { node: element("code", {}, padded ? code.slice(1, -1) : code), end: end + ticks.length };
}

function takeLink(text, at, depth) {
  const written = match(LINK, text, at);
  if (written) {
    const words = depth < MAX_DEPTH ? inline(written[1], depth + 1) : [written[1]];
    return { node: anchor(written[2], words, written[0]), end: at + written[0].length };
  }
  const angle = match(ANGLE, text, at);
  if (angle) return { node: anchor(angle[1], [angle[1]], angle[0]), end: at + angle[0].length };
  const bare = match(BARE_URL, text, at);
  if (!bare) return null;
  const address = trimmed(bare[0]);
  return { node: anchor(address, [address], address), end: at + address.length };
}

// Punctuation at the end belongs to the sentence, and so does a bracket that was not opened.
function trimmed(address) {
  const short = address.replace(/[.,:;!?\]]+$/, "");
  const opened = short.split("(").length >= short.split(")").length;
  return opened ? short : short.replace(/\)+[.,:;!?]*$/, "");
}

// A link to anything but a web page or a mail address stays text.
function anchor(address, words, source) {
  if (!SAFE.test(address)) return document.createTextNode(source);
  const properties = { href: address, target: "_blank", rel: "noopener noreferrer" };
  return element("a", properties, ...words);
}

function takeMarked(text, at, depth, unclosed) {
  if (depth >= MAX_DEPTH) return null;
  for (const [mark, ...tags] of MARKS) {
    if (!text.startsWith(mark, at) || unclosed.has(mark)) continue;
    const end = closing(text, at, mark);
    if (end < 0) {
      if (end === -1) unclosed.add(mark);
      continue;
    }
    const words = inline(text.slice(at + mark.length, end), depth + 1);
    const inner = element(tags.at(-1), {}, ...words);
    const node = tags.length > 1 ? element(tags[0], {}, inner) : inner;
    return { node, end: end + mark.length };
  }
  return null;
}

// The end of the mark that opens at `at`; -1 without an end, -2 if no mark opens there.
function closing(text, at, mark) {
  const start = at + mark.length;
  const word = /[\p{L}\p{N}]/u;
  if (start >= text.length || /\s/.test(text[start])) return -2;
  if (mark[0] === "_" && at > 0 && word.test(text[at - 1])) return -2;
  let end = text.indexOf(mark, start + 1);
  while (end >= 0) {
    const after = text[end + mark.length] ?? "";
    const longer = after === mark[0] || (text[end - 1] === mark[0] && mark.length < 3);
    const inWord = mark[0] === "_" && word.test(after);
    if (!/\s/.test(text[end - 1]) && !longer && !inWord && text[end - 1] !== "\\") return end;
    end = text.indexOf(mark, longer ? runEnd(text, end) : end + 1);
  }
  return -1;
}

function runEnd(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end;
}
