// The server's API: the model's name and defaults, and streamed answers.

// kind: "token" (the server needs another one), "away" (no connection), "refused" (with a reason).
export class ServerError extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

const AWAY = "The server does not answer. Is it still running, and on the same network?";

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch {
    throw new ServerError("away", AWAY);
  }
  if (response.ok) return response;
  if (response.status === 401) throw new ServerError("token", "The server asks for its token.");
  const text = await response.text().catch(() => "");
  throw new ServerError("refused", reason(text) || `The server answered ${response.status}.`);
}

function reason(text) {
  try {
    const { error } = JSON.parse(text);
    return typeof error === "string" ? error : error?.message;
  } catch {
    return "";
  }
}

export const serverInfo = async () => (await request("/page/info.json")).json();

// Sends the server another token. From then on the browser sends it as a cookie.
export async function unlock(token) {
  await request(`/?token=${encodeURIComponent(token.trim())}`);
}

// Yields {read, text, reasoning, finish, speed, usage}, each optional, until the answer is complete.
// read is the share of the question that the model has read, 0 … 1; speed is in tokens/s.
export async function* ask(messages, settings, signal) {
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
      const [, done, total] = comment.match(/^prompt (\d+)\/(\d+)$/) ?? [];
      if (total) yield { read: done / total };
      const [, speed] = comment.match(/^([\d.]+) tokens\/s$/) ?? [];
      if (speed) yield { speed: Number(speed) };
      continue;
    }
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError("refused", reason(data) || "The server failed.");
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
