// Running text of a message as nodes: emphasis, code, links and line breaks.
//
// Text comes from a model and is not to be trusted: it becomes text nodes and elements that are
// made here, links lead to http, https or a mail address, and a picture is a link. Time grows with
// the length of the text and no faster, whatever it holds; elements lie at most DEEPEST deep.
import { filled, make } from "./elements.js";
import { word } from "./words.js";

export const DEEPEST = 12;
const STOPS = /[\\`*_~[\]!<\n]|https?:\/\//g;
const TARGET = /\([ \n]{0,9}(?:<([^<>\n]{0,2000})>|((?:[^\s()<>]|\([^\s()<>]{0,2000}\)){0,2000}))(?:[ \n]{1,9}(?:"[^"]{0,500}"|'[^']{0,500}'))?[ \n]{0,9}\)/y;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const BARE = /https?:\/\/[!#-&(-;=?-Z^_a-z~]{1,2000}/y;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const ASIAN = /[\p{sc=Hang}\p{sc=Han}\p{sc=Hira}\p{sc=Kana}]/u;

/** An address that a link may lead to, or null. */
function safeAddress(text) {
  try {
    const address = new URL(text.trim());
    return ["http:", "https:", "mailto:"].includes(address.protocol) ? address.href : null;
  } catch {
    return null;
  }
}

function linkTo(address, nodes) {
  const attributes = { href: address, title: address, target: "_blank" };
  return filled(make("a", { ...attributes, rel: "noopener noreferrer nofollow" }), nodes);
}

/** The character before or after a place, whole also where it takes two units. */
const before = (text, at) => (at === 0 ? " " : [...text.slice(Math.max(0, at - 2), at)].at(-1));
const after = (text, at) => (at >= text.length ? " " : String.fromCodePoint(text.codePointAt(at)));

/** A run of *, _ or ~ that may begin or end emphasis. */
function runOf(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  const [left, right] = [before(text, at), after(text, end)];
  const [leftMark, rightMark] = [PUNCTUATION.test(left), PUNCTUATION.test(right)];
  const [leftSpace, rightSpace] = [/\s/.test(left), /\s/.test(right)];
  const opens = !rightSpace && (!rightMark || leftSpace || leftMark || ASIAN.test(left));
  const ends = !leftSpace && (!leftMark || rightSpace || rightMark || ASIAN.test(right));
  const inWord = text[at] === "_";
  return {
    run: text[at], count: end - at, length: end - at,
    opens: opens && (!inWord || !ends || leftMark),
    ends: ends && (!inWord || !opens || rightMark),
  };
}

const TAGS = { "*": ["em", "strong"], _: ["em", "strong"], "~": ["del", "del"] };

/** Pairs of runs become elements; what is left of them is text. */
function emphasize(pieces) {
  const out = [];
  const open = [];
  const lowest = {};
  for (const piece of pieces) {
    if (!piece.run) { out.push(piece); continue; }
    const kind = `${piece.run}${piece.opens}${piece.length % 3}`;
    while (piece.ends && piece.count > 0) {
      let place = open.length - 1;
      const low = Math.min(lowest[kind] ?? 0, open.length);
      while (place >= low && !pairs(out[open[place]], piece)) place -= 1;
      if (place < low) { lowest[kind] = open.length; break; }
      const opener = out[open[place]];
      const many = piece.run === "~" ? piece.count : Math.min(2, opener.count, piece.count);
      const inner = out.splice(open[place] + 1);
      open.length = place + 1;
      const depth = depthAround(inner);
      opener.count -= many;
      piece.count -= many;
      if (opener.count === 0) { out.pop(); open.pop(); }
      const nodes = nodesOf(inner);
      // Deeper than anyone writes: its text is enough.
      out.push(depth > DEEPEST ? { text: nodes.map((node) => node.textContent).join("") }
        : { node: filled(make(TAGS[piece.run][many > 1 ? 1 : 0]), nodes), depth });
    }
    if (piece.count > 0) {
      if (piece.opens) open.push(out.length);
      out.push(piece);
    }
  }
  return out;
}

function pairs(opener, ender) {
  if (opener.run !== ender.run) return false;
  if (ender.run === "~") return opener.count === ender.count && ender.count <= 2;
  const both = (opener.opens && opener.ends) || (ender.opens && ender.ends);
  return !both || (opener.length + ender.length) % 3 !== 0
    || (opener.length % 3 === 0 && ender.length % 3 === 0);
}

/** How deep an element around these pieces would be. */
const depthAround = (pieces) => 1 + pieces.reduce((most, { depth = 0 }) => Math.max(most, depth), 0);

/** Pieces as nodes, neighbouring texts as one. */
function nodesOf(pieces) {
  const nodes = [];
  let text = "";
  const flush = () => { if (text) nodes.push(document.createTextNode(text)); text = ""; };
  for (const piece of pieces) {
    if (piece.node) { flush(); nodes.push(piece.node); }
    else text += piece.run ? piece.run.repeat(piece.count) : piece.text;
  }
  flush();
  return nodes;
}

/** Where each run of so many backticks begins, so that the partner of one is found at once. */
function backticksOf(text) {
  const places = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!places.has(run.length)) places.set(run.length, []);
    places.get(run.length).push(index);
  }
  return places;
}

/** The nodes of running text: emphasis, code, links, line breaks. */
export function inlineOf(text) {
  const pieces = [];
  const brackets = [];
  let backticks = null;
  let lastLink = -1;
  let at = 0;
  let plain = 0;
  const push = (piece, to) => {
    if (plain < at) pieces.push({ text: text.slice(plain, at) });
    if (piece) pieces.push(piece);
    at = to;
    plain = to;
  };
  for (;;) {
    STOPS.lastIndex = at;
    const stop = STOPS.exec(text);
    if (!stop) break;
    at = stop.index;
    const mark = text[at];
    if (mark === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      push({ text: text[at + 1] }, at + 2);
    } else if (mark === "\n" || (mark === "\\" && text[at + 1] === "\n")) {
      push({ node: make("br") }, text.indexOf("\n", at) + 1);
    } else if (mark === "`") {
      backticks ??= backticksOf(text);
      const run = /`+/y;
      run.lastIndex = at;
      const { length } = run.exec(text)[0];
      const places = backticks.get(length) ?? [];
      while (places.length && places[0] <= at) places.shift();
      if (places.length) {
        const code = text.slice(at + length, places[0]).replaceAll("\n", " ");
        const bare = code.startsWith(" ") && code.endsWith(" ") && code.trim() ? code.slice(1, -1) : code;
        push({ node: make("code", {}, bare) }, places[0] + length);
      } else {
        push({ text: "`".repeat(length) }, at + length);
      }
    } else if (TAGS[mark]) {
      const run = runOf(text, at);
      push(run, at + run.count);
    } else if (mark === "[" || (mark === "!" && text[at + 1] === "[")) {
      const sign = mark === "[" ? "[" : "![";
      push({ text: sign }, at + sign.length);
      brackets.push({ place: pieces.length, picture: mark === "!" });
    } else if (mark === "]" && brackets.length) {
      const { place, picture } = brackets.pop();
      TARGET.lastIndex = at + 1;
      const target = TARGET.exec(text);
      const address = target && safeAddress(target[1] ?? target[2]);
      // A link holds no other link.
      if (address && lastLink < place) {
        push(null, TARGET.lastIndex);
        const inner = emphasize(pieces.splice(place)
          .map((piece) => (piece.bare ? { text: piece.bare } : piece)));
        pieces.pop();
        const nodes = nodesOf(inner);
        const text = nodes.map((node) => node.textContent).join("");
        const shown = picture ? [word("picture", { name: text })] : nodes;
        const depth = depthAround(inner);
        lastLink = pieces.length;
        pieces.push({ node: linkTo(address, text ? shown : [address]), depth });
      } else {
        push({ text: "]" }, at + 1);
      }
    } else if (mark === "<" || mark === "h") {
      const pattern = mark === "<" ? ANGLED : BARE;
      pattern.lastIndex = at;
      const match = pattern.exec(text);
      const shown = match && (mark === "<" ? match[1] : withoutEnd(match[0]));
      const address = shown && safeAddress(shown);
      if (address && (mark === "<" || !/[\p{L}\p{N}]/u.test(before(text, at)))) {
        push({ node: linkTo(address, [shown]), depth: 1, bare: shown },
          mark === "<" ? pattern.lastIndex : at + shown.length);
      } else {
        push({ text: mark }, at + 1);
      }
    } else {
      push({ text: mark }, at + 1);
    }
  }
  at = text.length;
  push(null, at);
  return nodesOf(emphasize(pieces));
}

/** An address in running text without the punctuation of the sentence around it. */
function withoutEnd(address) {
  const text = address.replace(/[.,;:!?*_~'"\])]{1,20}$/, (end) => {
    const inner = address.slice(0, address.length - end.length);
    const owed = inner.split("(").length - inner.split(")").length;
    return owed > 0 && end[0] === ")" ? ")" : "";
  });
  return /^https?:\/\/$/.test(text) ? "" : text;
}
