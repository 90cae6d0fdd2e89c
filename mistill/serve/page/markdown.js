// Markdown as a model writes it, made into elements while it arrives.
//
// The text comes from a model and is not to be trusted. It only ever becomes text nodes inside of
// elements that are made here: no HTML is parsed, and HTML in the text is shown as text. The rules
// are CommonMark's with GitHub's tables and strikethrough, and these differences: a line break is
// a line break; a table needs no blank line before it; emphasis may end before a Korean, Chinese
// or Japanese letter; there are no indented code blocks, underlined headings, reference links,
// entities or raw HTML. Time grows with the length of the text and no faster, whatever it holds.
import { copyText, filled, icon, make, tick } from "./elements.js";
import { DEEPEST, inlineOf } from "./inline.js";
import { word } from "./words.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|(\d{1,9})([.)]))(?:([ \t]+)(.*)|)$/;
const TABLE_LINE = /^ {0,3}\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
const LONGEST_TABLE_LINE = 1000;

// --- blocks ------------------------------------------------------------------------------------

const isBlank = (line) => line.trim() === "";

/** Columns of white space before a line's text; a tab reaches to the next column of four. */
function indentOf(line) {
  let columns = 0;
  for (const sign of line) {
    if (sign === " ") columns += 1;
    else if (sign === "\t") columns += 4 - (columns % 4);
    else break;
  }
  return columns;
}

/** A line without so many columns of its white space. */
function outdent(line, width) {
  const indent = indentOf(line);
  return " ".repeat(Math.max(0, indent - width)) + line.replace(/^[ \t]+/, "");
}

/** The fence that a line opens, or null. A fence of backticks has none in its language. */
function fenceOf(line) {
  const match = FENCE.exec(line);
  if (!match || (match[1][0] === "`" && match[2].includes("`"))) return null;
  return { mark: match[1], language: match[2].trim(), indent: indentOf(line) };
}

const closes = (line, { mark }) => {
  const bare = line.trim();
  return indentOf(line) < 4 && bare.length >= mark.length && bare === mark[0].repeat(bare.length);
};

