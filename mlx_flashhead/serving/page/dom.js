// Elements. Text always becomes text, since nothing in the page parses HTML.

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

// Copies without the Clipboard API, which needs https.
export function copyText(text) {
  const area = element("textarea", { value: text, readOnly: true });
  area.style.cssText = "position:fixed;top:0;left:0;opacity:0;font-size:16px";
  const focused = document.activeElement;
  document.body.append(area);
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
