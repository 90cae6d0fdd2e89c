"""Korean is typed syllable by syllable: no key of the input method sends half a word."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

SYLLABLE = ("ㅎ", "하", "한")


class InputMethod:
    """What a Korean input method does, over the DevTools protocol."""

    def __init__(self, chat):
        self.session = chat.page.context.new_cdp_session(chat.page)

    def compose(self, text: str) -> None:
        self.session.send(
            "Input.imeSetComposition",
            {"text": text, "selectionStart": len(text), "selectionEnd": len(text)},
        )

    def commit(self, text: str) -> None:
        self.session.send("Input.insertText", {"text": text})

    def key(self, name: str) -> None:
        """A key that the input method takes: its code is 229 for the page."""
        for kind in ("rawKeyDown", "keyUp"):
            self.session.send(
                "Input.dispatchKeyEvent",
                {"type": kind, "key": name, "code": name, "windowsVirtualKeyCode": 229},
            )


@pytest.fixture
def method(chat) -> InputMethod:
    return InputMethod(chat)


def test_enter_during_a_syllable_sends_nothing_and_the_next_one_sends_all(chat, script, method):
    chat.page.focus("#message")
    for text in SYLLABLE:
        method.compose(text)
    method.key("Enter")
    assert script.bodies == []
    assert chat.page.locator(".message").count() == 0
    method.commit("한")
    # Chrome reports the same key press again once the syllable is whole.
    chat.page.keyboard.press("Enter")
    chat.answer()
    assert [body["messages"][-1]["content"] for body in script.bodies] == ["한"]
    assert chat.page.input_value("#message") == ""


def test_enter_that_is_marked_only_as_composing_sends_nothing(chat, script, method):
    chat.page.focus("#message")
    method.compose("하")
    chat.page.keyboard.press("Enter")  # key code 13, isComposing true
    assert script.bodies == []
    assert chat.page.locator(".message").count() == 0


def test_enter_that_is_marked_only_by_its_code_sends_nothing(chat, script):
    # Safari: the composition has ended when the key press comes, and only 229 is left of it.
    chat.page.fill("#message", "한글")
    chat.run(
        """() => document.querySelector("#message").dispatchEvent(new KeyboardEvent("keydown",
          { key: "Enter", code: "Enter", keyCode: 229, bubbles: true, cancelable: true }))"""
    )
    assert chat.page.locator(".message").count() == 0
    assert script.bodies == []


def test_a_click_on_send_in_the_middle_of_a_syllable_sends_it_whole(chat, script, method):
    chat.page.focus("#message")
    method.commit("안녕하세")
    method.compose("ㅇ")
    method.compose("요")
    chat.page.click("#send")
    chat.answer()
    assert [body["messages"][-1]["content"] for body in script.bodies] == ["안녕하세요"]
    chat.page.wait_for_timeout(200)
    assert chat.page.input_value("#message") == ""
    assert len(script.bodies) == 1


def test_send_that_leaves_the_focus_where_it_is_waits_for_the_syllable(chat, script, method):
    # A voice or a switch presses a button without taking the focus from the field.
    chat.page.focus("#message")
    method.commit("안녕하세")
    method.compose("요")
    chat.run("() => document.querySelector('#send').click()")
    chat.answer()
    assert [body["messages"][-1]["content"] for body in script.bodies] == ["안녕하세요"]
    assert chat.page.input_value("#message") == ""


def test_shift_and_ctrl_with_enter_wait_for_the_syllable_too(chat, script, method):
    chat.page.focus("#message")
    method.compose("한")
    chat.page.keyboard.press("Control+Enter")
    assert script.bodies == []
    method.commit("한")
    chat.page.keyboard.press("Control+Enter")
    chat.answer()
    assert script.bodies[0]["messages"][-1]["content"] == "한"


def test_escape_during_a_syllable_does_not_stop_the_answer(chat, script, method):
    script.gate.clear()
    chat.say("Go")
    chat.page.focus("#message")
    method.compose("하")
    method.key("Escape")
    chat.page.wait_for_timeout(100)
    assert chat.page.locator("#stop").is_visible()
    assert not script.left.is_set()


def test_the_same_holds_where_a_message_is_edited(chat, script, method):
    chat.ask("처음")
    chat.do("edit", 0)
    chat.wait(".editor textarea").fill("")
    method.compose("한")
    method.key("Escape")
    chat.page.keyboard.press("Control+Enter")
    assert chat.page.locator(".editor").is_visible()
    assert len(script.bodies) == 1
    method.commit("한")
    chat.page.keyboard.press("Control+Enter")
    chat.answer()
    assert script.bodies[1]["messages"][-1]["content"] == "한"


def test_the_same_holds_where_a_title_is_given(chat, method):
    chat.ask("처음")
    chat.page.click("#rename")
    chat.wait("#ask")
    chat.page.fill("#ask-field", "")
    chat.page.focus("#ask-field")
    method.compose("제모")
    method.key("Enter")
    chat.page.keyboard.press("Enter")
    assert chat.page.locator("#ask").is_visible()
    method.commit("제목")
    chat.page.keyboard.press("Enter")
    chat.until("() => document.title === '제목 - mistill'")


def test_search_finds_a_syllable_while_it_is_composed(chat, method):
    chat.ask("한국어 질문")
    chat.page.focus("#search")
    method.compose("한")
    chat.until("() => document.querySelector('#search-status').textContent.endsWith(' 1')")
    method.key("Escape")
    assert chat.page.input_value("#search") != ""


def test_shortcuts_work_with_a_korean_layout(chat):
    chat.ask("하나")
    chat.run(
        """() => document.body.dispatchEvent(new KeyboardEvent("keydown",
          { key: "ㅒ", code: "KeyO", ctrlKey: true, shiftKey: true, bubbles: true }))"""
    )
    chat.wait("#welcome")
