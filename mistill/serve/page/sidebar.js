// The list of conversations beside the one that is shown: by day, searched by title and text.
import { afterPause, iconButton, make } from "./elements.js";
import { searchHistory } from "./history.js";
import { isComposing } from "./keyboard.js";
import { word } from "./words.js";

const DAY = 86_400_000;
const $ = (id) => document.getElementById(id);

/** Whether the list covers the conversation instead of standing beside it. */
export const narrow = () => matchMedia("(max-width: 860px)").matches;

/** Show or hide the list. */
export function showSidebar(open) {
  document.body.classList.toggle("with-sidebar", open);
  $("sidebar").inert = !open;
  $("shade").hidden = !(open && narrow());
  $("main").inert = open && narrow();
  $("open-sidebar").hidden = open && !narrow();
  $("open-sidebar").setAttribute("aria-expanded", String(open));
}

/** Show or hide the list, and follow with the focus. */
export function toggleSidebar() {
  const open = !document.body.classList.contains("with-sidebar");
  showSidebar(open);
  $(open ? "close-sidebar" : "open-sidebar").focus();
}

/** The heading under which a conversation stands. */
function dayOf(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "today";
  if (time >= today - DAY) return "yesterday";
  return time >= today - 7 * DAY ? "this_week" : "before";
}

/** A text with the places of another marked. */
function marked(text, wanted) {
  const at = wanted ? text.toLowerCase().indexOf(wanted.toLowerCase()) : -1;
  if (at < 0) return [text];
  const end = at + wanted.length;
  return [text.slice(0, at), make("mark", {}, text.slice(at, end)), text.slice(end)];
}

/** The list. actions: open(id, searched text), rename(id), remove(id), exportOne(id), close(). */
export class Sidebar {
  #list;
  #field;
  #status;
  #history;
  #actions;
  #current = "";
  #turn = 0;

  constructor(root, history, actions) {
    this.#list = root.querySelector("#chats");
    this.#field = root.querySelector("#search");
    this.#status = root.querySelector("#search-status");
    this.#history = history;
    this.#actions = actions;
    const search = afterPause(150, () => this.show());
    this.#field.addEventListener("input", search);
    this.#field.addEventListener("keydown", (event) => {
      if (isComposing(event)) {
        // Escape takes a syllable back; the browser would empty the whole field.
        if (event.key === "Escape") event.preventDefault();
        return;
      }
      if (event.key === "Escape" && this.#field.value) {
        event.stopPropagation();
        event.preventDefault();
        this.#field.value = "";
        this.show();
      } else if (event.key === "ArrowDown") {
        event.preventDefault();
        this.#list.querySelector("button")?.focus();
      }
    });
    this.#list.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const buttons = [...this.#list.querySelectorAll(".open")];
      const at = buttons.indexOf(document.activeElement.closest("li")?.querySelector(".open"));
      (buttons[at + step] ?? (step < 0 ? this.#field : buttons[at]))?.focus();
    });
  }

  focusSearch() {
    this.#field.focus();
    this.#field.select();
  }

  /** Show the list as it now is; current is the conversation on the page. */
  async show(current = this.#current) {
    this.#current = current;
    this.#turn += 1;
    const turn = this.#turn;
    const wanted = this.#field.value.trim();
    const heads = (await this.#history.heads()).sort((a, b) => b.updated - a.updated);
    const places = wanted ? await searchHistory(this.#history, wanted) : new Map();
    if (turn !== this.#turn) return;
    const lower = wanted.toLowerCase();
    const results = wanted
      ? heads.filter(({ id, title }) => places.has(id) || title.toLowerCase().includes(lower)) : heads;
    const focused = document.activeElement?.closest?.("#chats li")?.dataset.id;
    this.#list.replaceChildren(...this.#groups(results, wanted, places));
    if (focused) {
      const row = this.#list.querySelector(`li[data-id="${focused}"] .open`);
      (row ?? this.#list.querySelector(".open") ?? this.#field).focus();
    }
    this.#status.textContent = wanted ? word("results", { count: results.length }) : "";
    this.#status.hidden = !wanted;
  }

  #groups(heads, wanted, places) {
    const nodes = [];
    let day = "";
    let list = null;
    for (const head of heads) {
      if (dayOf(head.updated) !== day) {
        day = dayOf(head.updated);
        list = make("ul");
        nodes.push(make("h2", {}, word(day)), list);
      }
      list.append(this.#item(head, wanted, places.get(head.id)));
    }
    if (!heads.length) nodes.push(make("p", { class: "none" }, word(wanted ? "no_results" : "no_chats")));
    return nodes;
  }

  #item({ id, title }, wanted, place) {
    const name = title || word("untitled");
    const current = id === this.#current;
    const open = make("button", {
      type: "button", class: "open", "aria-current": current ? "page" : null,
      onclick: () => this.#actions.open(id, place ? wanted : ""),
    }, make("span", { class: "name", dir: "auto" }, ...marked(name, wanted)));
    if (place) open.append(make("span", { class: "place", dir: "auto" }, ...marked(place, wanted)));
    return make("li", { "data-id": id, class: current ? "current" : null }, open,
      make("span", { class: "buttons" },
        iconButton("edit", "rename_named", () => this.#actions.rename(id), { name }),
        iconButton("export", "export_named", () => this.#actions.exportOne(id), { name }),
        iconButton("delete", "delete_named", () => this.#actions.remove(id), { name })));
  }
}
