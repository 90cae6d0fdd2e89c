"""Answers: streamed, stopped, written anew, gone on with, edited, copied, deleted; and errors."""

from __future__ import annotations

import json
import time

import pytest

from tests.mistill.serve.page.chat_page import DONE
from tests.mistill.serve.page.scripted_server import scripted_server

pytestmark = pytest.mark.slow

CODE = 'Try this:\n\n```python\nprint("a\\tb")\n\tprint(1)\n```\n\nDone **now**. \n'
CLIPBOARD = ["clipboard-read", "clipboard-write"]


def contents(body) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def test_an_answer_appears_while_it_is_written(chat, script):
    script.gate.clear()
    script.pieces = ["One ", "two ", "**three**", " end"]
    chat.say("Count")
    chat.until(
        "() => document.querySelector('.message.last .text strong')?.textContent === 'three'"
    )
    assert chat.texts == ["Count", "One two three"]
    assert chat.page.locator(".message.last").get_attribute("aria-busy") == "true"
    script.gate.set()
    assert chat.answer() == "One two three end"
    assert chat.page.locator(".message.last").get_attribute("aria-busy") == "false"
    (body,) = script.bodies
    assert contents(body) == [("user", "Count")]
    assert body["model"] == "chatbot"
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    # The chatbot's own defaults hold where the reader set nothing.
    assert set(body) == {"model", "messages", "stream", "stream_options"}


def test_events_are_read_however_their_lines_end_and_wherever_they_are_cut(chat):
    events = [
        "data: one",
        ": a comment",
        "data:two\ndata: lines",
        "event: x\ndata: 한글 👍",
        "id: 4",
    ]
    for end in ("\n", "\r\n", "\r"):
        text = "".join(event.replace("\n", end) + end + end for event in events)
        for size in (1, 2, 3, 1000):
            read = chat.run(
                """async ([bytes, size]) => {
                  const file = new URL("static/api.js", document.baseURI);
                  const { eventsOf } = await import(file);
                  const pieces = [];
                  for (let at = 0; at < bytes.length; at += size) {
                    pieces.push(new Uint8Array(bytes.slice(at, at + size)));
                  }
                  const stream = new ReadableStream({
                    pull(control) {
                      if (pieces.length) control.enqueue(pieces.shift()); else control.close();
                    },
                  });
                  const events = [];
                  for await (const data of eventsOf(stream)) events.push(data);
                  return events;
                }""",
                [list(text.encode()), size],
            )
            assert read == ["one", "two\nlines", "한글 👍"], (end, size)


def test_the_speed_is_what_the_server_counted_in_the_time_that_passed(chat, script):
    script.pieces = [f"w{number} " for number in range(20)]
    script.gate.clear()
    began = time.monotonic()
    chat.say("Go")
    chat.until_last("w18")
    chat.page.wait_for_timeout(300)
    script.gate.set()
    chat.answer()
    passed = time.monotonic() - began
    facts = chat.page.locator(".message.last .facts").inner_text()
    tokens, speed, first = facts.split(" · ")
    assert tokens == "21 tokens"  # the pieces and the end of the turn, as the server says
    rate = float(speed.removesuffix(" tokens/s").replace(",", ""))
    assert 20 / passed < rate < 20 / 0.3
    assert 0 <= float(first.removeprefix("first token after ").removesuffix(" s")) < passed


def test_an_answer_that_is_stopped_keeps_its_words_and_frees_the_server(chat, script):
    script.gate.clear()
    script.pieces = ["Some words", " and never these"]
    chat.say("Go")
    chat.until_last("words")
    chat.page.click("#stop")
    assert chat.answer() == "Some words"
    assert script.left.wait(20)
    assert "stopped" in chat.page.locator(".message.last .facts").inner_text()
    assert chat.page.locator("#send").is_visible()


def test_escape_stops_too(chat, script):
    script.gate.clear()
    script.pieces = ["Some words", " and never these"]
    chat.say("Go")
    chat.until_last("words")
    chat.page.keyboard.press("Escape")
    assert chat.answer() == "Some words"


