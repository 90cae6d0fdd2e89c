// A page to chat in: what the reader does, and what becomes of it. One conversation is shown;
// others may be answered meanwhile.
import { another, blank, writeAnswer } from "./answering.js";
import { ApiError, keyFromAddress } from "./api.js";
import { Composer } from "./composer.js";
import { askForKey, connect, currentModel, onConnected, showConnection, showTrouble } from "./connection.js";
import { announce, ask, say } from "./dialogs.js";
import { afterPause, copyText, make } from "./elements.js";
import { allChats, exportText, importInto, newChat, openHistory, saveFile, titleOf } from "./history.js";
import { SHORTCUTS, actionOf, isComposing, keyName } from "./keyboard.js";
import { loadPreferences, savePreferences, settingsDialog, showTheme } from "./settings.js";
import { Sidebar, narrow, showSidebar, toggleSidebar } from "./sidebar.js";
import { Thread, factsLine } from "./thread.js";
import { browserLanguage, loadWords, putWords, speak, word } from "./words.js";

const SAVE_EVERY = 2000;
const OPEN = "mistill-open";
const $ = (id) => document.getElementById(id);

keyFromAddress();
let store = null;
let chat = null;
let thread = null;
let sidebar = null;
let composer = null;
let settings = null;
let preferences = loadPreferences();
// Conversations that are being answered: id -> {chat, controller}.
const running = new Map();
const otherTabs = "BroadcastChannel" in window ? new BroadcastChannel("mistill-chats") : null;
showTheme();

// --- conversations -----------------------------------------------------------------------------

const busy = () => running.has(chat.id);
// Conversations that were deleted: an answer that was being written does not bring them back.
const deleted = new Set();
let opening = "";
let lastFault = "";

/** Keep a conversation; a browser that cannot is said once. */
async function keep(one) {
  try {
    if (deleted.has(one.id)) return;
    if (one.messages.length) await store.write(one);
    else await store.remove(one.id);
    otherTabs?.postMessage(one.id);
  } catch (error) {
    const fault = word("not_kept", { reason: String(error?.message ?? error) });
    if (fault !== lastFault) say(fault);
    lastFault = fault;
  }
}

const keepSoon = afterPause(300, keep);

function showTitle() {
  const title = chat.title || word("new_chat");
  $("rename").textContent = title;
  $("rename").disabled = !chat.messages.length;
  $("rename").title = chat.messages.length ? word("rename") : "";
  document.title = chat.title ? `${chat.title} - mistill` : "mistill";
}

function showChat() {
  try { sessionStorage.setItem(OPEN, chat.id); } catch { /* no storage */ }
  thread.open(chat, busy());
  composer.turnTo(chat.id);
  showState();
}

/** Show all that depends on the conversation and on whether it is being answered. */
function showState() {
  showTitle();
  composer.showBusy(busy());
  $("welcome").hidden = chat.messages.length > 0;
  $("messages").hidden = chat.messages.length === 0;
}

/** A conversation as it now is: on the page, being answered, or kept; null if there is none. */
async function chatOf(id) {
  return chat.id === id ? chat : running.get(id)?.chat ?? await store.read(id);
}

/** Leave the conversation for another; one that is being answered goes on being so. */
async function openChat(id, text = "") {
  opening = id;
  const other = await chatOf(id);
  if (!other) { sidebar.show(); return; }
  // The reader has meanwhile turned to another one.
  if (opening !== id) return;
  chat = other;
  showChat();
  sidebar.show(chat.id);
  if (text) thread.goToText(text);
  if (narrow()) showSidebar(false);
  else if (!text) composer.focus();
}

function startChat() {
  opening = "";
  chat = newChat(preferences.system, preferences.settings);
  showChat();
  sidebar.show(chat.id);
  if (narrow()) showSidebar(false);
  composer.focus();
}

