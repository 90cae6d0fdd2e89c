// Keys: which of them belong to an input method, and which are shortcuts.

/**
 * Whether a key press belongs to an input method that is composing a syllable.
 *
 * Chrome and Firefox say so by isComposing. Safari sets it too late for the Enter that ends a
 * composition, and Chrome sometimes ends the composition before that key press: both then have
 * the key code 229.
 */
export const isComposing = (event) => event.isComposing || event.keyCode === 229;

/** The shortcuts: keys as a reader sees them, and the name of what they do. */
export const SHORTCUTS = [
  { keys: ["Enter"], does: "shortcut_send" },
  { keys: ["Shift", "Enter"], does: "shortcut_line" },
  { keys: ["Ctrl", "Enter"], does: "shortcut_send_always" },
  { keys: ["Esc"], does: "shortcut_stop" },
  { keys: ["Shift", "Ctrl", "O"], does: "shortcut_new", action: "newChat" },
  { keys: ["Ctrl", "K"], does: "shortcut_search", action: "search" },
  { keys: ["Ctrl", "B"], does: "shortcut_sidebar", action: "toggleSidebar" },
  { keys: ["Shift", "Ctrl", "E"], does: "shortcut_edit", action: "editLast" },
  { keys: ["Shift", "Ctrl", "L"], does: "shortcut_copy", action: "copyLast" },
  { keys: ["Shift", "Ctrl", "D"], does: "shortcut_delete", action: "deleteChat" },
  { keys: ["Ctrl", ","], does: "shortcut_settings", action: "openSettings" },
  { keys: ["Ctrl", "/"], does: "shortcut_list", action: "openShortcuts" },
];

const apple = /Mac|iPhone|iPad/.test(navigator.platform);

/** How a key is called on this machine. */
export const keyName = (key) => (apple && key === "Ctrl" ? "⌘" : key);

// With a Korean input method the O key writes ㅐ: then the key's place on the keyboard counts.
const PLACES = { ",": "Comma", "/": "Slash" };
function isKey(event, key) {
  const typed = event.key.toUpperCase();
  if (/^[ -~]$/.test(typed)) return typed === key || (event.shiftKey && PLACES[key] === event.code);
  return event.code === (PLACES[key] ?? `Key${key}`);
}

/** The action of a key press, or undefined. */
export function actionOf(event) {
  if (isComposing(event) || event.altKey || !(event.ctrlKey || event.metaKey)) return undefined;
  return SHORTCUTS.find(({ keys, action }) =>
    action && keys.includes("Shift") === event.shiftKey && isKey(event, keys.at(-1)))?.action;
}