/** Whether a line ends the paragraph before it. */
function interrupts(line) {
  if (isBlank(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  if (fenceOf(line)) return true;
  const item = ITEM.exec(line);
  // A number in running text is no list: only 1 starts one inside of a paragraph.
  return item !== null && Boolean(item[6]) && (item[3] === undefined || item[3] === "1");
}

/** The cells of a row of a table. */
function cellsOf(line) {
  const cells = [""];
  const row = line.trim().replace(/^\|/, "");
  for (let at = 0; at < row.length; at += 1) {
    if (row[at] === "\\" && row[at + 1] === "|") { cells[cells.length - 1] += "|"; at += 1; }
    else if (row[at] === "|") cells.push("");
    else cells[cells.length - 1] += row[at];
  }
  if (cells.length > 1 && isBlank(cells.at(-1))) cells.pop();
  return cells.map((cell) => cell.trim());
}

function isTable(lines, at) {
  const [head, under] = [lines[at], lines[at + 1]];
  if (under === undefined || under.length > LONGEST_TABLE_LINE || !head.includes("|")) return false;
  if (!TABLE_LINE.test(under)) return false;
  return cellsOf(head).length === cellsOf(under).length;
}

/** Lines cut into blocks: {kind, from, to} and what each kind needs. */
function blocksOf(lines, depth) {
  const blocks = [];
  let at = 0;
  const push = (kind, to, more) => { blocks.push({ kind, from: at, to, ...more }); at = to; };
  while (at < lines.length) {
    const line = lines[at];
    const fence = fenceOf(line);
    const heading = HEADING.exec(line);
    if (isBlank(line)) {
      at += 1;
    } else if (fence) {
      let end = at + 1;
      while (end < lines.length && !closes(lines[end], fence)) end += 1;
      const code = lines.slice(at + 1, end).map((inner) =>
        (fence.indent ? outdent(inner, fence.indent) : inner));
      push("code", Math.min(end + 1, lines.length), { language: fence.language, text: code.join("\n") });
    } else if (heading) {
      push("heading", at + 1, { level: heading[1].length, text: headingText(heading[2] ?? "") });
    } else if (RULE.test(line)) {
      push("rule", at + 1);
    } else if (depth < DEEPEST && QUOTE.test(line)) {
      let end = at + 1;
      let lazy = isParagraph(lines[at].replace(QUOTE, ""));
      while (end < lines.length && (QUOTE.test(lines[end])
        || (lazy && !interrupts(lines[end]) && !ITEM.test(lines[end])))) {
        lazy = isParagraph(lines[end].replace(QUOTE, ""));
        end += 1;
      }
      push("quote", end, { lines: lines.slice(at, end).map((inner) => inner.replace(QUOTE, "")) });
    } else if (depth < DEEPEST && ITEM.test(line)) {
      const list = listOf(lines, at);
      push("list", list.to, list);
    } else if (isTable(lines, at)) {
      let end = at + 2;
      while (end < lines.length && !interrupts(lines[end]) && !ITEM.test(lines[end])) end += 1;
      push("table", end, { rows: [lines[at], ...lines.slice(at + 2, end)], under: lines[at + 1] });
    } else {
      let end = at + 1;
      while (end < lines.length && !interrupts(lines[end]) && !isTable(lines, end)) end += 1;
      push("paragraph", end, { text: lines.slice(at, end).map((inner) => inner.trim()).join("\n") });
    }
  }
  return blocks;
}

/** The text of a heading without the marks that may end it. */
function headingText(line) {
  const text = line.trim();
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  return end === 0 || /\s/.test(text[end - 1]) ? text.slice(0, end).trim() : text;
}

/** Whether a line is running text, which the next line may go on with. */
const isParagraph = (line) => !isBlank(line) && !fenceOf(line) && !HEADING.test(line) && !RULE.test(line);

/** The list that begins at a line: its items as lines of their own, and whether it is loose. */
function listOf(lines, start) {
  const first = ITEM.exec(lines[start]);
  const sign = first[4] ?? first[2];
  const list = { items: [], loose: false, start: first[3], to: start };
  let at = start;
  for (;;) {
    const item = ITEM.exec(lines[at] ?? "");
    if (!item || (item[4] ?? item[2]) !== sign || RULE.test(lines[at])) break;
    const spaces = item[5]?.length ?? 1;
    const width = item[1].length + item[2].length + (spaces > 4 || !item[6] ? 1 : spaces);
    const inner = [(item[6] ?? "").trimStart()];
    let fence = fenceOf(inner[0]);
    let blank = false;
    let end = at + 1;
    while (end < lines.length) {
      const line = lines[end];
      if (isBlank(line)) {
        blank = true;
        inner.push("");
      } else if (indentOf(line) >= width) {
        const text = outdent(line, width);
        if (fence) { if (closes(text, fence)) fence = null; } else fence = fenceOf(text);
        blank = false;
        inner.push(text);
      } else if (!blank && !fence && !interrupts(line) && !ITEM.test(line) && !isTable(lines, end)) {
        inner.push(line.trimStart());
      } else {
        break;
      }
      end += 1;
    }
    let empty = 0;
    while (inner.length > 1 && inner.at(-1) === "") { inner.pop(); empty += 1; }
    list.items.push(inner);
    const goes = ITEM.exec(lines[end] ?? "");
    if (empty && goes && (goes[4] ?? goes[2]) === sign) list.loose = true;
    list.to = end - empty;
    at = end;
  }
  return list;
}

/** Whether blank lines stand between the blocks of an item. */
const isLoose = (blocks) =>
  blocks.some((block, index) => index > 0 && block.from > blocks[index - 1].to);

// --- elements ----------------------------------------------------------------------------------

/** A code block with its language and a button that copies its source. */
function codeBlock({ language, text }) {
  // The info string may be anything: its first word, as text, is all that is shown.
  const name = language.split(/\s/)[0].slice(0, 40);
  const code = make("code", {}, text);
  const button = make("button", { type: "button", class: "plain", "data-do": "copy-code" },
    icon("copy"), word("copy"));
  button.addEventListener("click", () => copyText(code.textContent).then(() => tick(button), () => {}));
  return make("div", { class: "code" },
    make("div", { class: "code-head" }, make("span", {}, name || word("code")), button),
    make("pre", { tabindex: "0", role: "region", "aria-label": name ? `${word("code")}: ${name}` : word("code") },
      code));
}

function tableOf({ rows, under }) {
  const sides = cellsOf(under).map((cell) =>
    (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  const row = (line, tag) => {
    const cells = cellsOf(line);
    return filled(make("tr"), sides.map((side, index) => filled(
      make(tag, { class: side, scope: tag === "th" ? "col" : null }), inlineOf(cells[index] ?? ""))));
  };
  const table = make("table", {}, make("thead", {}, row(rows[0], "th")));
  if (rows.length > 1) table.append(filled(make("tbody"), rows.slice(1).map((line) => row(line, "td"))));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": word("table") }, table);
}

function listElement(block, depth, outline) {
  const inner = block.items.map((lines) => blocksOf(lines, depth + 1));
  const loose = block.loose || inner.some(isLoose);
  const ordered = block.start !== undefined;
  const list = make(ordered ? "ol" : "ul", { start: ordered && block.start !== "1" ? Number(block.start) : null });
  return filled(list, inner.map((blocks, index) => {
      const item = make("li");
      blocks.forEach((one) => {
        if (one.kind === "paragraph" && !loose) filled(item, inlineOf(one.text));
        else item.append(elementOf(one, depth + 1, outline));
      });
      const box = /^\[([ xX])\] /.exec(block.items[index][0]);
      if (box && item.firstChild?.nodeType === Node.TEXT_NODE) {
        item.firstChild.data = (box[1] === " " ? "☐ " : "☑ ") + item.firstChild.data.slice(4);
        item.className = "task";
      }
      return item;
    }));
}

/** One block as an element. outline.level is the level of the heading before it. */
function elementOf(block, depth, outline) {
  switch (block.kind) {
    case "code": return codeBlock(block);
    case "rule": return make("hr");
    case "table": return tableOf(block);
    case "list": return listElement(block, depth, outline);
    case "quote": return filled(make("blockquote"),
      blocksOf(block.lines, depth + 1).map((one) => elementOf(one, depth + 1, outline)));
    case "heading": {
      // Headings of an answer stand under the h2 of its message, and skip no level.
      outline.level = Math.min(block.level + 2, outline.level + 1, 6);
      return make(`h${outline.level}`, { class: `heading-${block.level}` },
        ...inlineOf(block.text));
    }
    default: return filled(make("p"), inlineOf(block.text));
  }
}

/** Markdown shown in an element; more text may come, and only what changes is made anew. */
export class MarkdownView {
  #target;
  #shown = [];

  constructor(target) {
    this.#target = target;
  }

  /** Show this text, of which an earlier part is usually shown already. */
  update(source) {
    const lines = source.replace(/\r\n?/g, "\n").split("\n");
    const blocks = blocksOf(lines, 0);
    blocks.forEach((block) => { block.source = lines.slice(block.from, block.to).join("\n"); });
    let same = 0;
    while (same < blocks.length && same < this.#shown.length
      && blocks[same].source === this.#shown[same].source
      && blocks[same].kind === this.#shown[same].kind) same += 1;
    const old = this.#shown[same];
    const grown = blocks[same];
    if (old?.kind === "code" && grown?.kind === "code" && this.#shown.length === same + 1
      && grown.language === old.language && grown.text.startsWith(old.text)) {
      // A long code block that is being written keeps its place, its scroll and its selection.
      const code = old.element.querySelector("pre code");
      code.append(grown.text.slice(old.text.length));
      code.normalize();
      this.#shown[same] = { ...grown, element: old.element, outline: old.outline };
      same += 1;
    }
    this.#shown.splice(same).forEach(({ element }) => element.remove());
    let level = this.#shown.at(-1)?.outline ?? 2;
    for (const block of blocks.slice(same)) {
      const outline = { level };
      const element = elementOf(block, 0, outline);
      level = outline.level;
      this.#shown.push({ ...block, element, outline: level });
      this.#target.append(element);
    }
  }
}
