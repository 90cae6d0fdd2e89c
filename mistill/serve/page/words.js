// The words of the page in the reader's language, from words.json.

const LANGUAGES = ["en", "ko"];
let words = {};
let language = "en";


/** Read the words once; they are small. */
export async function loadWords() {
  const answer = await fetch(new URL("words.json", import.meta.url));
  if (!answer.ok) throw new Error(`words.json: ${answer.status}`);
  words = await answer.json();
}

/** The first language of the browser that the page speaks; English otherwise. */
export function browserLanguage() {
  const codes = navigator.languages.map((name) => name.toLowerCase().split("-")[0]);
  return codes.find((code) => LANGUAGES.includes(code)) ?? "en";
}

/** Speak a language from now on, and put its words into the document. */
export function speak(code) {
  language = LANGUAGES.includes(code) ? code : "en";
  document.documentElement.lang = language;
  putWords(document);
}

/** A text in the reader's language; {names} in it are replaced by values. */
export function word(key, values = {}) {
  const text = words[language]?.[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => {
    const value = values[name];
    return typeof value === "number" ? number(value) : value ?? whole;
  });
}

/** A number as the reader's language writes it. */
export function number(value, digits = 0) {
  return new Intl.NumberFormat(language, {
    minimumFractionDigits: digits, maximumFractionDigits: digits,
  }).format(value);
}

/** Fill every element that names its words: text, label (and tooltip), placeholder. */
export function putWords(root) {
  for (const node of root.querySelectorAll("[data-word]")) {
    node.textContent = word(node.dataset.word);
  }
  for (const node of root.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", word(node.dataset.label));
    if (node.matches("button")) node.title = word(node.dataset.label);
  }
  for (const node of root.querySelectorAll("[data-placeholder]")) {
    node.placeholder = word(node.dataset.placeholder);
  }
}