def test_an_answer_that_was_stopped_or_cut_goes_on(chat, script):
    script.pieces, script.ending = ["Half of "], "length"
    chat.ask("Go")
    assert "most tokens" in chat.page.locator(".message.last .facts").inner_text()
    script.pieces, script.ending = ["it."], "stop"
    chat.do("continue")
    assert chat.answer() == "Half of it."
    body = script.bodies[1]
    assert contents(body) == [("user", "Go"), ("assistant", "Half of ")]
    assert body["continue_final_message"] is True
    assert body["add_generation_prompt"] is False
    # A whole answer does not go on.
    assert chat.page.locator("[data-do=continue]").count() == 0


def test_another_answer_is_written_and_the_first_stays_within_reach(chat, script):
    script.pieces = ["First"]
    chat.ask("Go")
    script.pieces = ["Second"]
    chat.do("regenerate")
    chat.until("() => document.querySelector('.message.last .text').textContent === 'Second'")
    assert chat.answer() == "Second"
    assert [contents(body) for body in script.bodies] == [[("user", "Go")]] * 2
    assert "2 / 2" in chat.page.locator(".versions").inner_text()
    chat.do("previous")
    assert chat.texts == ["Go", "First"]
    # The answer that is shown is the one that the conversation goes on with.
    script.pieces = ["Third"]
    chat.ask("More")
    assert contents(script.bodies[2]) == [("user", "Go"), ("assistant", "First"), ("user", "More")]


def test_a_message_is_sent_in_other_words_and_the_old_ones_come_back(chat, script):
    for question, reply in (("One", "Uno"), ("Two", "Due"), ("Three", "Tre")):
        script.pieces = [reply]
        chat.ask(question)
    script.pieces = ["Zwei"]
    chat.do("edit", 2)
    field = chat.wait(".editor textarea")
    assert field.input_value() == "Two"
    field.fill("Zwo")
    chat.page.click(".editor [type=submit]")
    chat.until("() => document.querySelectorAll('.message').length === 4")
    assert chat.answer() == "Zwei"
    assert chat.texts == ["One", "Uno", "Zwo", "Zwei"]
    assert contents(script.bodies[-1]) == [("user", "One"), ("assistant", "Uno"), ("user", "Zwo")]
    chat.page.click("#toast-do")
    chat.until("() => document.querySelectorAll('.message').length === 6")
    assert chat.texts == ["One", "Uno", "Two", "Due", "Three", "Tre"]


def test_an_edit_that_is_left_changes_nothing(chat, script):
    chat.ask("One")
    chat.do("edit", 0)
    chat.wait(".editor textarea").fill("Other")
    chat.page.keyboard.press("Escape")
    chat.gone(".editor")
    assert chat.texts[0] == "One"
    assert len(script.bodies) == 1


def test_what_is_copied_is_the_source(open_page, script):
    script.pieces = [CODE]
    chat = open_page(permissions=CLIPBOARD)
    chat.ask("Code, **please**")
    chat.do("copy")
    assert chat.run("() => navigator.clipboard.readText()") == CODE
    chat.page.click("[data-do=copy-code]")
    assert chat.run("() => navigator.clipboard.readText()") == 'print("a\\tb")\n\tprint(1)'
    chat.do("copy", 0)
    assert chat.run("() => navigator.clipboard.readText()") == "Code, **please**"


def test_copying_works_where_the_browser_offers_no_clipboard(open_page, script):
    script.pieces = [CODE]
    chat = open_page(
        permissions=CLIPBOARD,
        init="window.read = navigator.clipboard.readText.bind(navigator.clipboard);"
        "Object.defineProperty(navigator, 'clipboard', {value: undefined});",
    )
    chat.ask("Code")
    chat.do("copy")
    chat.wait(".message.last .done")
    assert chat.run("() => window.read()") == CODE


