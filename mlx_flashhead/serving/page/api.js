// The server's API: the models and defaults, streamed answers, and an answer in progress.

// kind: "token" (the server needs another one), "away" (no connection), "loading" (its model is not
// there yet), "rejected" (with a reason).
export class ServerError extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

export const LOADING_MS = 1000; // between two questions to a server that loads its model
const AWAY = "The server does not answer. Is it still running, and on the same network?";

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch {
    throw new ServerError("away", AWAY);
  }
  if (response.ok) return response;
  if (response.status === 401) throw new ServerError("token", "The server needs its token.");
  const text = await response.text().catch(() => "");
  throw rejection(text, `The server answered ${response.status}.`);
}

// The error in the text of an answer, which is OpenAI's JSON where the server itself has answered.
function rejection(text, otherwise) {
  let error = null;
  try {
    error = JSON.parse(text).error;
  } catch {
    // a proxy has answered
  }
  const message = typeof error === "string" ? error : error?.message;
  const kind = error?.code === "model_loading" ? "loading" : "rejected";
  return new ServerError(kind, message || otherwise);
}

export const serverInfo = async () => (await request("/page/info.json")).json();

// Sends the server another token. From then on the browser sends it as a cookie.
export async function unlock(token) {
  await request(`/?token=${encodeURIComponent(token.trim())}`);
}

// Yields {loading, read, text, reasoning, finish, decoding, speed, usage}, each optional, until the
// answer is complete. loading says that the server waits for its model; read is the share of the question that the model has read, 0 … 1; speed is in tokens/s;
// decoding is the server's word for how the tokens were chosen.
async function* ask(messages, settings, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      messages,
      stream: true,
      stream_options: { include_usage: true },
      ...settings,
    }),
    signal,
  });
  for await (const { comment, data } of events(response.body.getReader())) {
    if (comment) {
      if (comment === "loading") yield { loading: true };
      const [, done, total] = comment.match(/^prompt (\d+)\/(\d+)$/) ?? [];
      if (total) yield { read: done / total };
      const [, decoding] = comment.match(/^decoding (.+)$/) ?? [];
      if (decoding) yield { decoding };
      const [, speed] = comment.match(/^([\d.]+) tokens\/s$/) ?? [];
      if (speed) yield { speed: Number(speed) };
      continue;
    }
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw rejection(data, "The server failed.");
    const choice = chunk.choices?.[0];
    yield {
      text: choice?.delta?.content,
      reasoning: choice?.delta?.reasoning,
      finish: choice?.finish_reason,
      usage: chunk.usage,
    };
  }
  throw new ServerError("away", "The answer broke off: the server has gone away.");
}

// The data and the comments of server-sent events, without their other fields.
async function* events(reader) {
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch {
      throw new ServerError("away", "The answer broke off: the connection to the server is lost.");
    }
    if (part.done) return;
    const lines = (rest + decoder.decode(part.value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield { data: line.slice(5).trim() };
      if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
    }
  }
}

// One answer in progress: sends the question, fills the message, measures.
export class Run {
  // message: the answer, still empty. changed() is called whenever it has grown.
  constructor(messages, message, settings, changed) {
    this.messages = messages;
    this.message = message;
    this.settings = settings;
    this.changed = changed;
    this.controller = new AbortController();
  }

  stop() {
    this.controller.abort();
    Object.assign(this.message, { running: false, stopped: true });
  }

  // Resolves when the answer has ended, to the ServerError if there was one. While the server loads
  // its model, the question is sent again and again.
  async finish() {
    let clock = new Clock();
    let failure = null;
    for (;;) {
      try {
        for await (const part of ask(this.messages, this.settings, this.controller.signal)) {
          this.take(part, clock);
        }
      } catch (error) {
        if (await this.waits(error)) {
          clock = new Clock();
          continue;
        }
        if (!this.controller.signal.aborted) failure = this.fail(error);
      }
      break;
    }
    this.message.running = false;
    delete this.message.read;
    delete this.message.loading;
    if (clock.tokens) this.message.stats = clock.stats();
    this.changed();
    return failure;
  }

  // Whether a question that was refused is to be sent again, after a pause.
  async waits(error) {
    if (error.kind !== "loading" || this.controller.signal.aborted) return false;
    this.message.loading = true;
    this.changed();
    await new Promise((resume) => {
      const timer = setTimeout(resume, LOADING_MS);
      this.controller.signal.addEventListener("abort", () => (clearTimeout(timer), resume()));
    });
    return !this.controller.signal.aborted;
  }

  take({ loading, read, text, reasoning, finish, decoding, speed, usage }, clock) {
    if (loading) this.message.loading = true;
    else delete this.message.loading;
    if (read !== undefined) this.message.read = read;
    if (text || reasoning) clock.tick();
    if (reasoning) this.message.reasoning = (this.message.reasoning ?? "") + reasoning;
    if (text) this.message.content += text;
    if (finish) this.message.finish = finish;
    if (decoding) this.message.decoding = decoding;
    if (speed) clock.speed = speed;
    if (usage) clock.tokens = usage.completion_tokens;
    this.changed();
  }

  fail(error) {
    const known = error instanceof ServerError;
    this.message.error = known ? error.message : `Something went wrong: ${error.message}`;
    return known ? error : null;
  }
}

// The times of an answer. The server reports its speed and its number of tokens at the end. For an
// answer that is stopped, pieces of one or a few tokens are counted here.
class Clock {
  constructor() {
    this.start = performance.now();
    this.first = null;
    this.last = null;
    this.tokens = 0;
    this.speed = null;
  }

  tick() {
    this.last = performance.now();
    this.first ??= this.last;
    this.tokens += 1;
  }

  stats() {
    const first = this.first ?? this.start;
    const seconds = (this.last - first) / 1000;
    const counted = this.tokens > 1 && seconds > 0 ? (this.tokens - 1) / seconds : null;
    return { tokens: this.tokens, speed: this.speed ?? counted, first: (first - this.start) / 1000 };
  }
}
