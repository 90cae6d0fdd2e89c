// An answer while it is written: what the model reads, what it writes, and how fast.
import { streamChat } from "./api.js";

const MOST_VERSIONS = 100;

/** An answer of which nothing is written yet. */
export const blank = () => ({ role: "assistant", content: "", ending: "cut" });

const versionOf = ({ content, ending, facts }) => ({ content, ending, facts });

/** A blank answer in the place of another, which stays within reach as an earlier version. */
export function another(last) {
  const earlier = last.versions ?? (last.content ? [versionOf(last)] : []);
  const fresh = blank();
  const versions = [...earlier.slice(1 - MOST_VERSIONS), versionOf(fresh)];
  return versions.length > 1 ? { ...fresh, versions, version: versions.length - 1 } : fresh;
}

/** What the model is to read: the system prompt, and every question that has an answer. */
function conversationOf({ system, messages }, withLast) {
  const turns = withLast ? messages : messages.slice(0, -1);
  const told = turns.filter(({ content }, index) =>
    content && (turns[index + 1]?.role !== "assistant" || turns[index + 1].content));
  return system.trim() ? [{ role: "system", content: system }, ...told] : told;
}

/** Times of an answer, and the figures that follow from them. */
class Clock {
  #start = performance.now();
  #first = null;
  #last = null;
  #pieces = 0;

  piece() {
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#pieces += 1;
  }

  /** Tokens, seconds and speed; if the server does not count, a piece is taken for a token. */
  facts(usage = null) {
    if (this.#first === null) return undefined;
    const count = (value) => (Number.isInteger(value) && value >= 0 ? value : undefined);
    const newTokens = count(usage?.completion_tokens) ?? this.#pieces;
    const writing = (this.#last - this.#first) / 1000;
    return {
      newTokens,
      promptTokens: count(usage?.prompt_tokens),
      firstTokenSeconds: (this.#first - this.#start) / 1000,
      tokensPerSecond: newTokens > 1 && writing > 0 ? (newTokens - 1) / writing : undefined,
    };
  }
}

/**
 * Let the model write the last message of a conversation, or go on with it.
 *
 * The message's content, ending, error and facts are filled; onText(facts) is called after each
 * piece. Returns the error if there was one, null otherwise. A signal that aborts is no error.
 */
export async function writeAnswer(chat, message, { model, continued, signal, onText }) {
  delete message.error;
  delete message.facts;
  message.ending = "cut";
  const clock = new Clock();
  let usage = null;
  let fault = null;
  try {
    const messages = conversationOf(chat, continued);
    const pieces = streamChat({ model, messages, settings: chat.settings, continued, signal });
    for (;;) {
      const { done, value } = await pieces.next();
      if (done) { message.ending = value; break; }
      if (value.usage) ({ usage } = value);
      if (!value.text) continue;
      clock.piece();
      message.content += value.text;
      onText(clock.facts(usage));
    }
  } catch (error) {
    if (error.name === "AbortError") {
      message.ending = "stopped";
    } else {
      message.error = error.message;
      fault = error;
    }
  }
  message.facts = clock.facts(usage);
  if (message.versions) message.versions[message.version] = versionOf(message);
  return fault;
}
