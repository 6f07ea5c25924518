// Elements. Text always becomes text: only markdown.js and code.js parse HTML.

export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onclick) {
  const button = element("button", { type: "button", className: "round", onclick }, icon(name));
  button.setAttribute("aria-label", label);
  button.title = label;
  return button;
}

export const hasPointer = matchMedia("(any-pointer: fine)"); // and so, most likely, a keyboard

// Whether a key sends a text. Return alone does with a keyboard and a pointer; on a touch screen
// alone it begins a new line.
export const sends = (event) =>
  event.key === "Enter" &&
  !event.isComposing &&
  ((hasPointer.matches && !event.shiftKey) || event.metaKey || event.ctrlKey);

// Takes the on-screen keyboard away.
export const leaveKeyboard = (area) => hasPointer.matches || area.blur();

// Makes a text area as high as its text.
export function fitHeight(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

// Copies without the Clipboard API, which needs https.
export function copyText(text) {
  const area = element("textarea", { value: text, readOnly: true });
  area.style.cssText = "position:fixed;top:0;left:0;opacity:0;font-size:16px";
  const focused = document.activeElement;
  (document.querySelector("dialog[open]") ?? document.body).append(area); // the rest is inert
  area.focus({ preventScroll: true });
  area.setSelectionRange(0, text.length);
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus?.({ preventScroll: true });
  return copied;
}

export function copyButton(label, getText) {
  const button = iconButton("copy", label, () => {
    const copied = copyText(getText());
    button.replaceChildren(icon(copied ? "done" : "close"));
    button.classList.toggle("copied", copied);
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.classList.remove("copied");
    }, 1500);
  });
  return button;
}

// Offers a file for download.
export function saveFile(file) {
  const href = URL.createObjectURL(file);
  const link = element("a", { href, download: file.name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(href), 60_000); // Safari reads it later
}

// A sentence above the conversation about what went wrong. A tap takes it away, and so does time.
const note = document.getElementById("note");
const hideNote = () => (note.hidden = true);
let timer = null;

export function notify(sentence) {
  clearTimeout(timer);
  note.textContent = sentence;
  note.hidden = false;
  timer = setTimeout(hideNote, 12_000);
}

note.addEventListener("click", hideNote);
