// Building blocks of the page. Nothing here or elsewhere parses HTML: every node comes from
// createElement and every text is set as text, so that no text can become markup.
import { word } from "./words.js";

/** An element with attributes, listeners (names that start with "on") and children. */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** An element with nodes in it, however many they are. */
export function filled(element, nodes) {
  nodes.forEach((node) => element.append(node));
  return element;
}

// Strokes on a grid of 20 by 20.
const STROKES = {
  check: ["M4 10.5 8.2 15 16 5.5"],
  close: ["M5 5 15 15", "M15 5 5 15"],
  continue: ["M4 4v12", "M8 5.5 15.5 10 8 14.5z"],
  copy: ["M7.5 7.5h9v9h-9z", "M12.5 4.5v-1h-9v9h1"],
  delete: ["M4 6h12", "M8 6V3.5h4V6", "M5.5 6l.8 10.5h7.4L14.5 6", "M8.5 9v4.5", "M11.5 9v4.5"],
  down: ["M10 3.5v12", "M5 10.5l5 5 5-5"],
  edit: ["M4 16l.8-3.6L13.4 3.8l2.8 2.8-8.6 8.6z", "M11.6 5.6l2.8 2.8"],
  export: ["M10 3v9", "M6.5 8.5 10 12l3.5-3.5", "M4 13v3.5h12V13"],
  next: ["M8 5l5 5-5 5"],
  previous: ["M12 5l-5 5 5 5"],
  regenerate: ["M15.8 8A6.2 6.2 0 1 0 16 12", "M16.3 3.8V8.2H11.9"],
};

/** A drawing that says nothing to a screen reader: its button has a label. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(space, "svg");
  drawing.setAttribute("viewBox", "0 0 20 20");
  drawing.setAttribute("aria-hidden", "true");
  drawing.setAttribute("class", "icon");
  for (const stroke of STROKES[name]) {
    const path = document.createElementNS(space, "path");
    path.setAttribute("d", stroke);
    drawing.append(path);
  }
  return drawing;
}

/** A button that shows an icon and is labelled with a word; it is found by its data-do. */
export function iconButton(name, key, onclick, values = {}) {
  const label = word(key, values);
  return make("button",
    { type: "button", class: "plain", "data-do": name, "aria-label": label, title: label, onclick },
    icon(name));
}

/** Show that a button did its work: a tick for a moment. */
export function tick(button) {
  const before = [...button.childNodes];
  const label = button.getAttribute("aria-label");
  const drawing = icon("check");
  button.replaceChildren(drawing, ...before.filter((node) => node.nodeType === Node.TEXT_NODE));
  button.classList.add("done");
  setTimeout(() => {
    button.replaceChildren(...before);
    button.classList.remove("done");
    if (label !== null) button.setAttribute("aria-label", label);
  }, 1400);
}

/** Put text on the clipboard, also where a page over plain http has no clipboard of its own. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return;
  } catch {
    // A page that is not from this machine and not over https; or the browser refused.
  }
  const before = document.activeElement;
  const field = make("textarea", { class: "unseen", "aria-hidden": "true", tabindex: "-1" });
  field.value = text;
  (document.querySelector("dialog[open]") ?? document.body).append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  before?.focus?.();
  if (!copied) throw new Error(word("copy_failed"));
}

/** Wait for a pause of some milliseconds between calls, then call. */
export function afterPause(milliseconds, call) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), milliseconds);
  };
}
