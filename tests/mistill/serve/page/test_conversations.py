"""Conversations in the browser: kept, found, renamed, deleted, moved by file, however many."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.mistill.serve.page.chat_page import WRITING

pytestmark = pytest.mark.slow

NO_DATABASE = "Object.defineProperty(window, 'indexedDB', {value: undefined});"
NO_STORAGE = """
for (const name of ["indexedDB", "localStorage", "sessionStorage"]) {
  const get = () => { throw new DOMException("denied", "SecurityError"); };
  Object.defineProperty(window, name, { get });
}
"""
FULL = """
IDBObjectStore.prototype.put = () => { throw new DOMException("no room", "QuotaExceededError"); };
"""


def talk(chat, *questions: str) -> None:
    """A conversation for each question."""
    for question in questions:
        chat.page.click("#new-chat")
        chat.ask(question)


def imported(chat, file: Path) -> str:
    """What the page says about a file that is imported."""
    chat.page.set_input_files("#import-file", file)
    chat.until("() => document.querySelector('#import-result').textContent !== ''")
    text: str = chat.page.locator("#import-result").text_content()
    chat.run("() => { document.querySelector('#import-result').textContent = ''; }")
    return text


def exported(chat, tmp_path: Path, selector: str = "#export-all") -> Path:
    with chat.page.expect_download() as download:
        chat.page.locator(selector).first.dispatch_event("click")
    file: Path = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    return file


def test_conversations_outlive_the_page(chat, script):
    script.pieces = ["An ", "answer"]
    chat.ask("First question\nwith a second line")
    chat.page.click("#new-chat")
    chat.ask("Second question")
    chat.lists(["Second question", "First question"])
    chat.page.reload()
    chat.wait(".message")
    # The one that was open is open again, with its speed.
    assert chat.texts == ["Second question", "An answer"]
    assert "3 tokens" in chat.page.locator(".message.last .facts").inner_text()
    chat.turn_to("First question")
    assert chat.texts == ["First question\nwith a second line", "An answer"]


def test_what_was_written_when_the_page_was_closed_is_kept(chat, script):
    script.gate.clear()
    script.pieces = ["Some words", " more"]
    chat.say("Go")
    chat.until("() => document.querySelector('.message.last .text').textContent === 'Some words'")
    # The page keeps an answer every two seconds while it is written.
    script.pieces = []
    chat.page.wait_for_timeout(100)
    chat.page.reload()
    chat.wait(".message.last")
    assert chat.texts[0] == "Go"
    chat.wait(".message.last [data-do=regenerate]")


def test_search_looks_into_titles_and_messages(chat, script):
    script.pieces = ["About <b>apples</b> and 사과나무."]
    talk(chat, "Fruit")
    script.pieces = ["About cars."]
    talk(chat, "Traffic", "Trains")
    chat.page.keyboard.press("Control+k")
    for wanted, titles in (
        ("APPLES", ["Fruit"]), ("사과", ["Fruit"]), ("tra", ["Trains", "Traffic"]),
        ("about", ["Trains", "Traffic", "Fruit"]), ("nothing like it", []),
    ):  # fmt: skip
        chat.page.keyboard.press("Control+a")
        chat.page.keyboard.type(wanted)
        chat.until(
            "(count) => document.querySelector('#search-status').textContent.endsWith(` ${count}`)",
            len(titles),
        )
        chat.lists(titles)
    chat.page.fill("#search", "tra")
    chat.lists(["Trains", "Traffic"])
    assert chat.page.locator("#chats .name mark").all_text_contents() == ["Tra", "Tra"]
    chat.page.fill("#search", "apples")
    chat.until("() => document.querySelectorAll('#chats li').length === 1")
    assert chat.page.locator("#chats .place mark").inner_text() == "apples"
    assert "<b>apples</b>" in chat.page.locator("#chats .place").inner_text()
    chat.page.click("#chats .open")
    chat.wait(".message.hit")
    chat.page.focus("#search")
    chat.page.keyboard.press("Escape")
    chat.until("() => document.querySelectorAll('#chats li').length === 3")


def test_a_conversation_is_renamed_from_the_list_and_from_its_title(chat):
    talk(chat, "One", "Two")
    chat.page.click("#rename")
    chat.wait("#ask")
    chat.page.fill("#ask-field", "   ")
    chat.page.keyboard.press("Enter")
    assert chat.page.locator("#ask").is_visible()
    chat.page.fill("#ask-field", " A better title ")
    chat.page.keyboard.press("Enter")
    chat.until("() => document.title === 'A better title - mistill'")
    chat.lists(["A better title", "One"])
    chat.page.hover("#chats li:last-child")
    chat.page.click("#chats li:last-child [data-do=edit]")
    chat.wait("#ask")
    assert chat.page.input_value("#ask-field") == "One"
    chat.page.fill("#ask-field", "Other")
    chat.page.click("#ask-do")
    chat.until("() => document.querySelectorAll('#chats .name')[1].textContent === 'Other'")
    # A name that the reader gave stays when the first message changes.
    chat.do("edit", 0)
    chat.page.fill(".editor textarea", "Changed")
    chat.page.click(".editor [type=submit]")
    chat.answer()
    chat.page.reload()
    chat.until("() => document.title === 'A better title - mistill'")


def test_a_conversation_is_deleted_and_comes_back(chat, script):
    talk(chat, "One", "Two")
    chat.page.keyboard.press("Shift+Control+D")
    chat.until("() => document.querySelectorAll('#chats li').length === 1")
    assert chat.toast == "“Two” has been deleted."
    assert chat.page.locator("#welcome").is_visible()
    chat.page.click("#toast-do")
    chat.until("() => document.querySelectorAll('.message').length === 2")
    chat.lists(["Two", "One"])
    # One that is being answered goes at once, and its answer with it.
    script.gate.clear()
    script.pieces = ["Never", " seen"]
    chat.page.click("#new-chat")
    chat.say("Three")
    chat.wait(WRITING)
    chat.page.keyboard.press("Shift+Control+D")
    assert script.left.wait(20)
    chat.page.wait_for_timeout(200)
    chat.page.reload()
    chat.wait("#model[data-state=ready]")
    chat.until("() => document.querySelectorAll('#chats li').length === 2")
    chat.lists(["Two", "One"])


def test_all_conversations_are_deleted_once_the_reader_says_so_again(chat):
    talk(chat, "One", "Two")
    chat.page.click("#open-settings")
    chat.page.click("#delete-all")
    chat.wait("#ask")
    assert "Conversations in this browser: 2." in chat.page.locator("#ask-about").inner_text()
    chat.page.click("#ask-cancel")
    assert chat.page.locator("#chats li").count() == 2
    chat.page.click("#delete-all")
    chat.page.click("#ask-do")
    chat.until("() => document.querySelectorAll('#chats li').length === 0")
    chat.page.reload()
    chat.wait("#model[data-state=ready]")
    chat.lists([])


@pytest.mark.parametrize("init", [NO_DATABASE, NO_STORAGE])
def test_the_page_works_where_the_browser_keeps_nothing(open_page, init):
    chat = open_page(init=init)
    assert "does not keep data" in chat.toast
    talk(chat, "One", "Two")
    chat.turn_to("One")
    assert chat.texts == ["One", "Hello there."]
    chat.page.click("#open-settings")
    assert "until the page is closed" in chat.page.locator("#where-kept").inner_text()
    chat.page.keyboard.press("Escape")
    chat.page.reload()
    chat.wait("#model[data-state=ready]")
    chat.lists([])


def test_a_full_disk_is_said_once_and_stops_nothing(open_page):
    chat = open_page(init=FULL)
    assert chat.ask("One") == "Hello there."
    assert "could not keep the conversation: no room" in chat.toast
    assert chat.ask("Two") == "Hello there."


def test_what_is_exported_is_imported_in_another_browser(open_page, script, tmp_path):
    script.pieces = ["Reply <1> & “more” 👩‍👩‍👧 \u2028 \0 end"]
    chat = open_page()
    chat.page.click("#open-settings")
    chat.page.fill("#system", "Be brief")
    chat.page.fill("#set-seed", "3")
    chat.page.keyboard.press("Escape")
    talk(chat, "One", "안녕하세요")
    script.pieces = ["Another"]
    chat.do("regenerate")
    chat.until("() => document.querySelector('.message.last .text').textContent === 'Another'")
    chat.answer()
    file = exported(chat, tmp_path)
    content = json.loads(file.read_text("utf-8"))
    assert [one["title"] for one in content["chats"]] == ["One", "안녕하세요"]

    other = open_page()
    assert imported(other, file) == "Imported: 2. Already here: 0."
    assert imported(other, file) == "Imported: 0. Already here: 2."
    other.lists(["안녕하세요", "One"])
    again = exported(other, tmp_path)
    assert json.loads(again.read_text("utf-8"))["chats"] == content["chats"]
    other.turn_to("One")
    other.ask("Go on")
    assert script.bodies[-1]["seed"] == 3
    assert script.bodies[-1]["messages"][0]["content"] == "Be brief"
    single = exported(other, tmp_path, "#chats li:last-child [data-do=export]")
    assert [one["title"] for one in json.loads(single.read_text("utf-8"))["chats"]] == [
        "안녕하세요"
    ]


def chats_file(**changes):
    message = {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Hello", "ending": "stop"}
    one = {"title": "T", "system": "", "settings": {}, "created": 1, "updated": 1}
    return {
        "format": "mistill-chats", "version": 1,
        "chats": [{**one, "messages": [message, answer], **changes}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("null", "does not hold conversations"),
        ("[" * 100_000, "not valid JSON"),
        ([], "does not hold conversations"),
        ({"format": "other", "version": 1, "chats": []}, "does not hold conversations"),
        ({**chats_file(), "version": 2}, "newer version"),
        ({**chats_file(), "chats": {}}, "does not hold conversations"),
        ({**chats_file(), "chats": [None]}, "chats[0] must be an object"),
        (chats_file(title=None), "chats[0].title must be a text"),
        (chats_file(system=["x"]), "chats[0].system must be a text"),
        (chats_file(created="now"), "chats[0].created must be a time"),
        (chats_file(updated=1e300), "chats[0].updated must be a time"),
        (chats_file(settings=[]), "chats[0].settings must be an object"),
        (
            chats_file(settings={"temperature": "hot"}),
            "chats[0].settings.temperature must be a number",
        ),
        (chats_file(settings={"top_k": 1.5}), "chats[0].settings.top_k must be a number"),
        (chats_file(messages="x"), "chats[0].messages must be a list"),
        (chats_file(messages=[7]), "chats[0].messages[0] must be an object"),
        (chats_file(messages=[{"role": "system", "content": ""}]), "messages[0].role must be user"),
        (
            chats_file(messages=[{"role": "user", "content": {}}]),
            "messages[0].content must be a text",
        ),
        (
            chats_file(messages=[{"role": "assistant", "content": "", "versions": [1]}]),
            "versions[0]",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_file_that_is_wrong_is_refused_by_name_and_nothing_of_it_is_kept(
    chat, tmp_path, content, said
):
    file = tmp_path / "chats.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    assert said in imported(chat, file)
    chat.lists([])


def test_a_file_brings_nothing_but_what_is_known(chat, tmp_path):
    talk(chat, "Mine")
    (mine,) = chat.run(
        "() => [...document.querySelectorAll('#chats li')].map((item) => item.dataset.id)"
    )
    file = tmp_path / "chats.json"
    text = json.dumps(chats_file(id=mine, count=99, running=True, evil="<img>")).replace(
        '"settings": {}', '"settings": {"seed": 1, "stream": false, "__proto__": {"n": 9}}'
    )
    file.write_text(text, "utf-8")
    assert imported(chat, file) == "Imported: 1. Already here: 0."
    # It did not take the place of the conversation whose name it bore.
    chat.lists(["Mine", "T"])
    (theirs,) = [
        one for one in json.loads(exported(chat, tmp_path).read_text("utf-8"))["chats"]
        if one["title"] == "T"
    ]  # fmt: skip
    assert set(theirs) <= {"title", "named", "created", "updated", "system", "settings", "messages"}
    assert theirs["settings"] == {"seed": 1}


def test_two_thousand_messages_open_and_go_on_as_two_do(chat, script, tmp_path):
    turns = [
        {"role": role, "content": f"{role} says **{number}**\n\n- a\n- b\n\n`code {number}`"}
        for number in range(1000)
        for role in ("user", "assistant")
    ]
    file = tmp_path / "chats.json"
    file.write_text(json.dumps(chats_file(messages=turns)), "utf-8")
    assert imported(chat, file).startswith("Imported: 1.")
    chat.page.click("#chats .open")
    chat.until_last("999")
    # Only the end is there, in sight; the rest comes when the reader goes back to it.
    shown = chat.page.locator(".message").count()
    assert shown <= 60
    assert chat.run("() => { const s = document.querySelector('#scroller');"
                    "return s.scrollHeight - s.scrollTop - s.clientHeight < 2; }")  # fmt: skip
    assert chat.ask("And on?") == "Hello there."
    assert len(script.bodies[0]["messages"]) == 2001
    assert chat.page.locator(".message").count() == shown + 2
    # Typing stays quick: no key waits for the conversation.
    seconds = chat.run(
        """() => {
          const field = document.querySelector("#message");
          const began = performance.now();
          for (let number = 0; number < 50; number += 1) {
            field.value += "x";
            field.dispatchEvent(new Event("input"));
            field.getBoundingClientRect();
          }
          return (performance.now() - began) / 1000;
        }"""
    )
    assert seconds < 5
    for _ in range(25):
        chat.run("() => document.querySelector('#earlier').click()")
    chat.until("() => document.querySelectorAll('.message').length === 2002")
    assert chat.page.locator("#earlier").is_hidden()
    assert chat.texts[0].startswith("user says **0**")
    assert chat.texts[1].startswith("assistant says 0")
    # Search finds what is not shown, and goes there.
    chat.page.reload()
    chat.wait(".message.last")
    chat.page.fill("#search", "says **123**")
    chat.until("() => document.querySelector('#chats .place')")
    chat.page.click("#chats .open")
    hit = chat.wait(".message.hit")
    assert "123" in hit.text_content()


def test_earlier_messages_come_without_moving_what_is_read(chat, script, tmp_path):
    turns = [
        {"role": role, "content": f"{role} {number} " + "words " * (number % 60)}
        for number in range(200)
        for role in ("user", "assistant")
    ]
    file = tmp_path / "chats.json"
    file.write_text(json.dumps(chats_file(messages=turns)), "utf-8")
    imported(chat, file)
    chat.page.click("#chats .open")
    chat.wait(".message.last")
    moved = chat.run(
        """async () => {
          const scroller = document.querySelector("#scroller");
          const frame = () => new Promise((go) =>
            requestAnimationFrame(() => requestAnimationFrame(go)));
          scroller.scrollTop = 900;
          await frame();
          const top = scroller.getBoundingClientRect().top + 50;
          const first = [...document.querySelectorAll(".message")]
            .find((one) => one.getBoundingClientRect().bottom > top);
          const before = first.getBoundingClientRect().top;
          document.querySelector("#earlier").click();
          await frame();
          return Math.abs(first.getBoundingClientRect().top - before);
        }"""
    )
    assert moved < 40
    assert chat.page.locator(".message").count() > 100


def test_two_thousand_conversations_are_listed_and_searched(chat, tmp_path):
    one = chats_file()["chats"][0]
    many = [
        {
            **one,
            "title": f"Number {number}",
            "created": number,
            "updated": 1_700_000_000_000 + number,
        }
        for number in range(2000)
    ]
    file = tmp_path / "chats.json"
    file.write_text(json.dumps({**chats_file(), "chats": many}), "utf-8")
    began = time.monotonic()
    assert imported(chat, file) == "Imported: 2,000. Already here: 0."
    assert time.monotonic() - began < 60
    assert chat.page.locator("#chats .name").first.text_content() == "Number 1999"
    chat.page.fill("#search", "number 1234")
    chat.until("() => document.querySelectorAll('#chats li').length === 1")


def test_what_is_typed_and_not_sent_is_kept_for_each_conversation(chat):
    talk(chat, "One", "Two")
    chat.page.fill("#message", "draft of two")
    chat.turn_to("One")
    assert chat.page.input_value("#message") == ""
    chat.page.fill("#message", "draft of one")
    chat.page.reload()
    chat.wait(".message")
    assert chat.page.input_value("#message") == "draft of one"
    chat.turn_to("Two")
    assert chat.page.input_value("#message") == "draft of two"
    chat.page.keyboard.press("Enter")
    chat.answer()
    chat.page.reload()
    chat.wait(".message")
    assert chat.page.input_value("#message") == ""


def test_a_long_paste_is_sent_whole_and_shown_folded(open_page, script):
    chat = open_page(permissions=["clipboard-read", "clipboard-write"])
    text = "\n".join(f"line {number} <b>{'word ' * 12}</b>" for number in range(9000))
    chat.run("(text) => navigator.clipboard.writeText(text)", text)
    chat.page.focus("#message")
    chat.page.keyboard.press("Control+v")
    assert chat.page.input_value("#message") == text
    assert chat.page.locator("#message").bounding_box()["height"] < 450
    chat.page.keyboard.press("Control+Enter")
    chat.answer()
    assert script.bodies[0]["messages"][0]["content"] == text
    mine = chat.page.locator(".message.mine").first
    assert len(mine.inner_text()) < 4000
    mine.locator("[aria-expanded]").click()
    assert "line 8999" in mine.inner_text()
    assert mine.locator("b").count() == 0


def test_a_text_file_that_is_dropped_becomes_text(chat):
    drop = """
    ([name, bytes, place]) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], name));
      const event = new DragEvent("drop", { dataTransfer: data, cancelable: true, bubbles: true });
      document.querySelector(place).dispatchEvent(event);
    }"""
    chat.run(drop, ["notes.txt", list("하나\ntwo".encode()), "#composer"])
    chat.until("() => document.querySelector('#message').value === '하나\\ntwo'")
    chat.run(drop, ["picture.png", [0x89, 0x50, 0x4E, 0x47, 0, 0xFF], "#scroller"])
    assert chat.toast == "Only text files in UTF-8 can be read."
    assert chat.page.input_value("#message") == "하나\ntwo"


def test_two_tabs_show_the_same_conversations(chat):
    other = chat.page.context.new_page()
    chat.watch(other)
    other.goto(chat.address)
    other.wait_for_selector("#model[data-state=ready]")
    chat.ask("From the first tab")
    other.wait_for_selector("#chats .open >> text=From the first tab")
    other.click("#chats .open")
    other.wait_for_selector(".message")
    chat.ask("More")
    other.wait_for_function("() => document.querySelectorAll('.message').length === 4")


def test_a_paste_that_is_text_and_a_picture_is_text(chat):
    chat.run(
        """() => {
          const data = new DataTransfer();
          data.items.add("a\\tb", "text/plain");
          data.items.add(new File([new Uint8Array([0x89, 0])], "image.png", { type: "image/png" }));
          const event = new ClipboardEvent("paste",
            { clipboardData: data, cancelable: true, bubbles: true });
          window.native = document.querySelector("#message").dispatchEvent(event);
        }"""
    )
    # The browser does it: a made-up event has no effect of its own.
    assert chat.run("() => window.native")
    assert chat.page.locator("#toast").is_hidden()


def test_the_field_grows_where_the_browser_does_not_do_it(open_page):
    chat = open_page(init="CSS.supports = () => false;")
    chat.page.locator("#message").evaluate("(field) => { field.style.fieldSizing = 'fixed'; }")
    low = chat.page.locator("#message").bounding_box()["height"]
    chat.page.fill("#message", "line\n" * 6)
    assert chat.page.locator("#message").bounding_box()["height"] > low + 80
    chat.page.fill("#message", "")
    assert chat.page.locator("#message").bounding_box()["height"] == low


def test_only_so_many_answers_to_one_message_are_kept(chat, script):
    chat.ask("Go")
    chat.run(
        "() => { window.again = () => document.querySelector('[data-do=regenerate]').click(); }"
    )
    for number in range(103):
        script.pieces = [f"number {number}"]
        chat.run("() => window.again()")
        chat.until(
            "(text) => document.querySelector('.last:not(.writing) .text')?.textContent === text",
            f"number {number}",
        )
    assert "100 / 100" in chat.page.locator(".versions").inner_text()
    chat.page.reload()
    chat.wait(".versions")
    assert "100 / 100" in chat.page.locator(".versions").inner_text()


@pytest.mark.parametrize(
    "value", ["", "{", "null", "7", "[[1, 2], 3]", '{"theme": 1, "settings": 2}']
)
def test_strange_things_in_the_browsers_storage_do_no_harm(open_page, value):
    fill = f"""
    if (location.protocol === "http:" && !sessionStorage.getItem("set")) {{
      for (const name of ["mistill-page", "mistill-drafts"]) localStorage.setItem(name, {value!r});
      sessionStorage.setItem("mistill-open", {value!r});
      sessionStorage.setItem("set", "yes");
    }}"""
    chat = open_page(init=fill)
    assert chat.ask("One") == "Hello there."
    chat.page.reload()
    chat.wait(".message")
    assert chat.texts == ["One", "Hello there."]


@pytest.mark.parametrize("version", [1, 7])
def test_a_database_of_that_name_that_is_not_ours_is_left_alone(open_page, version):
    make = f"""
    if (location.protocol === "http:") {{
      window.theirs = new Promise((resolve) => {{
        const request = indexedDB.open("mistill-chats", {version});
        request.onupgradeneeded = () => request.result.createObjectStore("theirs");
        request.onsuccess = () => {{ request.result.close(); resolve(); }};
      }});
    }}"""
    chat = open_page(init=make, ready=False)
    chat.run("() => window.theirs")
    chat.page.reload()
    chat.wait("#model[data-state=ready]")
    assert "does not keep data" in chat.toast
    assert chat.ask("One") == "Hello there."
