// The connection: the banner, the dialog for the token, and the worker that keeps the page's files
// while the server is away.

import { LOADING_MS, serverInfo, unlock } from "./api.js";

const EVERY_MS = 2000;
const WORKER = "/worker.js";
const banner = document.getElementById("banner");
const lock = document.getElementById("lock");
const wrong = document.getElementById("wrong-token");
const token = document.getElementById("token");

let timer = null;
let arrived = () => {};
let loading = false; // whether the banner says that the model is being loaded

// onInfo is called with the server's info at the start, and whenever the server is back.
export function connect(onInfo) {
  arrived = onInfo;
  refresh();
  document.addEventListener("visibilitychange", () => document.hidden || refresh());
  window.addEventListener("online", refresh);
}

// Called after a request has failed.
export function lost(error) {
  if (error.kind === "token") askForToken();
  if (error.kind === "away") refresh();
}

// Reads the server's info again.
export async function refresh() {
  clearTimeout(timer);
  try {
    const info = await serverInfo();
    if (loading) banner.hidden = true;
    else if (!banner.hidden) say("The server is back.", false);
    loading = false;
    arrived(info);
  } catch (error) {
    if (error.kind === "token") askForToken();
    else if (error.kind === "loading") {
      loading = true;
      say("Loading the model …", false);
      clearTimeout(timer);
      timer = setTimeout(refresh, LOADING_MS);
    } else {
      loading = false;
      say("The server does not answer. Your conversations are safe here; trying again …", true);
      timer = setTimeout(refresh, EVERY_MS);
    }
  }
}

function say(text, bad) {
  banner.textContent = text;
  banner.classList.toggle("wrong", bad);
  banner.hidden = false;
  if (!bad) timer = setTimeout(() => (banner.hidden = true), 3000);
}

function askForToken() {
  banner.hidden = true;
  if (!lock.open) lock.showModal();
}

document.getElementById("unlock").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await unlock(token.value);
    token.value = "";
    wrong.hidden = true;
    lock.close();
    refresh();
  } catch (error) {
    wrong.textContent = error.kind === "token" ? "That is not this server’s token." : error.message;
    wrong.hidden = false;
  }
});
// Without a token there is no page behind the dialog.
lock.addEventListener("cancel", (event) => event.preventDefault());

// Browsers have workers for https and this machine only.
export async function keepPage() {
  const policy = globalThis.trustedTypes?.createPolicy("worker", { createScriptURL: () => WORKER });
  try {
    await navigator.serviceWorker?.register(policy?.createScriptURL("") ?? WORKER);
  } catch {
    // a browser that keeps nothing still shows the page
  }
}
