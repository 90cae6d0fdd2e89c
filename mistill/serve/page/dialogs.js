// What the page says and asks: in passing, to a screen reader, and in a dialog.
import { isComposing } from "./keyboard.js";
import { putWords, word } from "./words.js";

const TOAST = 8000;
const $ = (id) => document.getElementById(id);

let toastTimer = 0;

/** Say something in passing, and offer something to do about it for a while. */
export function say(text, action = "", onclick = null) {
  $("toast-text").textContent = text;
  $("toast-do").hidden = !onclick;
  $("toast-do").textContent = action;
  $("toast-do").onclick = () => { $("toast").hidden = true; onclick(); };
  $("toast").hidden = false;
  announce(`${text} ${action}`);
  clearTimeout(toastTimer);
  const hide = () => {
    // Not under the reader's hands.
    if ($("toast").matches(":hover, :focus-within")) toastTimer = setTimeout(hide, 1500);
    else $("toast").hidden = true;
  };
  toastTimer = setTimeout(hide, TOAST);
}

/** Speak to a screen reader only. */
export function announce(text) {
  $("announcer").textContent = text;
}

/** Ask for a line of text, or for a yes: the text, "" for a yes, null if the reader leaves. */
export function ask({
  title, about = "", label = "", value = "", type = "text", action, danger = false, check = () => "",
}) {
  const dialog = $("ask");
  const field = $("ask-field");
  $("ask-title").textContent = title;
  $("ask-about").textContent = about;
  $("ask-label").textContent = label;
  $("ask-label").hidden = !label;
  field.hidden = !label;
  field.type = type;
  field.value = value;
  field.setCustomValidity("");
  $("ask-do").textContent = action;
  $("ask-do").classList.toggle("danger", danger);
  putWords(dialog);
  dialog.showModal();
  if (label) field.select();
  return new Promise((resolve) => {
    let result = null;
    $("ask-form").onsubmit = (event) => {
      event.preventDefault();
      const fault = label ? check(field.value) : "";
      field.setCustomValidity(fault);
      if (fault) { field.reportValidity(); return; }
      result = field.value;
      dialog.close();
    };
    field.oninput = () => field.setCustomValidity("");
    field.onkeydown = (event) => {
      // The Enter and Escape of an input method belong to it.
      if (isComposing(event) && event.key === "Enter") event.preventDefault();
    };
    $("ask-cancel").onclick = () => dialog.close();
    dialog.onclose = () => { field.value = ""; resolve(result); };
  });
}