async function renameChat(id) {
  const other = await chatOf(id);
  if (!other) return;
  const title = await ask({
    title: word("rename"), label: word("title"), value: other.title, action: word("save"),
    check: (text) => (text.trim() ? "" : word("title_empty")),
  });
  if (title === null) return;
  other.title = title.trim().slice(0, 300);
  other.named = true;
  await keep(other);
  if (other === chat) showTitle();
  sidebar.show();
}

async function deleteChat(id) {
  const gone = await chatOf(id);
  if (!gone?.messages.length) return;
  deleted.add(id);
  stop(id);
  await store.remove(id);
  otherTabs?.postMessage(null);
  if (chat.id === id) startChat();
  else sidebar.show();
  say(word("deleted", { name: gone.title }), word("undo"), async () => {
    deleted.delete(id);
    await keep(gone);
    await openChat(id);
  });
}

async function exportOne(id) {
  saveFile(`mistill-${id.slice(0, 8)}.json`, exportText([await chatOf(id)]));
}

async function exportAll() {
  const day = new Date().toISOString().slice(0, 10);
  saveFile(`mistill-chats-${day}.json`, exportText(await allChats(store)));
}

async function importFile(file) {
  try {
    const counts = await importInto(store, await file.text());
    otherTabs?.postMessage(null);
    await sidebar.show();
    $("import-result").textContent = word("imported", counts);
  } catch (error) {
    $("import-result").textContent = word("import_failed", { reason: error.message });
  }
}

async function deleteAll() {
  const count = (await store.heads()).length;
  const yes = await ask({
    title: word("delete_all"), about: word("delete_all_about", { count }),
    action: word("delete_all"), danger: true,
  });
  if (yes === null) return;
  (await store.heads()).forEach(({ id }) => deleted.add(id));
  for (const id of running.keys()) { deleted.add(id); stop(id); }
  await store.clear();
  otherTabs?.postMessage(null);
  startChat();
}

// --- answers -----------------------------------------------------------------------------------

const assistant = () => currentModel()?.id ?? word("assistant");

function stop(id = chat.id) {
  running.get(id)?.controller.abort();
}

/** Whether an answer can be written now; if not, the reason is looked for. */
function ready() {
  if (!busy() && !currentModel()) connect();
  return !busy() && currentModel() !== null;
}

/** Send a message; whether it could be. */
function send(text) {
  if (!ready()) return false;
  const first = chat.messages.length;
  chat.messages.push({ role: "user", content: text }, blank());
  if (!chat.title) chat.title = titleOf(text);
  answer(first);
  return true;
}

/** Write the last answer anew; the ones before stay within reach. */
function regenerate() {
  if (!ready()) return;
  const { messages } = chat;
  messages.push(messages.at(-1).role === "assistant" ? another(messages.pop()) : blank());
  answer(messages.length - 1);
}

function goOn() {
  if (ready()) answer(chat.messages.length - 1, true);
}

/** Where the button is gone that had the focus, go on in the field; a phone would show its keys. */
function keepFocus() {
  if (document.activeElement === document.body && !narrow()) composer.focus();
}

/** Let the model write the last message, which stands there empty or is to be gone on with. */
async function answer(firstChanged, continued = false) {
  const mine = chat;
  const { messages } = mine;
  const message = messages.at(-1);
  const controller = new AbortController();
  running.set(mine.id, { chat: mine, controller });
  const shown = () => chat === mine && mine.messages === messages;
  let saved = performance.now();
  const written = writeAnswer(mine, message, {
    model: currentModel().id, continued, signal: controller.signal,
    onText(facts) {
      if (shown()) { thread.grow(); thread.progress(factsLine(facts)); }
      if (performance.now() - saved > SAVE_EVERY) { saved = performance.now(); keep(mine); }
    },
  });
  mine.updated = Date.now();
  thread.refresh(firstChanged, true);
  showState();
  thread.toEnd();
  keepFocus();
  announce(word("writing"));
  keep(mine).then(() => sidebar.show());
  const error = await written;
  running.delete(mine.id);
  if (error instanceof ApiError) showTrouble(error);
  else if (error) console.error(error);
  // An answer that broke off may be the last of the server.
  if (error?.kind === "broken") connect();
  mine.updated = Date.now();
  await finish(mine, message, shown());
}

