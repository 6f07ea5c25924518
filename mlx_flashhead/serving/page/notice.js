// A sentence above the conversation about what went wrong. A tap takes it away, and so does time.

const place = document.getElementById("note");
const SECONDS = 12;
let timer = null;

export function tell(sentence) {
  clearTimeout(timer);
  place.textContent = sentence;
  place.hidden = false;
  timer = setTimeout(hide, SECONDS * 1000);
}

function hide() {
  place.hidden = true;
}

place.addEventListener("click", hide);
