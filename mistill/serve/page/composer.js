// The field in which messages are written: keys, input methods, drafts, dropped text files.
import { afterPause } from "./elements.js";
import { isComposing } from "./keyboard.js";
import { enterSends } from "./settings.js";
import { word } from "./words.js";

const DRAFTS = "mistill-drafts";
const MOST_DRAFTS = 50;
const LARGEST_FILE = 1 << 20;

/** What was typed and not sent, by conversation; it outlives the page where the browser allows. */
class Drafts {
  #texts = new Map();

  constructor() {
    try {
      const kept = JSON.parse(localStorage.getItem(DRAFTS)) ?? [];
      this.#texts = new Map(kept.filter((pair) => pair.every((part) => typeof part === "string")));
    } catch {
      // No storage, or not ours: no drafts.
    }
  }

  get(id) { return this.#texts.get(id) ?? ""; }

  set(id, text) {
    this.#texts.delete(id);
    if (text) this.#texts.set(id, text);
    while (this.#texts.size > MOST_DRAFTS) this.#texts.delete(this.#texts.keys().next().value);
    try { localStorage.setItem(DRAFTS, JSON.stringify([...this.#texts])); } catch { /* no storage, or full */ }
  }
}

/** Let a field grow with its text where CSS alone does not do so yet. */
function growing(field) {
  if (CSS.supports("field-sizing", "content")) return () => {};
  return () => {
    field.style.height = "auto";
    field.style.height = `${field.scrollHeight + 2}px`;
  };
}

/** The composer of the page. actions: send(text), stop(), say(text). */
export class Composer {
  #form;
  #field;
  #actions;
  #drafts = new Drafts();
  #id = "";
  #busy = false;
  #composing = false;
  #sendAfter = false;
  #grow;
  #keep = afterPause(300, () => this.keepDraft());

  constructor(form, actions) {
    this.#form = form;
    this.#field = form.querySelector("textarea");
    this.#actions = actions;
    this.#grow = growing(this.#field);
    const field = this.#field;
    field.addEventListener("compositionstart", () => { this.#composing = true; });
    field.addEventListener("compositionend", () => {
      this.#composing = false;
      // The last syllable enters the field with this event: what waited for it goes on after it.
      if (this.#sendAfter) setTimeout(() => this.#send());
      this.#sendAfter = false;
    });
    field.addEventListener("input", () => { this.#grow(); this.#show(); this.#keep(); });
    field.addEventListener("keydown", (event) => this.#pressed(event));
    field.addEventListener("paste", (event) => {
      // What is copied from a table is text and a picture of it: the text counts.
      if (!event.clipboardData.types.includes("text/plain")) this.#dropped(event, event.clipboardData);
    });
    // Anywhere on the page: a browser would leave the page for a file that misses the field.
    document.addEventListener("dragover", (event) => {
      if (event.dataTransfer.types.includes("Files")) event.preventDefault();
    });
    document.addEventListener("drop", (event) => this.#dropped(event, event.dataTransfer));
    form.addEventListener("submit", (event) => { event.preventDefault(); this.#send(); });
    form.querySelector("#stop").addEventListener("click", () => this.#actions.stop());
    addEventListener("pagehide", () => this.keepDraft());
  }

  /** Turn to a conversation and show what was typed there. */
  turnTo(id) {
    if (id !== this.#id) {
      this.keepDraft();
      this.#id = id;
      this.#field.value = this.#drafts.get(id);
    }
    this.#grow();
    this.#show();
  }

  /** Keep what is typed as the draft of this conversation. */
  keepDraft() {
    if (this.#id) this.#drafts.set(this.#id, this.#field.value);
  }

  /** Whether an answer is being written: then there is Stop in the place of Send. */
  showBusy(busy) {
    const had = this.#form.contains(document.activeElement) && document.activeElement !== this.#field;
    this.#busy = busy;
    this.#show();
    if (had) this.focus();
  }

  focus() { this.#field.focus(); }

  /** Say what Enter does, as it is set. */
  showHint() {
    this.#form.querySelector("#hint").textContent = word(enterSends() ? "hint_enter_sends" : "hint_enter_breaks");
    this.#field.enterKeyHint = enterSends() ? "send" : "enter";
  }

  #show() {
    this.#form.querySelector("#send").hidden = this.#busy;
    this.#form.querySelector("#stop").hidden = !this.#busy;
    this.#form.querySelector("#send").disabled = !this.#field.value.trim();
  }

  #pressed(event) {
    if (isComposing(event) || event.key !== "Enter") return;
    const always = event.ctrlKey || event.metaKey;
    if (always || (enterSends() && !event.shiftKey && !event.altKey)) {
      event.preventDefault();
      this.#send();
    }
  }

  #send() {
    if (this.#composing) {
      // A click on Send in the middle of a syllable: take leave of the field, and send when it is whole.
      this.#sendAfter = true;
      this.#field.blur();
      this.#field.focus();
      return;
    }
    const text = this.#field.value;
    if (this.#busy || !text.trim()) return;
    if (!this.#actions.send(text)) return;
    this.#field.value = "";
    this.keepDraft();
    this.#grow();
    this.#show();
  }

  /** Text files become text in the field; other files are refused in words. */
  async #dropped(event, data) {
    const files = [...(data?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    for (const file of files) {
      try {
        if (file.size > LARGEST_FILE) throw new Error(word("file_large"));
        const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
        if (text.includes("\0")) throw new Error(word("file_not_text"));
        const field = this.#field;
        field.setRangeText(text, field.selectionStart, field.selectionEnd, "end");
        field.dispatchEvent(new Event("input"));
      } catch (error) {
        this.#actions.say(error instanceof TypeError ? word("file_not_text") : error.message);
      }
    }
  }
}
