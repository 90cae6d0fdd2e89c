// Conversations, kept in this browser: IndexedDB, or memory where there is none.
//
// A conversation is {id, title, named, created, updated, system, settings, messages}; its messages
// lie in a store of their own, so that the list of conversations is read without them.
import { word } from "./words.js";
import { checkedSettings } from "./settings.js";

const DATABASE = "mistill-chats";
const FORMAT = "mistill-chats";
const MOST_BYTES = 200 << 20;
const MOST_CHATS = 20_000;
const MOST_MESSAGES = 20_000;
const LONGEST_TITLE = 300;

/** An identifier that nobody guesses; also where the page is not in a secure context. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(16))]
    .map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A conversation without a message. */
export function newChat(system = "", settings = {}) {
  const now = Date.now();
  return { id: newId(), title: "", named: false, created: now, updated: now, system, settings, messages: [] };
}

/** The first line of a text, cut between whole characters. */
export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  const letters = [...line];
  return letters.length > 60 ? `${letters.slice(0, 59).join("").trimEnd()}…` : line;
}

const headOf = ({ messages, ...head }) => ({ ...head, count: messages.length });

// --- where they are kept -----------------------------------------------------------------------

const promised = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

class DatabaseHistory {
  kept = true;
  #database;

  constructor(database) {
    this.#database = database;
    // Another tab may want to change the database: it goes first.
    database.onversionchange = () => database.close();
  }

  async #within(mode, work) {
    const transaction = this.#database.transaction(["heads", "messages"], mode);
    const finished = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onerror = () => reject(transaction.error);
      transaction.onabort = () => reject(transaction.error);
    });
    const result = work(transaction.objectStore("heads"), transaction.objectStore("messages"));
    await finished;
    return result;
  }

  heads() { return this.#within("readonly", (heads) => promised(heads.getAll())); }

  async read(id) {
    const [head, row] = await this.#within("readonly", (heads, messages) =>
      Promise.all([promised(heads.get(id)), promised(messages.get(id))]));
    if (!head || !row) return null;
    const { count, ...rest } = head;
    return { ...rest, messages: row.messages };
  }

  async write(...chats) {
    await this.#within("readwrite", (heads, messages) => {
      for (const chat of chats) {
        heads.put(headOf(chat));
        messages.put({ id: chat.id, messages: chat.messages });
      }
    });
  }

  async remove(id) {
    await this.#within("readwrite", (heads, messages) => { heads.delete(id); messages.delete(id); });
  }

  async clear() {
    await this.#within("readwrite", (heads, messages) => { heads.clear(); messages.clear(); });
  }

  async everyMessages() {
    return this.#within("readonly", (heads, messages) => promised(messages.getAll()));
  }
}

class MemoryHistory {
  kept = false;
  #chats = new Map();