def test_a_message_is_deleted_with_its_answer_and_comes_back(chat, script):
    for question, reply in (("One", "Uno"), ("Two", "Due")):
        script.pieces = [reply]
        chat.ask(question)
    chat.do("delete", 0)
    assert chat.texts == ["Two", "Due"]
    chat.page.click("#toast-do")
    assert chat.texts == ["One", "Uno", "Two", "Due"]
    chat.do("delete")
    assert chat.texts == ["One", "Uno", "Two"]
    script.pieces = ["Doch"]
    chat.page.click("[data-do=answer]")
    assert chat.answer() == "Doch"
    assert contents(script.bodies[-1])[-1] == ("user", "Two")


def test_system_prompt_and_sampling_are_sent(chat, script):
    chat.page.keyboard.press("Control+Comma")
    chat.page.fill("#system", "You are terse.")
    values = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": -0.5, "frequency_penalty": 0.25, "max_tokens": 64, "seed": 7,
    }  # fmt: skip
    for name, value in values.items():
        chat.page.fill(f"#set-{name}", str(value))
    chat.page.keyboard.press("Escape")
    chat.ask("Go")
    body = script.bodies[0]
    assert {name: body[name] for name in values} == values
    assert contents(body) == [("system", "You are terse."), ("user", "Go")]
    # They hold for new conversations and after a reload, until they are taken back.
    chat.page.reload()
    chat.wait("#model[data-state=ready]")
    chat.page.click("#new-chat")
    chat.ask("Again")
    assert script.bodies[1]["seed"] == 7
    chat.page.click("#open-settings")
    chat.page.click("#reset")
    chat.page.keyboard.press("Escape")
    chat.ask("Once more")
    assert not set(values) & set(script.bodies[2])


def test_a_setting_out_of_its_range_is_named_and_not_sent(chat, script):
    chat.page.click("#open-settings")
    chat.page.fill("#set-temperature", "0.5")
    chat.page.fill("#set-temperature", "3")
    field = chat.page.locator("#set-temperature")
    assert field.get_attribute("aria-invalid") == "true"
    assert chat.page.locator("#about-temperature").inner_text() == "A number from 0 to 2."
    chat.page.keyboard.press("Escape")
    chat.ask("Go")
    assert script.bodies[0]["temperature"] == 0.5


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error", "headers", "said"),
    [
        (400, {"message": "n is too large", "code": None}, {}, "n is too large"),
        (400, {"message": "2,100 tokens, 2,048 fit", "code": "context_length_exceeded"}, {},
         "no longer fits into the model"),
        (413, {"message": "too large"}, {}, "too large"),
        (429, {"message": "x"}, {"Retry-After": "7"}, "Try again in 7 s."),
        (503, {"message": "x"}, {}, "busy"),
        (500, {"message": "the engine broke"}, {}, "the engine broke"),
        (500, None, {}, "status 500"),
        (400, {"message": {"not": "text"}}, {}, "status 400"),
    ],
)  # fmt: skip
def test_an_error_is_shown_in_words_and_the_answer_can_be_asked_for_again(
    chat, script, status, error, headers, said
):
    script.status, script.headers = status, headers
    script.error = None if error is None else {"error": error}
    chat.ask("Go")
    assert said in chat.page.locator(".message.last .error").inner_text()
    script.status = 200
    chat.do("regenerate")
    chat.gone(".error")
    assert chat.answer() == "Hello there."
    assert contents(script.bodies[-1]) == [("user", "Go")]


@pytest.mark.parametrize(
    ("event", "said"),
    [(None, "broke off"), ({"message": "the engine stopped", "code": None}, "the engine stopped")],
)
def test_a_stream_that_breaks_off_is_no_answer(chat, script, event, said):
    script.pieces, script.ending, script.event = ["Half", " an answer"], None, event
    chat.ask("Go")
    assert chat.texts[-1] == "Half an answer"
    assert said in chat.page.locator(".message.last .error").inner_text()
    script.pieces, script.ending, script.event = [" at last"], "stop", None
    chat.do("continue")
    assert chat.answer() == "Half an answer at last"


def test_a_question_without_an_answer_is_not_read_again(chat, script):
    script.status, script.error = 500, {"error": {"message": "no"}}
    chat.ask("Lost")
    script.status = 200
    chat.ask("Asked")
    assert contents(script.bodies[-1]) == [("user", "Asked")]


