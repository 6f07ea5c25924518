// One answer in progress: asks the server, fills the message, measures.

import { ask, ServerError } from "./api.js";

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

  // Resolves when the answer has ended, to the ServerError if there was one.
  async finish() {
    const clock = new Clock();
    let failure = null;
    try {
      for await (const part of ask(this.messages, this.settings, this.controller.signal)) {
        this.take(part, clock);
      }
    } catch (error) {
      if (!this.controller.signal.aborted) failure = this.fail(error);
    }
    this.message.running = false;
    delete this.message.read;
    if (clock.tokens) this.message.stats = clock.stats();
    this.changed();
    return failure;
  }

  take({ read, text, reasoning, finish, speed, usage }, clock) {
    if (read !== undefined) this.message.read = read;
    if (text || reasoning) clock.tick();
    if (reasoning) this.message.reasoning = (this.message.reasoning ?? "") + reasoning;
    if (text) this.message.content += text;
    if (finish) this.message.finish = finish;
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
