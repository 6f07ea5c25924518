// Starts the worker that keeps the page's files. Browsers have it for https and this machine only.

const ADDRESS = "/worker.js";

export async function keepPage() {
  const policy = globalThis.trustedTypes?.createPolicy("worker", { createScriptURL: () => ADDRESS });
  try {
    await navigator.serviceWorker?.register(policy?.createScriptURL("") ?? ADDRESS);
  } catch {
    // a browser that keeps nothing still shows the page
  }
}
