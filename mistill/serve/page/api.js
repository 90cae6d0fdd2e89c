// The server's OpenAI-compatible interface: its models, a streamed answer, and what can go wrong.
import { word } from "./words.js";

const KEY = "mistill-key";
const HEALTH_PATIENCE = 4000;
let key = "";

/** What went wrong, by kind: "key", "offline", "busy", "context", "refused", "broken". */
export class ApiError extends Error {
  constructor(kind, message, more = {}) {
    super(message);
    this.kind = kind;
    Object.assign(this, more);
  }
}

const addressOf = (path) => new URL(path, document.baseURI);

// --- the key -----------------------------------------------------------------------------------

/** Keys are written in the visible characters of ASCII; no other can be sent in a header. */
export const isKey = (text) => /^[!-~]{1,4096}$/.test(text);

/** Use a key from now on; it is kept until this tab is closed. */
export function useKey(text) {
  key = text;
  try {
    if (text) sessionStorage.setItem(KEY, text);
    else sessionStorage.removeItem(KEY);
  } catch {
    // No storage: the key lives as long as the page.
  }
}

/**
 * Take the key from the address, as in http://127.0.0.1:8080/#key=..., and remove it from there
 * at once, so that it stays neither in the history nor in a screenshot. Browsers do not send this
 * part of an address.
 *
 * Returns whether there was a key.
 */
export function keyFromAddress() {
  const match = /^#key=(.*)$/s.exec(location.hash);
  if (match) {
    history.replaceState(null, "", location.pathname + location.search);
    let text = match[1];
    try { text = decodeURIComponent(text); } catch { /* a % of its own */ }
    if (isKey(text)) { useKey(text); return true; }
    return false;
  }
  try { key = sessionStorage.getItem(KEY) ?? ""; } catch { /* no storage */ }
  return false;
}

// --- requests ----------------------------------------------------------------------------------

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(addressOf(path), { ...options, headers, cache: "no-store", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("offline", word("offline"));
  }
  if (!answer.ok) throw await errorOf(answer);
  return answer;
}

/** An error in the server's own words, which are shown as text. */
async function errorOf(answer) {
  let message = "";
  let code = null;
  try {
    ({ error: { message, code } } = JSON.parse(await answer.text()));
  } catch {
    // A proxy's page, perhaps.
  }
  if (typeof message !== "string" || !message) message = word("status", { status: String(answer.status) });
  message = message.slice(0, 2000);
  if (answer.status === 401) return new ApiError("key", word(key ? "key_wrong" : "key_needed"));
  if (code === "context_length_exceeded") return new ApiError("context", `${word("context_full")} ${message}`);
  if (answer.status === 429 || answer.status === 503) {
    const wait = Number(answer.headers.get("Retry-After"));
    const known = Number.isFinite(wait) && wait > 0;
    return new ApiError("busy", known ? word("busy_wait", { seconds: Math.ceil(wait) }) : word("busy"));
  }
  if ([502, 504].includes(answer.status)) return new ApiError("offline", word("offline"));
  return new ApiError(answer.status < 500 ? "refused" : "broken", message);
}

/** The models that the server offers: [{id, context}], context in tokens or null. */
export async function listModels() {
  const answer = await request("v1/models");
  try {
    const { data } = await answer.json();
    return data.map(({ id, max_model_len: context }) => ({
      id: String(id).slice(0, 200),
      context: Number.isInteger(context) ? context : null,
    }));
  } catch {
    throw new ApiError("broken", word("strange_answer"));
  }
}

/** Whether the server answers at all. */
export async function isAwake() {
  try {
    const answer = await fetch(addressOf("health"),
      { cache: "no-store", signal: AbortSignal.timeout(HEALTH_PATIENCE) });
    return answer.ok;
  } catch {
    return false;
  }
}

// --- a streamed answer -------------------------------------------------------------------------

/** The data of server-sent events, one string each. Lines may end in LF, CRLF or CR. */
export async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value = "" } = await reader.read();
      rest += value;
      if (done) rest += "\n\n";
      // A CR at the end may be half of a CRLF.
      const whole = rest.endsWith("\r") && !done ? rest.slice(0, -1) : rest;
      const lines = whole.split(/\r\n|\r|\n/);
      rest = lines.pop() + rest.slice(whole.length);
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) { yield data.join("\n"); data = []; }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Ask for an answer, and give it out piece by piece.
 *
 * Yields {usage} and {text} for each piece, which may hold several tokens; returns the reason of
 * the end: "stop", "length" or another word of the server's. A stream that breaks off is an error,
 * and so is one that ends without a reason.
 */
export async function* streamChat({ model, messages, settings, continued, signal }) {
  const clean = (text) => (text.toWellFormed ? text.toWellFormed() : text);
  const body = {
    model,
    messages: messages.map(({ role, content }) => ({ role, content: clean(content) })),
    ...settings,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  if (continued) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  const answer = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  let reason = null;
  try {
    for await (const data of eventsOf(answer.body)) {
      if (data === "[DONE]") break;
      const event = parsed(data);
      if (event.error) {
        const { message } = event.error;
        throw new ApiError("broken", typeof message === "string" ? message.slice(0, 2000) : word("broke_off"));
      }
      if (event.usage) yield { usage: event.usage };
      const choice = event.choices?.[0];
      const text = choice?.delta?.content;
      if (typeof text === "string" && text) yield { text };
      if (choice?.finish_reason) reason = String(choice.finish_reason);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("broken", word("broke_off"));
  }
  if (reason === null) throw new ApiError("broken", word("broke_off"));
  return reason;
}

function parsed(data) {
  try {
    return JSON.parse(data) ?? {};
  } catch {
    throw new ApiError("broken", word("strange_answer"));
  }
}