def test_the_page_waits_for_a_server_that_is_away(open_page):
    with scripted_server() as (address, _):
        chat = open_page(address)
        chat.ask("Before")
        port = int(address.rstrip("/").rpartition(":")[2])
    chat.page.fill("#message", "While away")
    chat.page.keyboard.press("Enter")
    chat.wait("#model[data-state=offline]")
    notice = chat.wait("#notice")
    assert "does not answer" in notice.inner_text()
    assert notice.get_attribute("role") == "alert"
    with scripted_server(port) as (_, script):
        # It comes back by itself, and can be asked for at once.
        chat.page.click("#notice-do")
        chat.wait("#model[data-state=ready]")
        assert chat.page.locator("#notice").is_hidden()
        chat.do("regenerate")
        chat.until("() => !document.querySelector('.error')")
        assert chat.answer() == "Hello there."
        assert contents(script.bodies[0])[-1] == ("user", "While away")
    # Now it is known to be away: what is typed stays in the field.
    chat.page.fill("#message", "Still away")
    chat.page.keyboard.press("Enter")
    chat.wait("#model[data-state=offline]")
    chat.page.fill("#message", "And again")
    chat.page.keyboard.press("Enter")
    assert chat.page.input_value("#message") == "And again"
    with scripted_server(port):
        chat.wait("#model[data-state=ready]")


def test_a_key_is_asked_for_and_kept_until_the_tab_is_closed(open_page, script):
    script.key = "right-key"
    chat = open_page(ready=False)
    chat.wait("#model[data-state=key]")
    assert "asks for an API key" in chat.wait("#notice").inner_text()
    chat.page.click("#notice-do")
    field = chat.page.locator("#ask-field")
    assert field.get_attribute("type") == "password"
    field.fill("wrong-key")
    chat.page.keyboard.press("Enter")
    chat.until("() => document.querySelector('#notice-text').textContent.includes('refused')")
    chat.page.click("#notice-do")
    field.fill("k é")
    chat.page.keyboard.press("Enter")
    assert field.evaluate("(field) => field.validationMessage") != ""
    field.fill("right-key")
    chat.page.keyboard.press("Enter")
    chat.wait("#model[data-state=ready]")
    assert chat.ask("Go") == "Hello there."
    chat.page.reload()
    chat.wait("#model[data-state=ready]")
    kept = json.loads(chat.run("() => JSON.stringify([{...sessionStorage}, {...localStorage}])"))
    assert "right-key" in json.dumps(kept[0])
    assert "right-key" not in json.dumps(kept[1])
    other = chat.page.context.new_page()
    other.goto(chat.address)
    other.wait_for_selector("#model[data-state=key]")


def test_a_key_in_the_address_is_taken_from_it_at_once(open_page, script):
    script.key = "a+key/%41="
    chat = open_page(fragment="#key=a%2Bkey/%2541=")
    assert chat.page.url == chat.address
    assert chat.run("() => history.length") <= 2
    assert chat.ask("Go") == "Hello there."
    assert not [url for url in chat.requests if "key/" in url or "%41" in url]
    # A link with another key, opened in the same tab.
    script.key = "second"
    chat.run("() => { location.hash = '#key=second'; }")
    chat.until("(address) => location.href === address", chat.address)
    chat.until("() => sessionStorage.getItem('mistill-key') === 'second'")
    assert chat.ask("Again") == "Hello there."
    assert script.keys[-1] == "Bearer second"


def test_a_key_that_is_lost_while_talking_is_asked_for(chat, script):
    chat.ask("Go")
    script.key = "new"
    chat.ask("More")
    assert "API key" in chat.page.locator(".message.last .error").inner_text()
    chat.wait("#model[data-state=key]")


def test_two_conversations_are_answered_at_once(chat, script):
    script.gate.clear()
    script.pieces = ["First", " end"]
    chat.say("One")
    chat.until_last("First")
    chat.page.click("#new-chat")
    chat.say("Two")
    assert chat.texts[0] == "Two"
    script.gate.set()
    assert chat.answer() == "First end"
    chat.turn_to("One")
    assert chat.answer() == "First end"
    assert chat.page.locator(DONE).count() == 1
