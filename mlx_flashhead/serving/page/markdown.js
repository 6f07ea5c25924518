// Markdown to elements. Text becomes text nodes, and a link must lead to http, https or mailto.
// So nothing that a model writes can run. Blocks are here, words in inline.js.

import { copyButton, element } from "./dom.js";
import { inline } from "./inline.js";

const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+(.*)|\s*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const MAX_DEPTH = 8; // of lists and quotations in each other

// Renders a growing text into a container. Unchanged blocks stay the same elements and keep their
// scroll position and selection.
export function renderMarkdown(container, text) {
  const blocks = splitBlocks(text);
  blocks.forEach((block, index) => {
    const source = `${block.type}\n${block.lines.join("\n")}\n${block.closed}`;
    const present = container.children[index];
    if (present?.source === source) return;
    const node = build(block, 0);
    node.source = source;
    if (present) present.replaceWith(node);
    else container.append(node);
  });
  while (container.children.length > blocks.length) container.lastElementChild.remove();
}

// Blocks of the form {type, lines, …}, in order.
export function splitBlocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");
  const blocks = [];
  let index = 0;
  while (index < lines.length) {
    if (!lines[index].trim()) {
      index += 1;
      continue;
    }
    const [block, next] = takeBlock(lines, index);
    blocks.push(block);
    index = next;
  }
  return blocks;
}

function takeBlock(lines, start) {
  const line = lines[start];
  const fence = line.match(FENCE);
  if (fence) return takeCode(lines, start, fence);
  const heading = line.match(HEADING);
  if (heading) {
    return [{ type: `h${heading[1].length}`, lines: [heading[2] ?? ""] }, start + 1];
  }
  if (RULE.test(line)) return [{ type: "hr", lines: [] }, start + 1];
  if (QUOTE.test(line)) {
    return takeWhile(lines, start, "blockquote", (text) => text.trim() && !startsCode(text));
  }
  if (ITEM.test(line)) return takeList(lines, start);
  if (startsTable(lines, start)) {
    return takeWhile(lines, start, "table", (text) => text.includes("|"));
  }
  let end = start + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end += 1;
  return [{ type: "p", lines: lines.slice(start, end) }, end];
}

const startsCode = (line) => FENCE.test(line);

const startsTable = (lines, index) =>
  lines[index].includes("|") &&
  index + 1 < lines.length &&
  lines[index + 1].includes("-") &&
  TABLE_RULE.test(lines[index + 1]) &&
  cells(lines[index]).length === cells(lines[index + 1]).length;

const interrupts = (lines, index) =>
  startsCode(lines[index]) ||
  HEADING.test(lines[index]) ||
  RULE.test(lines[index]) ||
  QUOTE.test(lines[index]) ||
  /^ {0,3}(?:[-*+]|1[.)])\s+\S/.test(lines[index]) ||
  startsTable(lines, index);

function takeWhile(lines, start, type, belongs) {
  let end = start + 1;
  while (end < lines.length && belongs(lines[end])) end += 1;
  return [{ type, lines: lines.slice(start, end) }, end];
}

function takeCode(lines, start, [, indent, marks, language]) {
  const isEnd = (line) => {
    const text = line.trim();
    return text.length >= marks.length && text === marks[0].repeat(text.length);
  };
  let end = start + 1;
  while (end < lines.length && !isEnd(lines[end])) end += 1;
  const code = lines.slice(start + 1, end).map((line) => unindented(line, indent.length));
  const closed = end < lines.length;
  return [{ type: "pre", lines: code, language: language.trim(), closed }, end + 1];
}

// A list goes on over blank lines as long as items or indented text follow.
function takeList(lines, start) {
  const [, indent, mark] = lines[start].match(ITEM);
  const ordered = /\d/.test(mark);
  let end = start + 1;
  for (let index = end; index < lines.length; index += 1) {
    const line = lines[index];
    if (!line.trim()) continue;
    const item = line.match(ITEM);
    const inside = indentOf(line) > indent.length;
    const sibling = item && !RULE.test(line) && /\d/.test(item[2]) === ordered;
    const lazy = index === end && !item && !interrupts(lines, index) && lines[index - 1].trim();
    if (!inside && !sibling && !lazy) break;
    end = index + 1;
  }
  return [{ type: ordered ? "ol" : "ul", lines: lines.slice(start, end) }, end];
}

const indentOf = (line) => line.length - line.trimStart().length;
const unindented = (line, columns) => line.slice(Math.min(columns, indentOf(line)));

function build(block, depth) {
  switch (block.type) {
    case "pre":
      return buildCode(block);
    case "hr":
      return element("hr");
    case "table":
      return buildTable(block.lines);
    case "ul":
    case "ol":
      return buildList(block, depth);
    case "blockquote": {
      const inner = block.lines.map((line) => line.replace(QUOTE, "")).join("\n");
      return element("blockquote", {}, ...nested(inner, depth));
    }
    default: {
      const text = block.lines.map((line) => line.trimStart()).join("\n");
      return element(block.type, {}, ...inline(text));
    }
  }
}

function nested(text, depth) {
  if (depth >= MAX_DEPTH) return [element("p", {}, text)];
  return splitBlocks(text).map((block) => build(block, depth + 1));
}

function buildCode({ lines, language }) {
  const code = element("code", {}, lines.join("\n"));
  const bar = element(
    "div",
    { className: "code-bar" },
    element("span", {}, language.split(/\s/)[0]),
    copyButton("Copy the code", () => code.textContent),
  );
  return element("pre", {}, bar, code);
}

function buildList({ type, lines }, depth) {
  const list = element(type);
  const first = lines[0].match(ITEM);
  const start = Number.parseInt(first[2], 10);
  if (start !== 1 && type === "ol") list.start = start;
  let item = [];
  let width = 0;
  const finish = () => {
    if (item.length) list.append(buildItem(item, depth));
  };
  for (const line of lines) {
    const match = line.match(ITEM);
    if (match && match[1].length <= first[1].length + 1) {
      finish();
      width = match[1].length + match[2].length + 1;
      item = [match[3] ?? ""];
    } else {
      item.push(unindented(line, width));
    }
  }
  finish();
  return list;
}

// A tight item is words, perhaps with a list below; a loose one has paragraphs.
function buildItem(lines, depth) {
  while (lines.length > 1 && !lines.at(-1).trim()) lines.pop();
  const parts = nested(lines.join("\n"), depth);
  const loose = lines.some((line) => !line.trim()) && parts.filter((p) => p.tagName === "P").length > 1;
  const children = parts.flatMap((part) =>
    part.tagName === "P" && !loose ? [...part.childNodes] : [part],
  );
  return element("li", {}, ...children);
}

function cells(line) {
  const text = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  const escaped = "\u0000"; // stands for \|, which is no border
  const parts = text.replaceAll("\\|", escaped).split("|");
  return parts.map((cell) => cell.trim().replaceAll(escaped, "|"));
}

function buildTable([head, rule, ...rows]) {
  const sides = cells(rule).map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "right";
    return "";
  });
  const row = (line, tag) => {
    const texts = cells(line);
    return element(
      "tr",
      {},
      ...sides.map((className, i) => element(tag, { className }, ...inline(texts[i] ?? ""))),
    );
  };
  const table = element(
    "table",
    {},
    element("thead", {}, row(head, "th")),
    element("tbody", {}, ...rows.map((line) => row(line, "td"))),
  );
  return element("div", { className: "table" }, table);
}
