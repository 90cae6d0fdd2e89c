// Which model the server offers, or what stands in the way: no server, or no key.
import { ApiError, isAwake, isKey, listModels, useKey } from "./api.js";
import { ask } from "./dialogs.js";
import { word } from "./words.js";

const LOOK_EVERY = 3000;
const $ = (id) => document.getElementById(id);
let model = null;
let state = "waiting";
let looking = 0;
let whenConnected = () => {};

/** The model that is served, {id, context}; null while none can be reached. */
export const currentModel = () => model;

/** Call this whenever a model has been reached; byKey says whether the reader just gave a key. */
export function onConnected(call) { whenConnected = call; }

/** Show the state of the connection, in the words of the reader's language. */
export function showConnection(changed = state) {
  state = changed;
  $("model").dataset.state = state;
  const text = { ready: model?.id, offline: word("no_server"), key: word("no_key"), waiting: "…" }[state];
  $("model-name").textContent = text;
  $("model").title = text;
  const context = model?.context;
  $("welcome-over").textContent = context ? word("model_context", { name: model.id, count: context }) : text;
}

/** Show what is wrong above the composer, with a way out; null takes it away. */
function notice(text, action = "", onclick = null) {
  $("notice").hidden = text === null;
  $("notice-text").textContent = text ?? "";
  $("notice-do").textContent = action;
  $("notice-do").onclick = onclick;
}

/** Find out which model is served, or what stands in the way. */
export async function connect(byKey = false) {
  clearTimeout(looking);
  try {
    const [first] = await listModels();
    if (!first) throw new ApiError("broken", word("no_model"));
    model = first;
    showConnection("ready");
    notice(null);
    whenConnected(byKey === true);
  } catch (error) {
    model = null;
    showTrouble(error);
  }
}

/** Show an error that concerns the server as a whole and not one answer alone. */
export function showTrouble(error) {
  if (error.kind === "key") {
    model = null;
    showConnection("key");
    notice(error.message, word("enter_key"), askForKey);
  } else if (error.kind === "offline" || model === null) {
    model = null;
    showConnection("offline");
    notice(error.message, word("try_again"), connect);
    look();
  }
}

/** While the server does not answer, look now and then whether it is back. */
function look() {
  clearTimeout(looking);
  looking = setTimeout(async () => {
    if (!document.hidden && await isAwake()) await connect();
    else if (model === null) look();
  }, LOOK_EVERY);
}

/** Ask the reader for the API key, and use it. */
export async function askForKey() {
  const key = await ask({
    title: word("key_title"), about: word("key_about"), label: word("key_label"), type: "password",
    action: word("key_use"), check: (text) => (isKey(text.trim()) ? "" : word("key_strange")),
  });
  if (key === null) return;
  useKey(key.trim());
  await connect(true);
}
