"""The page for everybody: screen readers, keyboard, phones, colours, languages."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RICH = (
    """# A heading

Text with **bold**, *italic*, `code`, ~~gone~~ and [a link](https://example.org/).

1. one
2. two
   - nested

> A quote

```python
def a_function_with_a_long_name(argument, another_argument, yet_another_argument):
    return argument
```

| Colour | Wavelength, nm | Scattered | Another column |
|:--|--:|--:|---|
| Red | 700 | 1.0 | some text here |

### A smaller heading

---
LongWordWithoutAnySpace"""
    + "x" * 200
)

AXE = "axe-core@4"


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, from npm into a folder of its own."""
    folder = tmp_path_factory.mktemp("axe")
    try:
        subprocess.run(
            ["npm", "pack", "--silent", AXE],
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=120,
        )
        (archive,) = folder.glob("*.tgz")
        subprocess.run(["tar", "xzf", archive.name], cwd=folder, check=True)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        pytest.skip(f"axe-core cannot be fetched from npm: {error}")
    return (folder / "package" / "axe.min.js").read_text("utf-8")


def violations(chat, axe: str) -> list[str]:
    # A page of a strict policy takes no script: the browser runs it from outside of the page.
    chat.run(f"() => {{ if (!window.axe) {{ {axe} }} }}")
    results = chat.run(
        "async () => (await axe.run(document, { resultTypes: ['violations'] })).violations"
    )
    return [f"{one['id']}: {[node['html'][:120] for node in one['nodes']]}" for one in results]


@pytest.mark.network
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_no_violation(open_page, script, axe, scheme, width):
    chat = open_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    assert violations(chat, axe) == []
    script.pieces = [RICH]
    chat.ask("A question")
    script.status, script.error = 400, {"error": {"message": "wrong"}}
    chat.ask("A question that fails")
    assert violations(chat, axe) == []
    chat.do("edit", 0)
    assert violations(chat, axe) == []
    chat.page.keyboard.press("Escape")
    for selector in ("#settings", "#shortcuts"):
        chat.run("(selector) => document.querySelector(selector).showModal()", selector)
        assert violations(chat, axe) == [], selector
        chat.page.keyboard.press("Escape")
    if width == 360:
        chat.page.click("#open-sidebar")
        assert violations(chat, axe) == []
    chat.page.fill("#search", "question")
    chat.until("() => document.querySelector('#chats mark')")
    assert violations(chat, axe) == []
    script.key = "key"
    chat.page.reload()
    chat.wait("#notice")
    assert violations(chat, axe) == []
    chat.run("() => document.querySelector('#notice-do').click()")
    assert violations(chat, axe) == []


def test_a_screen_reader_hears_each_answer_once(open_page, script):
    chat = open_page(
        init="""addEventListener("DOMContentLoaded", () => {
          window.heard = [];
          const announcer = document.querySelector("#announcer");
          new MutationObserver(() => heard.push(announcer.textContent))
            .observe(announcer, { childList: true, characterData: true, subtree: true });
        });"""
    )
    script.pieces = ["One ", "**two** ", "three ", "four"]
    chat.ask("Count")
    assert chat.run("() => heard") == [
        "The answer is being written.",
        "chatbot: One two three four",
    ]
    live = chat.run(
        """() => [...document.querySelectorAll("[aria-live], [role=status], [role=alert]")]
          .filter((node) => node.contains(document.querySelector(".message")))"""
    )
    assert live == []
    script.status, script.error = 400, {"error": {"message": "too long"}}
    chat.ask("Again")
    assert chat.run("() => heard.at(-1)") == "too long"


def test_every_button_and_field_has_a_name(chat, script):
    script.pieces = [RICH]
    chat.ask("Go")
    nameless = chat.run(
        """() => [...document.querySelectorAll("button, input, textarea, select, dialog")]
          .filter((node) => !(node.getAttribute("aria-label") || node.textContent.trim()
            || node.labels?.length
            || document.getElementById(node.getAttribute("aria-labelledby"))?.textContent))
          .map((node) => node.outerHTML.slice(0, 100))
          .filter((html) => !/id="(ask|rename|notice-do|toast-do)/.test(html))"""
    )
    assert nameless == []


def test_everything_can_be_done_with_the_keyboard(open_page, script):
    chat = open_page(permissions=["clipboard-read", "clipboard-write"])
    press = chat.page.keyboard.press
    # The field has the focus from the beginning, and after each answer.
    chat.page.keyboard.type("First")
    press("Shift+Enter")
    chat.page.keyboard.type("line two")
    press("Enter")
    chat.answer()
    assert script.bodies[0]["messages"][0]["content"] == "First\nline two"
    chat.page.keyboard.type("Second")
    press("Enter")
    chat.until("() => document.querySelectorAll('.message').length === 4")
    chat.answer()
    press("Shift+Control+L")
    assert chat.run("() => navigator.clipboard.readText()") == "Hello there."
    press("Shift+Control+E")
    chat.wait(".editor")
    press("Control+a")
    chat.page.keyboard.type("Changed")
    press("Control+Enter")
    chat.until("() => document.querySelectorAll('.mine .text')[1].textContent === 'Changed'")
    chat.answer()
    press("Shift+Control+O")
    chat.wait("#welcome")
    assert chat.run("() => document.activeElement.id") == "message"
    press("Control+b")
    chat.gone("#sidebar")
    press("Control+b")
    chat.wait("#sidebar")
    press("Control+k")
    assert chat.run("() => document.activeElement.id") == "search"
    press("ArrowDown")
    press("Enter")
    chat.until("() => document.querySelectorAll('.message').length === 4")
    press("Control+Comma")
    chat.wait("#settings")
    press("Escape")
    chat.gone("#settings")
    press("Control+/")
    listed = chat.wait("#shortcut-list").inner_text()
    press("Escape")
    for keys in ("Ctrl", "Esc", "Shift"):
        assert keys in listed
    assert len(chat.page.locator("#shortcut-list dd").all()) == 12
    press("Shift+Control+D")
    chat.until("() => document.querySelectorAll('#chats li').length === 0")


def test_a_key_that_is_held_with_alt_is_left_to_the_browser(chat):
    chat.ask("Go")
    for keys in ("Alt+Control+k", "Alt+Shift+Control+D"):
        chat.page.keyboard.press(keys)
    assert chat.run("() => document.activeElement.id") != "search"
    chat.until("() => document.querySelectorAll('#chats li').length === 1")


@pytest.mark.parametrize("locale", ["en-GB", "ko-KR"])
def test_a_phone_of_360_pixels_shows_everything(open_page, script, locale):
    chat = open_page(
        viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True, locale=locale
    )
    script.pieces = [RICH]
    wide = """() => document.documentElement.scrollWidth > innerWidth
      || [...document.querySelectorAll("#scroller, dialog[open] .dialog-body, #sidebar")]
        .some((box) => box.scrollWidth > box.clientWidth + 1)"""
    assert not chat.run(wide)
    assert not chat.run("() => document.body.classList.contains('with-sidebar')")
    # Enter breaks the line: a phone has no Shift to hold.
    chat.page.tap("#message")
    chat.page.keyboard.type("One")
    chat.page.keyboard.press("Enter")
    chat.page.keyboard.type("two")
    assert script.bodies == []
    chat.page.tap("#send")
    chat.answer()
    assert script.bodies[0]["messages"][0]["content"] == "One\ntwo"
    assert not chat.run(wide)
    small = chat.run(
        """() => [...document.querySelectorAll("button")]
          .filter((button) => button.checkVisibility())
          .map((button) => [button.id || button.dataset.do, button.getBoundingClientRect()])
          .filter(([, box]) => box.width < 28 || box.height < 28).map(([name]) => name)"""
    )
    assert small == []
    chat.page.tap("#open-sidebar")
    chat.wait("#sidebar")
    assert chat.run("() => document.querySelector('#main').inert")
    assert not chat.run(wide)
    chat.page.tap("#open-settings")
    chat.wait("#settings")
    assert not chat.run(wide)
    chat.page.tap("#settings .close")
    chat.page.touchscreen.tap(350, 300)
    chat.gone("#sidebar")
    chat.page.tap("#open-sidebar")
    chat.page.tap("#chats .open")
    chat.gone("#sidebar")


def test_colours_follow_the_device_until_the_reader_chooses(open_page):
    colour = "() => getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(246, 247, 249)", "rgb(18, 22, 28)"
    chat = open_page(color_scheme="dark")
    assert chat.run(colour) == dark
    chat.page.emulate_media(color_scheme="light")
    assert chat.run(colour) == light
    chat.page.click("#open-settings")
    chat.page.select_option("#theme", "dark")
    assert chat.run(colour) == dark
    chat.page.reload()
    chat.wait("#model[data-state=ready]")
    assert chat.run(colour) == dark


def test_nothing_moves_for_a_reader_who_wants_no_motion(open_page, script):
    chat = open_page(reduced_motion="reduce")
    script.gate.clear()
    chat.say("Go")
    chat.wait(".writing .text p")
    moving = """() => getComputedStyle(document.querySelector(".writing .text p"), "::after")
      .animationName"""
    assert chat.run(moving) == "none"


def test_the_page_speaks_the_readers_language(open_page, script):
    chat = open_page(locale="ko-KR")
    assert chat.run("() => document.documentElement.lang") == "ko"
    assert chat.page.locator("#new-chat").inner_text().strip() == "새 대화"
    chat.ask("안녕하세요")
    assert "토큰 4개" in chat.page.locator(".message.last .facts").inner_text()
    chat.page.click("#open-settings")
    chat.page.select_option("#language", "en")
    assert chat.page.locator("#settings-title").inner_text() == "Settings"
    chat.page.keyboard.press("Escape")
    assert chat.page.locator("#new-chat").inner_text().strip() == "New conversation"
    assert "4 tokens" in chat.page.locator(".message.last .facts").inner_text()
    chat.page.reload()
    chat.wait("#model[data-state=ready]")
    assert chat.run("() => document.documentElement.lang") == "en"


@pytest.mark.parametrize("locale", ["en-GB", "ko-KR"])
def test_no_word_of_the_page_is_a_bare_name(open_page, script, locale):
    chat = open_page(locale=locale)
    script.pieces = [RICH]
    chat.ask("Go")
    said = chat.run(
        """() => [...document.querySelectorAll("*")].flatMap((node) => [
          node.getAttribute("aria-label"), node.title, node.placeholder,
          ...[...node.childNodes].filter((child) => child.nodeType === Node.TEXT_NODE)
            .map((child) => child.data)])
          .filter(Boolean)"""
    )
    words = json.loads(
        (Path(__file__).parents[4] / "mistill/serve/page/words.json").read_text("utf-8")
    )
    keys = {key for key in words["en"] if "_" in key}
    assert not [text for text in said if text.strip() in keys or re.search(r"\{\w+\}", text)]


def test_the_page_follows_what_is_written_unless_the_reader_looks_elsewhere(chat, script):
    script.pieces = [f"line {number}\n\n" for number in range(200)] + ["end"]
    script.gate.clear()
    chat.say("Long")
    chat.until_last("line 199")
    at_end = """() => { const box = document.querySelector("#scroller");
      return box.scrollHeight - box.scrollTop - box.clientHeight < 60; }"""
    chat.until(at_end)
    chat.page.hover("#scroller")
    chat.page.mouse.wheel(0, -2000)
    chat.wait("#to-end")
    script.gate.set()
    chat.answer()
    assert not chat.run(at_end)
    chat.page.click("#to-end")
    chat.until(at_end)
    chat.gone("#to-end")
    # A phone's keyboard takes half of the page: the end stays in sight.
    chat.page.set_viewport_size({"width": 1280, "height": 420})
    chat.until(at_end)


def test_the_page_needs_no_one_else(chat):
    """Every file comes from the server, none of them is large, and none is asked for twice."""
    names = [url for url in chat.requests if "/static/" in url]
    assert len(names) == len(set(names))
    sizes = [len(urllib.request.urlopen(url).read()) for url in names]
    assert sum(sizes) < 200_000


def test_the_focus_is_never_lost(chat, script):
    focus = "() => document.activeElement.id || document.activeElement.dataset.do"
    chat.ask("One")
    chat.page.focus(".message.last [data-do=regenerate]")
    chat.page.keyboard.press("Enter")
    chat.until("() => document.querySelector('.versions')")
    assert chat.run(focus) == "message"
    chat.page.focus("[data-do=previous]")
    chat.page.keyboard.press("Enter")
    assert chat.run(focus) == "next"
    chat.page.focus(".message.last [data-do=delete]")
    chat.page.keyboard.press("Enter")
    assert chat.run(focus) == "message"
    chat.page.click("#new-chat")
    chat.ask("Two")
    # The buttons of a conversation appear when its name has the focus.
    chat.page.focus("#chats li:last-child .open")
    for _ in range(3):
        chat.page.keyboard.press("Tab")
    assert chat.run(focus) == "delete"
    chat.page.keyboard.press("Enter")
    chat.until("() => document.querySelectorAll('#chats li').length === 1")
    assert chat.run("() => document.activeElement.className") == "open"
    for button in ("#open-settings", "#open-shortcuts", "#rename"):
        chat.page.focus(button)
        chat.page.keyboard.press("Enter")
        chat.wait("dialog[open]")
        chat.page.keyboard.press("Escape")
        assert chat.run(focus) == button.removeprefix("#")


def test_an_edit_is_not_lost_while_an_answer_is_written(chat, script):
    chat.ask("One")
    chat.do("edit", 0)
    chat.page.fill(".editor textarea", "Edited")
    script.gate.clear()
    chat.say("Two")
    chat.page.click(".editor [type=submit]")
    assert "being written" in chat.toast
    assert chat.page.input_value(".editor textarea") == "Edited"
    script.gate.set()
    chat.answer()
    chat.page.click(".editor [type=submit]")
    chat.until("() => document.querySelectorAll('.message').length === 2")
    chat.answer()
    assert chat.texts[0] == "Edited"
    chat.do("edit", 0)
    chat.wait(".editor")


def test_text_that_runs_from_right_to_left_does_so(chat, script):
    script.pieces = ["مرحبا بالعالم\n\nHello\n\n```\nشفرة x = 1\n```"]
    chat.ask("שלום עולם")
    sides = chat.run(
        """() => [...document.querySelectorAll(".text p, .mine .text, .text pre")].map((node) => {
          const range = document.createRange();
          range.selectNodeContents(node);
          const [text, box] = [range.getBoundingClientRect(), node.getBoundingClientRect()];
          return text.left - box.left > box.right - text.right ? "right" : "left";
        })"""
    )
    assert sides[1:] == ["right", "left", "left"]
    assert (
        chat.run("() => getComputedStyle(document.querySelector('.mine .text')).direction") == "rtl"
    )
