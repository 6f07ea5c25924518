// Keeps the page inside its visible part. An on-screen keyboard on iOS covers the page without
// making it smaller, and only the visual viewport shows it.

const KEYBOARD = 120; // pixels: more than a browser's bars, less than a keyboard

export function follow(viewport, root = document.documentElement) {
  const fit = () => {
    if (Math.abs(viewport.scale - 1) > 0.01) return; // magnified with two fingers
    root.style.setProperty("--height", `${viewport.height}px`);
    root.style.setProperty("--top", `${viewport.offsetTop}px`);
    root.classList.toggle("keyboard", root.clientHeight - viewport.height > KEYBOARD);
  };
  viewport.addEventListener("resize", fit);
  viewport.addEventListener("scroll", fit);
  fit();
}
