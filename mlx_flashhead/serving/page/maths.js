// Maths: finds it in Markdown, and sets it with KaTeX. The security policy allows no style
// attributes, so the few that KaTeX writes are set through the CSSOM, as its other styles are.

import "./vendor/katex/katex.min.js";
import { element } from "./dom.js";

const { katex } = globalThis;
const OPTIONS = { throwOnError: true, strict: false, trust: false, maxSize: 20, maxExpand: 500 };
const LONGEST = 5000; // characters of a formula

// $$…$$, \[…\] or an environment, from the beginning of a line to the end of one.
const BLOCK =
  /^ {0,3}(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\]|(\\begin\{([a-zA-Z]+\*?)\}[^]+?\\end\{\4\}))[ \t]*(?:\n|$)/;
// A formula that is still growing, up to the end of the text.
const OPEN = /^ {0,3}(?:\$\$|\\\[|\\begin\{[a-zA-Z]+\*?\})(?:(?!\n[ \t]*\n)[^])*$/;
const BLOCK_START = /(?:^|\n) {0,3}(?:\$\$|\\\[|\\begin\{)/;
// $…$ holds no space at its ends and no letter or digit after it: prices and $PATH are no maths.
const INLINE =
  /^(?:\$\$([^$]+?)\$\$|\\\[([^]+?)\\\]|\\\(([^]+?)\\\)|\$(?!\s)((?:\\.|[^\\$\n])*?(?:\\.|[^\\$\s]))\$(?![\p{L}\p{N}]))/u;
const INLINE_START = /\$|\\[([]/;

// Extensions of marked. A formula becomes an element of the class "maths" with its source.
export const mathsExtensions = [
  {
    name: "mathsBlock",
    level: "block",
    start: (text) => text.match(BLOCK_START)?.index,
    tokenizer(text) {
      const match = text.slice(0, LONGEST).match(BLOCK);
      if (match) return { type: "mathsBlock", raw: match[0], text: match[1] ?? match[2] ?? match[3] };
      const open = text.length < LONGEST && text.match(OPEN);
      if (open) return { type: "mathsBlock", raw: open[0], text: open[0].trim(), open: true };
    },
    renderer: ({ text, open }) => holder("p", text, open ? "source" : "display"),
  },
  {
    name: "maths",
    level: "inline",
    start: (text) => text.match(INLINE_START)?.index,
    tokenizer(text) {
      const match = text.slice(0, LONGEST).match(INLINE);
      if (!match) return;
      const display = match[1] ?? match[2];
      return { type: "maths", raw: match[0], text: display ?? match[3] ?? match[4], display };
    },
    renderer: ({ text, display }) => holder("span", text, display ? "display" : "inline"),
  },
];

// Stars and underscores in a formula are no emphasis.
const ANYWHERE = new RegExp(INLINE.source.slice(1), "gu");
export const maskMaths = (text) => text.replace(ANYWHERE, (match) => "a".repeat(match.length));

const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
export const escapeHtml = (text) => text.replace(/[&<>"']/g, (character) => ESCAPES[character]);

const holder = (tag, text, kind) =>
  `<${tag} class="maths ${kind}">${escapeHtml(text.trim())}</${tag}>`;

// Sets the formulas below a node. One that KaTeX cannot read stays as its source.
export function setMaths(node) {
  for (const place of node.querySelectorAll(".maths:not(.source)")) {
    const source = place.textContent;
    try {
      place.replaceChildren(typeset(source, place.classList.contains("display")));
    } catch {
      place.replaceChildren(element("code", {}, source));
    }
  }
}

function typeset(source, displayMode) {
  const tree = katex.__renderToDomTree(source, { ...OPTIONS, displayMode });
  holdStyles(tree);
  const node = tree.toNode();
  for (const styled of node.querySelectorAll("[data-style]")) {
    styled.style.cssText = styled.getAttribute("data-style");
    styled.removeAttribute("data-style");
  }
  return node;
}

function holdStyles({ attributes, children = [] }) {
  if (attributes?.style) {
    attributes["data-style"] = attributes.style;
    delete attributes.style;
  }
  children.forEach(holdStyles);
}
