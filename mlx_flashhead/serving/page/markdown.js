// Markdown to elements. marked reads it with HTML switched off, DOMPurify lets only the elements of
// a text through, and links lead to http, https or mailto. So nothing that a model writes can run.

import DOMPurify from "./vendor/dompurify/purify.es.mjs";
import { Lexer, Marked } from "./vendor/marked/marked.esm.js";
import { addBar, colourCode, growCode } from "./code.js";
import { element } from "./dom.js";
import { escapeHtml, maskMaths, mathsExtensions, setMaths } from "./maths.js";

const LONGEST = 40_000; // characters; what follows them stays as it is written
const LONGEST_PARAGRAPH = 5000; // the time for one can grow with the square of its length
const SAFE = /^(?:https?:\/\/|mailto:)/i;
const CLEAN = {
  ALLOWED_TAGS: (
    "p br hr h1 h2 h3 h4 h5 h6 blockquote ul ol li pre code em strong del a span div " +
    "table thead tbody tr th td"
  ).split(" "),
  ALLOWED_ATTR: ["href", "target", "rel", "start", "align", "class"],
  ALLOWED_URI_REGEXP: SAFE,
  ADD_URI_SAFE_ATTR: ["target", "rel", "start", "align"], // no addresses
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const link = (href, words) =>
  `<a href="${escapeHtml(href)}" target="_blank" rel="noopener noreferrer">${words}</a>`;

const marked = new Marked({
  gfm: true,
  breaks: true,
  extensions: mathsExtensions,
  hooks: { emStrongMask: maskMaths },
  // HTML stays text
  tokenizer: { html: () => undefined, tag: () => undefined },
  renderer: {
    text(token) {
      return token.tokens ? this.parser.parseInline(token.tokens) : escapeHtml(token.text);
    },
    code({ text, lang }) {
      const language = escapeHtml((lang ?? "").split(/\s/)[0]);
      return `<pre><span class="language">${language}</span><code>${escapeHtml(text)}</code></pre>`;
    },
    link({ href, tokens, raw }) {
      return SAFE.test(href) ? link(href, this.parser.parseInline(tokens)) : escapeHtml(raw);
    },
    image({ href, text, raw }) {
      return SAFE.test(href) ? link(href, escapeHtml(text)) : escapeHtml(raw);
    },
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

class BoundedLexer extends Lexer {
  inlineTokens(text, tokens = []) {
    if (text.length <= LONGEST_PARAGRAPH) return super.inlineTokens(text, tokens);
    for (const [index, line] of text.split("\n").entries()) {
      if (index) tokens.push({ type: "br", raw: "\n" });
      tokens.push({ type: "text", raw: line, text: line });
    }
    return tokens;
  }
}

// Renders a growing text into a container. Unchanged blocks and growing code stay the same elements
// and keep their scroll position and selection.
export function renderMarkdown(container, text) {
  const blocks = htmlBlocks(text);
  blocks.forEach((html, index) => {
    const present = container.children[index];
    if (present?.source === html) return;
    const node = build(html);
    if (present && growCode(present, node)) present.source = html;
    else {
      node.source = html;
      colourCode(node);
      if (present) present.replaceWith(node);
      else container.append(node);
    }
  });
  while (container.children.length > blocks.length) container.lastElementChild.remove();
}

// The HTML of each block at the top.
function htmlBlocks(text) {
  if (text.length > LONGEST) {
    return [...htmlBlocks(text.slice(0, LONGEST)), plain(text.slice(LONGEST))];
  }
  try {
    const tokens = new BoundedLexer(marked.defaults).lex(text);
    return tokens.map((token) => marked.parser([token])).filter((html) => html.trim());
  } catch {
    return [plain(text)]; // nested too deeply
  }
}

const plain = (text) => `<p class="plain">${escapeHtml(text)}</p>`;

function build(html) {
  const fragment = DOMPurify.sanitize(html, CLEAN);
  setMaths(fragment);
  for (const pre of fragment.querySelectorAll("pre")) addBar(pre);
  for (const table of fragment.querySelectorAll("table")) {
    const box = element("div", { className: "table" });
    table.replaceWith(box);
    box.append(table);
  }
  const { children } = fragment;
  return children.length === 1 ? children[0] : element("div", {}, fragment);
}
