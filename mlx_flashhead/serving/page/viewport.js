// Keeps the page inside what is visible: an on-screen keyboard on iOS covers the page without
// making it smaller, and only the visual viewport tells.

const KEYBOARD = 120; // pixels: more than the bars of a browser, less than any keyboard

export function follow(viewport, root = document.documentElement) {
  const fit = () => {
    if (Math.abs(viewport.scale - 1) > 0.01) return; // magnified with two fingers: leave it be
    root.style.setProperty("--height", `${viewport.height}px`);
    root.style.setProperty("--top", `${viewport.offsetTop}px`);
    root.classList.toggle("keyboard", root.clientHeight - viewport.height > KEYBOARD);
  };
  viewport.addEventListener("resize", fit);
  viewport.addEventListener("scroll", fit);
  fit();
}
