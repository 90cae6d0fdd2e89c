"""Markdown of a model as elements: held against markdown-it, and against what attackers write."""

from __future__ import annotations

import random
from html.parser import HTMLParser
from typing import Any

import pytest

from tests.mistill.serve.page.chat_page import ChatPage

pytestmark = pytest.mark.slow

Tree = list[Any]

# The elements as a tree: [tag, what matters of its attributes, children], texts as they are.
TREE = """
async (sources) => {
  const { MarkdownView } = await import(new URL("static/markdown.js", document.baseURI));
  const tree = (node) => {
    if (node.nodeType === Node.TEXT_NODE) return node.data;
    if (node.matches("div.code")) return ["pre", "", [node.querySelector("pre code").textContent]];
    if (node.matches("div.scroll")) return tree(node.firstChild);
    const tag = node.localName.replace(/^h[3-6]$/, "h");
    const more = { a: node.getAttribute("href"), ol: node.getAttribute("start"),
      td: node.className, th: node.className }[tag];
    return [tag, more ?? "", [...node.childNodes].map(tree)];
  };
  return sources.map((source) => {
    const target = document.createElement("div");
    new MarkdownView(target).update(source);
    return [...target.childNodes].map(tree);
  });
}
"""


class _Reader(HTMLParser):
    """markdown-it's HTML as the same tree."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root: Tree = ["", "", []]
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "code" and self.open[-1][0] == "pre":
            return
        more = attributes.get("href") or attributes.get("start") or ""
        if tag in ("td", "th"):
            style = attributes.get("style") or "text-align:left"
            more = style.partition(":")[2]
        name = "h" if tag in ("h1", "h2", "h3", "h4", "h5", "h6") else {"s": "del"}.get(tag, tag)
        node: Tree = [name, more, []]
        self.open[-1][2].append(node)
        if tag not in ("br", "hr"):
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("br", "hr") and not (tag == "code" and self.open[-1][0] == "pre"):
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1][2].append(data)


def tidy(nodes: Tree) -> Tree:
    """Without white space that no reader sees, neighbouring texts as one."""
    out: Tree = []
    for node in nodes:
        if isinstance(node, str):
            if out and isinstance(out[-1], str):
                out[-1] += node
            else:
                out.append(node)
        else:
            tag, more, children = node
            inside = ["".join(children).rstrip("\n")] if tag == "pre" else tidy(children)
            out.append([tag, more, inside])
    stripped = [" ".join(node.split()) if isinstance(node, str) else node for node in out]
    return [node for node in stripped if node != ""]


def expected(source: str) -> Tree:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False, "breaks": True})
    parser.enable(["table", "strikethrough"])
    parser.disable(["code", "lheading", "reference", "entity", "html_block", "html_inline"])
    reader = _Reader()
    reader.feed(parser.render(source))
    return tidy(reader.root[2])


def shown(chat: ChatPage, sources: list[str]) -> list[Tree]:
    return [tidy(tree) for tree in chat.run(TREE, sources)]


PLAIN = [
    "One line.",
    "Two lines\nof one paragraph.\n\nAnother.",
    "# Title\n\n## Part ##\ntext\n###### Six\n####### Seven is text\n#no space",
    "*a* **b** ***c*** _d_ __e__ ~~f~~ `g` snake_case_name 2*3*4 5 * 6 * 7",
    "**bold with `code` and *italic* inside**, *one **two** one*",
    "A `` code with ` inside `` and `` ` `` and an `open one",
    "\\*not emphasis\\* \\`not code\\` \\[not a link\\](example) C:\\temp",
    "[link](https://example.org/a_b?c=d&e=f) and [**bold** link](http://example.org/ 'title')",
    "[in brackets](<https://example.org/a>) [brackets [inside] it](https://example.org/x(y)z)",
    "<https://example.org/auto> and <mailto:someone@example.org> a < b > c",
    "- one\n- two\n- three",
    "* one\n* two\n\n  more of two\n* three",
    "1. one\n2. two\n3) another list",
    "7. seven\n8. eight",
    "- a\n  - b\n    - c\n  - d\n- e",
    "1. a\n   - b\n   - c\n2. d\n   1. e",
    "- a\n\n- b\n\n- c",
    "- item\ngoes on lazily\n- next",
    "Text\n- list after text\n- more\n\nText after",
    "Text\n2. is no list\n1. is one",
    "- ```python\n  print(1)\n  ```\n- after",
    "1. Step:\n\n   ```sh\n   make\n     indented\n   ```\n\n2. Next",
    "```\nplain\n  code\n```\n\n~~~js\nlet a = `b`;\n```\n~~~",
    "````\n```\ninner\n```\n````",
    "```python\nnever closed\n\nstill code",
    "> quote\n> goes on\nlazily\n\n> another\n>\n> with two paragraphs",
    "> - list in a quote\n> - more\n>\n> > nested",
    "---\n\n***\n\n_ _ _\n\ntext\n***\ntext",
    "| a | b |\n|---|:-:|\n| 1 | 2 |\n| x \\| y | **z** |\n\nafter",
    "a | b | c\n:-- | --: | ---\n1 | 2\n1 | 2 | 3 | 4\nafter? a row\n\nend",
    "| not | a table |\n| no delimiter |",
    "Ends with two spaces  \nand a backslash\\\nand nothing",
    "<b>HTML</b> is <script>text</script> &amp; &lt; entities are too &copy;",
    'Emphasis*in*words and_not_here, "*quoted*", (**paren**), **a**b, *a*.',
    "**not closed and *closed* here\n\n*not closed either",
    "* * *\n* item\n***bold item?***",
    "Math: $a_1 * b_1$ and x^2, 50% of 3 < 4",
]
FRAGMENTS = [
    *(
        "word",
        "two words",
        "*em*",
        "**strong**",
        "`code`",
        "~~gone~~",
        "a_b_c",
        "[t](https://a.example/)",
    ),
    *("# head", "### head *em*", "- item", "- **item** text", "  - nested", "    more", "1. first"),
    *(
        "2. second",
        "   under a number",
        "> quote",
        "> - in quote",
        ">",
        "---",
        "```",
        "```py",
        "~~~",
    ),
    *(
        "\n| a | b |\n|---|:-:|\n| 1 | *2* |",
        "| a | b |",
        "",
        "",
        "",
        "* star",
        "+ plus",
        "x * y",
        "**open",
        "`tick",
    ),
    *(
        "\\*escaped\\*",
        "end  ",
        "<i>html</i>",
        "***both***",
        "_under_ score",
        "![pic",
        "[t](x y)",
        "1) paren",
    ),
]


def documents(count: int) -> list[str]:
    """Lines put together at random, the same every time."""
    chance = random.Random(16)
    return ["\n".join(chance.choices(FRAGMENTS, k=chance.randint(1, 7))) for _ in range(count)]


def test_it_reads_markdown_as_markdown_it_does(chat):
    for source, tree in zip(PLAIN, shown(chat, PLAIN), strict=True):
        assert tree == expected(source), source


def test_it_reads_lines_put_together_at_random_as_markdown_it_does(chat):
    sources = documents(1500)
    differ = [
        source
        for source, tree in zip(sources, shown(chat, sources), strict=True)
        if tree != expected(source)
    ]
    assert differ == []


@pytest.mark.parametrize("step", [1, 7])
def test_text_that_arrives_in_pieces_ends_as_text_that_is_there_at_once(chat, step):
    same = chat.run(
        """
        async ([sources, step]) => {
          const { MarkdownView } = await import(new URL("static/markdown.js", document.baseURI));
          return sources.map((source) => {
            const [whole, grown] = [document.createElement("div"), document.createElement("div")];
            const view = new MarkdownView(grown);
            for (let end = 0; end < source.length; end += step) view.update(source.slice(0, end));
            view.update(source);
            new MarkdownView(whole).update(source);
            return whole.isEqualNode(grown);
          });
        }""",
        [[*PLAIN, *documents(40)], step],
    )
    assert all(same)


def test_a_block_that_is_finished_stays_the_same_element(chat):
    assert chat.run(
        """
        async () => {
          const { MarkdownView } = await import(new URL("static/markdown.js", document.baseURI));
          const target = document.createElement("div");
          const view = new MarkdownView(target);
          view.update("First *one*.\\n\\n```\\ncode");
          const [first, code] = [target.children[0], target.querySelector("pre code")];
          view.update("First *one*.\\n\\n```\\ncode\\nmore");
          const same = target.children[0] === first && target.querySelector("pre code") === code;
          return same && code.textContent === "code\\nmore";
        }"""
    )


def test_emphasis_ends_before_a_korean_letter(chat):
    sources = [
        '**"강조"**는 뒤에',
        "**하늘(sky)**은 파랗다",
        "*강조*는",
        "__밑줄__은",
        "2*3=6은 5*1",
    ]
    first, second, third, fourth, fifth = shown(chat, sources)
    assert first == [["p", "", [["strong", "", ['"강조"']], "는 뒤에"]]]
    assert second == [["p", "", [["strong", "", ["하늘(sky)"]], "은 파랗다"]]]
    assert third == [["p", "", [["em", "", ["강조"]], "는"]]]
    assert fourth == [["p", "", ["__밑줄__은"]]]
    assert fifth[0][2][0] == "2"  # as in every Markdown: stars between letters


@pytest.mark.parametrize(
    ("source", "address", "shown_text", "rest"),
    [
        ("See https://example.org/a.", "https://example.org/a", "https://example.org/a", "."),
        ("(https://example.org/a_(b))", "https://example.org/a_(b)", None, ")"),
        ("https://example.org를 보라", "https://example.org/", "https://example.org", "를 보라"),
        ("**https://example.org/x**", "https://example.org/x", None, ""),
        ("[https://example.org](https://example.org)", "https://example.org/", None, ""),
        ("![a picture](https://example.org/?q=secret)", "https://example.org/?q=secret",
         "Picture: a picture", ""),
    ],
)  # fmt: skip
def test_links_lead_where_they_say(chat, source, address, shown_text, rest):
    links = chat.run(
        """
        async (source) => {
          const { MarkdownView } = await import(new URL("static/markdown.js", document.baseURI));
          const target = document.createElement("div");
          new MarkdownView(target).update(source);
          return [target.textContent, target.querySelectorAll("img").length,
            [...target.querySelectorAll("a")].map((link) =>
              [link.getAttribute("href"), link.textContent, link.rel, link.target, link.ping])];
        }""",
        source,
    )
    text, pictures, ((href, name, rel, target, ping),) = links
    assert href == address
    assert name == (shown_text or name)
    assert text.endswith(name + rest)
    assert (rel, target, ping, pictures) == ("noopener noreferrer nofollow", "_blank", "", 0)


ELSEWHERE = [
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](<java\tscript:alert(1)>)",
    "[x](java&#115;cript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:x) [x](file:///etc/passwd) [x](blob:x) [x](//evil.example) [x](/v1)",
    "<javascript:alert(1)> <data:text/html,x>",
    "![x](javascript:alert(1))",
    "javascript:alert(1)",
]


def test_no_other_address_becomes_a_link(chat):
    for source, tree in zip(ELSEWHERE, shown(chat, ELSEWHERE), strict=True):
        assert "'a'" not in repr(tree), source


HOSTILE = [
    *("*" * 60_000, "_a " * 30_000, "**a " * 30_000, "*a **b " * 15_000, "[" * 60_000),
    *("[a](" * 20_000, "![" * 30_000, "`a``b" * 20_000, "\\" * 60_000, "<" * 60_000),
    *(">" * 60_000, "> " * 30_000, "- " * 30_000, "1. " * 20_000, "- a\n" * 20_000),
    *("# " * 30_000, "#" * 60_000 + "x", "| a " * 15_000 + "\n" + "|-" * 15_000, "|\n|-\n" * 9_000),
    *(
        "```" * 20_000,
        "~~~\n" * 20_000,
        "~a~" * 20_000,
        "http://" * 9_000,
        "a " + " " * 60_000 + "b",
    ),
    *("[a](http://b.c " + '"' * 60_000, "<http://" + "a" * 60_000, "x" * 300_000, "\n" * 60_000),
    *("*a _b " * 5_000 + "c_ d* " * 5_000, "**a " * 5_000 + "b** " * 5_000),
    *("- " * 200 + "deep", "\n".join("  " * depth + "- x" for depth in range(600))),
    "".join(f"[{'*' * (number % 3)}a" for number in range(20_000)) + "](http://b.c)" * 20_000,
]


def test_nothing_hangs_or_breaks_the_page(chat):
    for source in HOSTILE:
        depth, length = chat.run(
            """
            async (source) => {
              const file = new URL("static/markdown.js", document.baseURI);
              const { MarkdownView } = await import(file);
              const target = document.body.appendChild(document.createElement("div"));
              new MarkdownView(target).update(source);
              const depthOf = (node) =>
                1 + [...node.children].reduce((most, one) => Math.max(most, depthOf(one)), 0);
              const result = [depthOf(target), target.innerText.length];
              target.remove();
              return result;
            }""",
            source,
        )
        assert depth < 70, source[:20]
        assert length <= len(source) * 8 + 100, source[:20]
