// Caches the page's files, so that the page opens with its conversations while the server is away.
// The server comes first: a cached file is shown only where no server answers.

const CACHE = "flashhead-page";
const OTHERS = ["/", "/manifest.webmanifest", "/apple-touch-icon.png"];

self.addEventListener("install", (event) => event.waitUntil(cacheAll()));
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { pathname, origin } = new URL(event.request.url);
  const file = OTHERS.includes(pathname) || pathname.startsWith("/page/");
  if (event.request.method !== "GET" || origin !== location.origin || !file) return;
  if (!pathname.endsWith(".json")) event.respondWith(answer(event.request, pathname));
});

async function cacheAll() {
  const names = await (await fetch("/page/files.json")).json();
  const cache = await caches.open(CACHE);
  await cache.addAll([...OTHERS, ...names.map((name) => `/page/${name}`)]);
  await self.skipWaiting();
}

// path: without the query, in which a token may be.
async function answer(request, path) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(path, response.clone());
    return response;
  } catch (error) {
    const cached = await cache.match(path);
    if (cached) return cached;
    throw error;
  }
}