  async heads() { return [...this.#chats.values()].map(headOf); }

  async read(id) { return structuredClone(this.#chats.get(id) ?? null); }

  async write(...chats) { chats.forEach((chat) => this.#chats.set(chat.id, structuredClone(chat))); }

  async remove(id) { this.#chats.delete(id); }

  async clear() { this.#chats.clear(); }

  async everyMessages() { return [...this.#chats.values()].map(({ id, messages }) => ({ id, messages })); }
}

/** Open the history; where the browser keeps nothing, one that lasts as long as the page. */
export async function openHistory() {
  try {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("heads", { keyPath: "id" });
      request.result.createObjectStore("messages", { keyPath: "id" });
    };
    const database = await promised(request);
    if (!["heads", "messages"].every((name) => database.objectStoreNames.contains(name))) {
      throw new Error("the database of that name is not ours");
    }
    return new DatabaseHistory(database);
  } catch {
    return new MemoryHistory();
  }
}

/** Conversations that hold a text, in any case: Map of id to the words around its first place. */
export async function searchHistory(history, text) {
  const wanted = text.normalize("NFC").toLowerCase();
  const results = new Map();
  for (const { id, messages } of await history.everyMessages()) {
    for (const { content } of messages) {
      const lower = content.normalize("NFC").toLowerCase();
      const at = lower.indexOf(wanted);
      if (at >= 0) {
        const from = Math.max(0, at - 24);
        const place = content.slice(from, at + wanted.length + 60).replace(/\s+/g, " ");
        results.set(id, (from ? "…" : "") + place);
        break;
      }
    }
  }
  return results;
}

// --- files -------------------------------------------------------------------------------------

/** Conversations as the text of a file. */
export function exportText(chats) {
  const plain = chats.map(({ title, named, created, updated, system, settings, messages }) =>
    ({ title, named, created, updated, system, settings, messages }));
  return `${JSON.stringify({ format: FORMAT, version: 1, chats: plain }, null, 1)}\n`;
}

/** Every conversation of a history, oldest first. */
export async function allChats(history) {
  const rows = new Map((await history.everyMessages()).map(({ id, messages }) => [id, messages]));
  return (await history.heads()).sort((a, b) => a.created - b.created)
    .map(({ count, ...head }) => ({ ...head, messages: rows.get(head.id) ?? [] }));
}

function expect(right, key, values) {
  if (!right) throw new Error(word(key, values));
}

const isText = (value) => typeof value === "string";
const isTime = (value) => Number.isFinite(value) && Math.abs(value) < 8e15;
const isPlain = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** What is known of an answer's making, without anything else that a file may hold. */
function checkedFacts(facts) {
  if (!isPlain(facts)) return undefined;
  const names = ["newTokens", "promptTokens", "firstTokenSeconds", "tokensPerSecond"];
  return Object.fromEntries(names.filter((name) => Number.isFinite(facts[name]) && facts[name] >= 0)
    .map((name) => [name, facts[name]]));
}

function checkedAnswer(message) {
  return {
    content: message.content,
    ending: isText(message.ending) ? message.ending.slice(0, 40) : "stop",
    facts: checkedFacts(message.facts),
  };
}

function checkedMessage(message, place) {
  expect(isPlain(message), "import_object", { place });
  expect(["user", "assistant"].includes(message.role), "import_role", { place });
  expect(isText(message.content), "import_text", { place: `${place}.content` });
  if (message.role === "user") return { role: "user", content: message.content };
  const answer = { role: "assistant", ...checkedAnswer(message) };
  if (isText(message.error)) answer.error = message.error.slice(0, 2000);
  if (Array.isArray(message.versions)) {
    answer.versions = message.versions.slice(0, 100).map((version, index) => {
      const content = `${place}.versions[${index}].content`;
      expect(isPlain(version) && isText(version.content), "import_text", { place: content });
      return checkedAnswer(version);
    });
    const { version } = message;
    answer.version = Number.isInteger(version) && version in answer.versions ? version : 0;
    if (!answer.versions.length) { delete answer.versions; delete answer.version; }
  }
  return answer;
}

/**
 * The conversations in the text of a file that exportText wrote. Every field is checked, unknown
 * ones are left out, and identifiers are new: a file can overwrite nothing.
 *
 * Throws an Error with one line that names the place.
 */
function importedChats(text) {
  expect(text.length <= MOST_BYTES, "import_large", { most: MOST_BYTES >> 20 });
  let file = null;
  try { file = JSON.parse(text); } catch { expect(false, "import_json"); }
  expect(isPlain(file) && file.format === FORMAT && Array.isArray(file.chats), "import_format");
  expect(file.version === 1, "import_version");
  expect(file.chats.length <= MOST_CHATS, "import_many", { place: "chats", most: MOST_CHATS });
  return file.chats.map((chat, number) => {
    const place = `chats[${number}]`;
    expect(isPlain(chat), "import_object", { place });
    for (const name of ["title", "system"]) {
      expect(isText(chat[name]), "import_text", { place: `${place}.${name}` });
    }
    for (const name of ["created", "updated"]) {
      expect(isTime(chat[name]), "import_time", { place: `${place}.${name}` });
    }
    const list = `${place}.messages`;
    expect(Array.isArray(chat.messages), "import_list", { place: list });
    expect(chat.messages.length <= MOST_MESSAGES, "import_many", { place: list, most: MOST_MESSAGES });
    return {
      id: newId(),
      title: chat.title.slice(0, LONGEST_TITLE),
      named: chat.named === true,
      created: chat.created,
      updated: chat.updated,
      system: chat.system,
      settings: checkedSettings(chat.settings, `${place}.settings`),
      messages: chat.messages.map((message, index) => checkedMessage(message, `${list}[${index}]`)),
    };
  });
}

/**
 * Put the conversations of a file into a history, those that are not there yet: a file may be
 * imported twice. Returns how many came and how many were there.
 */
export async function importInto(history, text) {
  const chats = importedChats(text);
  const print = ({ created, messages }) =>
    `${created} ${JSON.stringify(messages.map(({ role, content }) => [role, content]))}`;
  const prints = new Set((await allChats(history)).map(print));
  const fresh = chats.filter((chat) => !prints.has(print(chat)));
  await history.write(...fresh);
  return { count: fresh.length, known: chats.length - fresh.length };
}

/** Hand a text to the reader as a file. */
export function saveFile(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