/** Keep an answer that has ended, show it, and say so. */
async function finish(mine, message, shown) {
  if (chat === mine) {
    if (shown) thread.finish();
    else thread.refresh(0, false);
    showState();
    if (shown) announce(message.error ?? `${assistant()}: ${thread.shownText(mine.messages.length - 1)}`);
    await keep(mine);
  } else if (!deleted.has(mine.id)) {
    await keep(mine);
    say(word("answered", { name: mine.title }), word("show"), () => openChat(mine.id));
  }
  sidebar.show();
}

function showVersion(index, step) {
  const message = chat.messages[index];
  const version = message.version + step;
  if (busy() || !(version in message.versions)) return;
  delete message.error;
  Object.assign(message, message.versions[version], { version });
  thread.refresh(index, false);
  keep(chat);
  const order = step < 0 ? ["previous", "next"] : ["next", "previous"];
  order.map((name) => document.querySelector(`.versions [data-do=${name}]:enabled`)).find(Boolean).focus();
}

/** Send a message in other words; what came after it goes, and can come back. */
function editMessage(index, text) {
  if (busy()) say(word("still_writing"));
  if (!ready()) return;
  const mine = chat;
  const before = structuredClone(mine.messages);
  mine.messages.length = index;
  if (!mine.named && index === 0) mine.title = titleOf(text);
  send(text);
  if (before.length > index + 2) {
    say(word("edited", { count: before.length - index - 1 }), word("undo"), () => restore(mine, before));
  }
}

/** Delete a question with its answer, or the last answer alone. */
function deleteMessage(index) {
  if (busy()) return;
  const mine = chat;
  const before = structuredClone(mine.messages);
  const pair = mine.messages[index].role === "user" && mine.messages[index + 1]?.role === "assistant";
  mine.messages.splice(index, pair ? 2 : 1);
  changed(mine);
  say(word(pair ? "exchange_deleted" : "message_deleted"), word("undo"), () => restore(mine, before));
}

/** Put messages back that were there before. */
async function restore(mine, messages) {
  stop(mine.id);
  mine.messages = messages;
  if (chat !== mine) { await keep(mine); await openChat(mine.id); return; }
  changed(mine);
}

/** Show and keep a conversation of which messages went or came back. */
function changed(mine) {
  mine.updated = Date.now();
  thread.open(mine, false);
  showState();
  keepFocus();
  keep(mine).then(() => sidebar.show());
}

// --- the page ----------------------------------------------------------------------------------

function openSettings() {
  $("where-kept").textContent = word(store.kept ? "kept_here" : "kept_not");
  settings.open(chat);
}

async function copyLast() {
  const last = chat.messages.findLast(({ role }) => role === "assistant");
  if (!last) return;
  try { await copyText(last.content); say(word("copied")); } catch (error) { say(error.message); }
}

const ACTIONS = {
  newChat: startChat,
  search: () => { showSidebar(true); sidebar.focusSearch(); },
  toggleSidebar,
  editLast: () => thread.editLast(),
  copyLast,
  deleteChat: () => deleteChat(chat.id),
  openSettings,
  openShortcuts: () => $("shortcuts").showModal(),
};

function pressed(event) {
  if (isComposing(event) || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (narrow() && document.body.classList.contains("with-sidebar")) toggleSidebar();
    else if (busy()) stop();
    return;
  }
  const action = actionOf(event);
  if (!action) return;
  event.preventDefault();
  ACTIONS[action]();
}

