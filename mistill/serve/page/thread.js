// The messages of a conversation on the page.
import { copyText, iconButton, make, tick } from "./elements.js";
import { isComposing } from "./keyboard.js";
import { MarkdownView } from "./markdown.js";
import { number, word } from "./words.js";

const FIRST_SHOWN = 40;
const MORE_SHOWN = 100;
const NEAR_END = 60;
const LONG = 2400;

/** The speed of an answer in one line. */
export function factsLine({ newTokens, tokensPerSecond: rate, firstTokenSeconds: first }) {
  const parts = [];
  if (newTokens) parts.push(word(newTokens === 1 ? "one_token" : "tokens", { count: newTokens }));
  if (rate) parts.push(word("tokens_per_second", { speed: number(rate, rate < 10 ? 2 : 1) }));
  if (first !== undefined) parts.push(word("first_token", { seconds: number(first, 2) }));
  return parts.join(" · ");
}

/**
 * The list of messages. It shows the last ones of a long conversation at once, and earlier ones
 * when the reader comes to them, so that thousands of messages open as fast as ten.
 *
 * actions: regenerate(), goOn(), edit(index, text), remove(index), version(index, step), say(text),
 * scrolled(at the end), and name(): what the assistant is called. scroller is the element that scrolls.
 */
export class Thread {
  #list;
  #scroller;
  #actions;
  #chat = null;
  #busy = false;
  #from = 0;
  #rows = new Map();
  #frame = 0;
  #waiting = new Set();
  #following = true;
  #earlier;
  #editing = null;

