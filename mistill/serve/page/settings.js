// How answers are sampled, and how the page behaves: what may be set, and the dialog for it.
import { make } from "./elements.js";
import { putWords, word } from "./words.js";

const STORE = "mistill-page";

// An empty field is not sent: the chatbot's own default holds.
export const SAMPLING = [
  { name: "temperature", least: 0, most: 2, step: 0.1 },
  { name: "top_p", least: 0.01, most: 1, step: 0.01 },
  { name: "top_k", least: 0, most: 1_000_000, whole: true },
  { name: "min_p", least: 0, most: 1, step: 0.05 },
  { name: "repetition_penalty", least: 0.01, most: 10, step: 0.01 },
  { name: "dry_multiplier", least: 0, most: 100, step: 0.1 },
  { name: "dry_allowed_length", least: 1, most: 1_000_000, whole: true },
  { name: "presence_penalty", least: -2, most: 2, step: 0.1 },
  { name: "frequency_penalty", least: -2, most: 2, step: 0.1 },
  { name: "max_tokens", least: 1, most: 1_000_000, whole: true },
  { name: "seed", least: 0, most: Number.MAX_SAFE_INTEGER, whole: true },
];

const fits = ({ least, most, whole }, value) =>
  Number.isFinite(value) && value >= least && value <= most && (!whole || Number.isInteger(value));

/** The sampling settings of a file: known names, numbers within their ranges. */
export function checkedSettings(values, place) {
  if (typeof values !== "object" || values === null || Array.isArray(values)) {
    throw new Error(word("import_object", { place }));
  }
  const checked = {};
  for (const setting of SAMPLING) {
    if (!Object.hasOwn(values, setting.name)) continue;
    if (!fits(setting, values[setting.name])) {
      const { least, most } = setting;
      throw new Error(word("import_range", { place: `${place}.${setting.name}`, least, most }));
    }
    checked[setting.name] = values[setting.name];
  }
  return checked;
}

// --- what this browser keeps of the page ---------------------------------------------------------

const touch = () => matchMedia("(pointer: coarse)").matches;
let preferences = { theme: "auto", language: "auto", enterSends: null, system: "", settings: {} };

/** Read what was kept; anything strange in it is left out. */
export function loadPreferences() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE)) ?? {};
    if (["auto", "light", "dark"].includes(kept.theme)) preferences.theme = kept.theme;
    if (["auto", "en", "ko"].includes(kept.language)) preferences.language = kept.language;
    if (typeof kept.enterSends === "boolean") preferences.enterSends = kept.enterSends;
    if (typeof kept.system === "string") preferences.system = kept.system;
    preferences.settings = checkedSettings(kept.settings ?? {}, "settings");
  } catch {
    // No storage, or not ours: the defaults hold.
  }
  return preferences;
}

export function savePreferences(changes) {
  preferences = { ...preferences, ...changes };
  try { localStorage.setItem(STORE, JSON.stringify(preferences)); } catch { /* no storage */ }
  return preferences;
}

/** Whether Enter sends. On a phone it breaks the line: there is no Shift to hold. */
export const enterSends = () => preferences.enterSends ?? !touch();

/** Light, dark, or what the system says. */
export function showTheme() {
  const { theme } = preferences;
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

// --- the dialog ----------------------------------------------------------------------------------

/**
 * Make the fields of the dialog and keep them in step with a conversation.
 *
 * onSampling(system, settings) is called when these change, onPage(preferences) when the page's
 * own do. Returns {open(chat)}.
 */
export function settingsDialog(dialog, { onSampling, onPage }) {
  const grid = dialog.querySelector("#sampling");
  const system = dialog.querySelector("#system");
  const fields = new Map(SAMPLING.map((setting) => {
    const { name, least, most, step, whole } = setting;
    const field = make("input", {
      type: "number", id: `set-${name}`, min: least, max: most, step: step ?? 1,
      inputmode: whole ? "numeric" : "decimal", autocomplete: "off", "data-placeholder": "default",
      "aria-describedby": `about-${name}`,
    });
    const note = make("p", { class: "note", id: `about-${name}`, "data-word": `about_${name}` });
    grid.append(make("div", { class: "field" },
      make("label", { for: field.id, "data-word": `set_${name}` }), field, note));
    return [name, { field, note }];
  }));

  /** The values of all fields; null where one of them is out of its range. */
  const read = () => {
    const values = {};
    let right = true;
    for (const setting of SAMPLING) {
      const { field, note } = fields.get(setting.name);
      const empty = field.value === "" && !field.validity.badInput;
      const good = empty || fits(setting, field.valueAsNumber);
      field.setAttribute("aria-invalid", String(!good));
      note.classList.toggle("fault", !good);
      note.textContent = good ? word(`about_${setting.name}`)
        : word("set_range", { least: setting.least, most: setting.most });
      if (!empty && good) values[setting.name] = field.valueAsNumber;
      right &&= good;
    }
    return right ? values : null;
  };
  const changed = () => {
    const values = read();
    if (values) onSampling(system.value, values);
  };
  fields.forEach(({ field }) => field.addEventListener("input", changed));
  system.addEventListener("input", changed);

  dialog.querySelector("#reset").addEventListener("click", () => {
    fields.forEach(({ field }) => { field.value = ""; });
    changed();
  });

  const theme = dialog.querySelector("#theme");
  const language = dialog.querySelector("#language");
  const enter = dialog.querySelector("#enter-sends");
  const pageChanged = () => onPage(savePreferences({
    theme: theme.value, language: language.value, enterSends: enter.checked }));
  [theme, language, enter].forEach((field) => field.addEventListener("change", pageChanged));

  return {
    open(chat) {
      system.value = chat.system;
      fields.forEach(({ field }, name) => { field.value = chat.settings[name] ?? ""; });
      theme.value = preferences.theme;
      language.value = preferences.language;
      enter.checked = enterSends();
      dialog.querySelector("#import-result").textContent = "";
      putWords(dialog);
      read();
      dialog.showModal();
    },
  };
}