/** Fill what is written in the reader's language and changes with it. */
function showWords() {
  speak(preferences.language === "auto" ? browserLanguage() : preferences.language);
  $("starters").replaceChildren(...["1", "2", "3", "4"].map((number) => make("button",
    { type: "button", class: "card", onclick: () => send(word(`starter_${number}`)) },
    make("span", { class: "title" }, word(`starter_title_${number}`)),
    make("span", {}, word(`starter_${number}`)))));
  $("shortcut-list").replaceChildren(...SHORTCUTS.flatMap(({ keys, does }) => [
    make("dt", {}, ...keys.map((key) => make("kbd", {}, keyName(key)))), make("dd", {}, word(does))]));
  composer.showHint();
}

function connectParts() {
  thread = new Thread($("messages"), $("scroller"), {
    regenerate, goOn, edit: editMessage, remove: deleteMessage, version: showVersion, say,
    name: assistant,
    scrolled: (atEnd) => { $("to-end").hidden = atEnd; },
  });
  composer = new Composer($("composer"), { send, stop: () => stop(), say });
  sidebar = new Sidebar($("sidebar"), store, {
    open: openChat, rename: renameChat, remove: deleteChat, exportOne,
  });
  settings = settingsDialog($("settings"), {
    onSampling(system, values) {
      Object.assign(chat, { system, settings: values });
      preferences = savePreferences({ system, settings: values });
      keepSoon(chat);
    },
    onPage(changes) {
      preferences = changes;
      showTheme();
      showWords();
      putWords(document);
      $("where-kept").textContent = word(store.kept ? "kept_here" : "kept_not");
      thread.open(chat, busy());
      showConnection();
      showState();
      sidebar.show();
    },
  });

  const clicks = {
    "new-chat": startChat, rename: () => renameChat(chat.id), "to-end": () => thread.toEnd(),
    "open-sidebar": toggleSidebar, "close-sidebar": toggleSidebar, shade: toggleSidebar,
    "open-settings": openSettings, "top-settings": openSettings, "open-shortcuts": ACTIONS.openShortcuts,
    "export-all": exportAll, import: () => $("import-file").click(), "delete-all": deleteAll,
    "change-key": askForKey,
  };
  for (const [id, onclick] of Object.entries(clicks)) $(id).addEventListener("click", () => onclick());
  $("import-file").addEventListener("change", ({ target }) => {
    if (target.files[0]) importFile(target.files[0]);
    target.value = "";
  });
  for (const button of document.querySelectorAll("dialog .close")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  document.addEventListener("keydown", pressed);
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && !currentModel()) connect();
  });
  addEventListener("hashchange", () => { if (keyFromAddress()) connect(); });
  matchMedia("(max-width: 860px)").addEventListener("change", () => showSidebar(!narrow()));
  otherTabs?.addEventListener("message", async ({ data: id }) => {
    sidebar.show();
    if (id !== chat.id || busy() || thread.editing) return;
    const fresh = await store.read(id);
    if (fresh && fresh.id === chat.id && !busy()) { chat = fresh; showChat(); }
  });
}

async function start() {
  const words = loadWords();
  store = await openHistory();
  await words;
  connectParts();
  showWords();
  putWords(document);
  showConnection("waiting");
  onConnected((byKey) => { thread.showName(); if (byKey) composer.focus(); });
  showSidebar(!narrow());
  let open = null;
  try { open = sessionStorage.getItem(OPEN); } catch { /* no storage */ }
  chat = (open && await store.read(open)) || newChat(preferences.system, preferences.settings);
  showChat();
  document.body.classList.remove("loading");
  if (!store.kept) say(word("kept_not"));
  sidebar.show(chat.id);
  await connect();
  if (!narrow()) composer.focus();
}

start().catch((error) => {
  document.body.classList.remove("loading");
  const text = `The page could not start: ${error.message}. Reload it.`;
  document.body.replaceChildren(make("p", { class: "alone" }, text));
});