  constructor(list, scroller, actions) {
    this.#list = list;
    this.#scroller = scroller;
    this.#actions = actions;
    this.#earlier = make("button",
      { type: "button", class: "quiet", id: "earlier", onclick: () => this.showEarlier() });
    list.before(this.#earlier);
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    new IntersectionObserver(([entry]) => {
      // Reached by scrolling: not while the page opens at its end.
      if (entry.isIntersecting && scroller.scrollTop < 400 && !this.#following) this.showEarlier();
    }, { root: scroller, rootMargin: "200px" }).observe(this.#earlier);
    // A notice or a phone's keyboard takes room, text is laid out late: the end stays in sight.
    const sizes = new ResizeObserver(() => { if (this.#following) this.toEnd(); });
    sizes.observe(list);
    sizes.observe(scroller);
  }

  /** Whether a message is being edited. */
  get editing() { return this.#editing !== null; }

  /** Show a conversation; busy says whether its last answer is being written. */
  open(chat, busy) {
    this.#chat = chat;
    this.#setBusy(busy);
    this.#editing = null;
    this.#from = Math.max(0, chat.messages.length - FIRST_SHOWN);
    this.#list.replaceChildren();
    this.#rows.clear();
    this.#fill(this.#from, chat.messages.length, null);
    this.#showEarlierButton();
    this.toEnd();
  }

  /** Show the messages from an index on anew, after some were changed, added or removed. */
  refresh(index, busy) {
    this.#setBusy(busy);
    const { messages } = this.#chat;
    this.#from = Math.min(this.#from, Math.max(0, messages.length - 1));
    const first = Math.max(Math.min(index, messages.length), this.#from);
    for (const [at, row] of [...this.#rows]) {
      if (at >= first) { row.element.remove(); this.#rows.delete(at); }
    }
    if (this.#editing >= first) this.#editing = null;
    this.#fill(first, messages.length, null);
    // What can be done with the answers before depends on which one is last.
    for (let at = Math.max(this.#from, first - 2); at < first; at += 1) this.#footer(at);
    this.#showEarlierButton();
  }

  /** Call the assistant by its name, where that has become known. */
  showName() {
    const name = this.#actions.name();
    for (const label of this.#list.querySelectorAll(".theirs .who")) label.textContent = name;
  }

  /** Text was added to the last message: it is shown with the next frame. */
  grow() {
    this.#waiting.add(this.#chat.messages.length - 1);
    if (this.#frame) return;
    const flush = () => {
      this.#frame = 0;
      this.#waiting.forEach((at) => this.#text(at));
      this.#waiting.clear();
      if (this.#following) this.toEnd();
    };
    // A page that is not seen has no frames.
    this.#frame = document.hidden ? setTimeout(flush, 250) : requestAnimationFrame(flush);
  }

  /** The last answer has ended: show all of it, and what can be done with it. */
  finish() {
    const at = this.#chat.messages.length - 1;
    this.#setBusy(false);
    this.#text(at);
    this.#footer(at);
    this.#footer(at - 1);
    if (this.#following) this.toEnd();
  }

  /** Show a line beside the answer that is being written. */
  progress(text) {
    const row = this.#rows.get(this.#chat.messages.length - 1);
    const facts = row?.element.querySelector(".facts");
    if (facts) facts.textContent = text;
  }

  showEarlier(count = MORE_SHOWN) {
    if (this.#from === 0) return;
    const to = this.#from;
    const hadFocus = document.activeElement === this.#earlier;
    const height = this.#scroller.scrollHeight;
    const top = this.#scroller.scrollTop;
    this.#from = Math.max(0, to - count);
    this.#fill(this.#from, to, this.#list.firstChild);
    this.#showEarlierButton();
    this.#scroller.scrollTop = top + this.#scroller.scrollHeight - height;
    if (hadFocus) this.#rows.get(to - 1)?.element.querySelector("button")?.focus({ preventScroll: true });
  }

  /** Bring the first message that holds a text into sight. */
  goToText(text) {
    const wanted = text.normalize("NFC").toLowerCase();
    const at = this.#chat.messages.findIndex(({ content }) =>
      content.normalize("NFC").toLowerCase().includes(wanted));
    if (at < 0) return;
    this.showEarlier(this.#from - at + 5);
    const { element } = this.#rows.get(at);
    this.#following = false;
    element.scrollIntoView({ block: "center" });
    element.classList.add("hit");
    setTimeout(() => element.classList.remove("hit"), 2500);
  }

  toEnd() {
    this.#following = true;
    this.#scroller.scrollTop = this.#chat?.messages.length ? this.#scroller.scrollHeight : 0;
  }

  /** Edit the last message of the reader's. */
  editLast() {
    const at = this.#chat.messages.findLastIndex(({ role }) => role === "user");
    if (at >= 0 && !this.#busy) this.#edit(at);
  }

  /** The text of an answer as it is shown, for a screen reader. */
  shownText(at) {
    return this.#rows.get(at)?.body.innerText ?? "";
  }

  // --- one message -------------------------------------------------------------------------------

  /** While an answer is written, nothing before it can be changed: page.css hides those buttons. */
  #setBusy(busy) {
    this.#busy = busy;
    this.#list.classList.toggle("busy", busy);
  }

  #fill(from, to, place) {
    const rows = document.createDocumentFragment();
    for (let at = from; at < to; at += 1) rows.append(this.#row(at));
    this.#list.insertBefore(rows, place);
    for (let at = from; at < to; at += 1) this.#footer(at);
  }

  #row(at) {
    const message = this.#chat.messages[at];
    const mine = message.role === "user";
    const body = make("div", { class: mine ? "text plain-text" : "text", dir: "auto" });
    const element = make("li", { class: `message ${mine ? "mine" : "theirs"}` },
      make("article", {},
        make("h2", { class: "who" }, mine ? word("you") : this.#actions.name()),
        body,
        make("footer", { class: "foot" })));
    this.#rows.set(at, { element, body, view: mine ? null : new MarkdownView(body) });
    this.#text(at);
    return element;
  }

  #text(at) {
    const row = this.#rows.get(at);
    const message = this.#chat.messages[at];
    if (!row || !message) return;
    if (row.view) row.view.update(message.content);
    else this.#plainText(row.body, message.content);
  }

  /** What the reader wrote stays as written; a long paste is folded. */
  #plainText(body, text) {
    if (text.length <= LONG) { body.replaceChildren(text); return; }
    body.classList.add("folded");
    const rest = make("button", {
      type: "button", class: "quiet", "aria-expanded": "false", onclick: () => {
        const folded = body.classList.toggle("folded");
        whole.textContent = folded ? text.slice(0, LONG) : text;
        rest.textContent = folded ? word("show_all", { count: text.length }) : word("show_less");
        rest.setAttribute("aria-expanded", String(!folded));
      },
    }, word("show_all", { count: text.length }));
    const whole = make("div", { class: "fold" }, text.slice(0, LONG));
    body.replaceChildren(whole, rest);
  }

  #footer(at) {
    const row = this.#rows.get(at);
    const message = this.#chat.messages[at];
    const foot = row?.element.querySelector(":scope > article > .foot");
    if (!foot) return;
    const last = at === this.#chat.messages.length - 1;
    const writing = last && this.#busy && message.role === "assistant";
    row.element.classList.toggle("last", last);
    row.element.classList.toggle("writing", writing);
    row.element.setAttribute("aria-busy", String(writing));
    foot.replaceChildren();
    if (writing) {
      foot.append(make("span", { class: "facts" }, word("reading")));
      return;
    }
    if (message.error) foot.append(make("p", { class: "error" }, message.error));
    const { facts, ending } = message;
    const notes = [];
    if (ending === "length") notes.push(word("ended_length"));
    if (ending === "stopped") notes.push(word("ended_stopped"));
    if (ending === "cut" && !message.error) notes.push(word("ended_cut"));
    if (facts) notes.push(factsLine(facts));
    const buttons = make("span", { class: "buttons" });
    const add = (name, key, action, values) => buttons.append(iconButton(name, key, action, values));
    add("copy", message.role === "user" ? "copy_message" : "copy_answer", async (event) => {
      const button = event.currentTarget;
      try {
        await copyText(message.content);
        tick(button);
      } catch (error) {
        this.#actions.say(error.message);
      }
    });
    if (message.role === "user") {
      add("edit", "edit_message", () => this.#edit(at));
      add("delete", "delete_exchange", () => this.#actions.remove(at));
      if (last && !this.#busy) {
        foot.append(make("button", { type: "button", class: "quiet", "data-do": "answer",
          onclick: () => this.#actions.regenerate() }, word("write_answer")));
      }
    } else if (last && !this.#busy) {
      const { versions, version } = message;
      if (versions?.length > 1) {
        foot.append(make("span", { class: "versions", role: "group", "aria-label": word("versions") },
          iconButton("previous", "version_before", () => this.#actions.version(at, -1)),
          make("span", {}, `${number(version + 1)} / ${number(versions.length)}`),
          iconButton("next", "version_after", () => this.#actions.version(at, 1))));
        foot.querySelector("[data-do=previous]").disabled = version === 0;
        foot.querySelector("[data-do=next]").disabled = version === versions.length - 1;
      }
      add("regenerate", "regenerate", () => this.#actions.regenerate());
      if (message.content && ending !== "stop") add("continue", "continue", () => this.#actions.goOn());
      add("delete", "delete_answer", () => this.#actions.remove(at));
    }
    if (notes.length) foot.append(make("span", { class: "facts" }, notes.join(" · ")));
    foot.append(buttons);
  }

  // --- editing -----------------------------------------------------------------------------------

  #edit(at) {
    if (this.#editing !== null) return;
    this.#editing = at;
    const { element, body } = this.#rows.get(at);
    const message = this.#chat.messages[at];
    const field = make("textarea", { class: "grows", rows: "2", dir: "auto", "aria-label": word("edit_message") });
    field.value = message.content;
    const end = () => {
      this.#editing = null;
      form.remove();
      element.classList.remove("edited");
    };
    const cancel = () => { end(); element.querySelector("[data-do=edit]")?.focus(); };
    const save = () => {
      if (!field.value.trim()) { field.focus(); return; }
      // The row goes with its form where the message is sent; otherwise nothing is lost.
      this.#actions.edit(at, field.value);
    };
    const form = make("form", { class: "editor", onsubmit: (event) => { event.preventDefault(); save(); } },
      field,
      make("div", { class: "row" },
        make("button", { type: "button", class: "quiet", onclick: cancel }, word("cancel")),
        make("button", { type: "submit", class: "main" }, word("save_and_send"))));
    field.addEventListener("keydown", (event) => {
      if (isComposing(event)) return;
      if (event.key === "Escape") { event.stopPropagation(); cancel(); }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); save(); }
    });
    element.classList.add("edited");
    body.after(form);
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  // --- scrolling ---------------------------------------------------------------------------------

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.#scroller;
    this.#following = scrollHeight - scrollTop - clientHeight < NEAR_END;
    this.#actions.scrolled?.(this.#following);
  }

  #showEarlierButton() {
    this.#earlier.hidden = this.#from === 0;
    this.#earlier.textContent = word("earlier", { count: this.#from });
  }
}
