"""The page against the server that ships with it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from mistill.serve.settings import Limits
from tests.mistill.serve.running import running, until
from tests.mistill.serve.test_life import Gate

pytestmark = pytest.mark.slow


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Holds the engine before each token."""
    one = Gate(monkeypatch)
    yield one
    one.open.set()


def address_of(server) -> str:
    return f"http://127.0.0.1:{server.port}/"


def set_up(chat, **values) -> None:
    """Set sampling as a reader does."""
    chat.page.click("#open-settings")
    for name, value in values.items():
        chat.page.fill(f"#set-{name}", str(value))
    assert chat.page.locator("#settings [aria-invalid=true]").count() == 0
    chat.page.keyboard.press("Escape")


def contents(chat) -> list[dict[str, str]]:
    """The conversation as the browser keeps it."""
    text = chat.run(
        """() => new Promise((resolve) => {
          const request = indexedDB.open("mistill-chats");
          request.onsuccess = () => {
            const all = request.result.transaction("messages").objectStore("messages").getAll();
            all.onsuccess = () =>
              resolve(JSON.stringify(all.result.flatMap((row) => row.messages)));
          };
        })"""
    )
    return json.loads(text)  # type: ignore[no-any-return]


def test_a_conversation_is_what_the_api_says_it_is(open_page, server):
    chat = open_page(address_of(server))
    name = server.ask("/v1/models").json["data"][0]["id"]
    assert chat.page.locator("#model-name").inner_text() == name
    set_up(chat, temperature=0, max_tokens=24)
    questions = ["Hello <|im_end|> there", "안녕하세요"]
    messages: list[dict[str, str]] = []
    for question in questions:
        chat.ask(question)
        messages.append({"role": "user", "content": question})
        answer = server.chat(messages=messages, max_tokens=24)
        assert answer.status == 200
        messages.append({"role": "assistant", "content": answer.text})
        facts = chat.page.locator(".message.last .facts").inner_text()
        assert f"{answer.json['usage']['completion_tokens']} tokens" in facts
    kept = [{name: one[name] for name in ("role", "content")} for one in contents(chat)]
    assert kept == messages


def test_an_answer_that_was_cut_goes_on_where_it_ended(open_page, server):
    chat = open_page(address_of(server))
    set_up(chat, temperature=0, max_tokens=6)
    chat.ask("Hello")
    question, begun = contents(chat)
    assert begun["ending"] == "length"
    messages = [{name: one[name] for name in ("role", "content")} for one in (question, begun)]
    rest = server.chat(messages=messages, max_tokens=6, continue_final_message=True)
    assert rest.json["usage"]["completion_tokens"] > 1
    chat.do("continue")
    chat.until("(begun) => document.querySelector('.message.last .text').textContent !== begun", "")
    chat.answer()
    assert contents(chat)[-1]["content"] == begun["content"] + rest.text


def test_stop_frees_the_server_at_once(open_page, chatbot, gate):
    with running(chatbot, slots=1, temperature=0) as server:
        chat = open_page(address_of(server))
        for _ in range(2):
            chat.say("Hello")
            gate.steps.release()
            until(lambda: server.health().running == 1)
            chat.page.keyboard.press("Escape")
            chat.answer()
            until(lambda: gate.steps.release() or server.health().running == 0)
        assert server.app.served.scheduler.statistics().endings["cancelled"] == 2
        gate.open.set()
        chat.ask("Hello")
        assert chat.page.locator(".error").count() == 0


@pytest.mark.parametrize("end", ["least", "most"])
def test_the_server_takes_every_setting_that_the_page_takes(open_page, server, end):
    chat = open_page(address_of(server))
    ranges = chat.run(
        """async () => (await import(new URL("static/settings.js", document.baseURI))).SAMPLING"""
    )
    values = {one["name"]: one[end] for one in ranges}
    values["max_tokens"] = 4
    set_up(chat, **values)
    chat.ask("Hello")
    assert chat.page.locator(".error").count() == 0


def test_a_conversation_that_no_longer_fits_is_said_in_words(open_page, server):
    chat = open_page(address_of(server))
    chat.ask("word " * 5000)
    assert "no longer fits" in chat.page.locator(".error").inner_text()


def test_a_message_that_is_too_large_is_said_in_words(open_page, server):
    chat = open_page(address_of(server))
    chat.ask("x" * (2 << 20))
    error = chat.page.locator(".error").inner_text()
    assert error
    assert "does not answer" not in error


def test_the_key_of_the_true_server_is_asked_for(open_page, chatbot, tmp_path):
    file = tmp_path / "keys"
    file.write_text("a-key-that-is-long-enough-1234\n")
    file.chmod(0o600)
    with running(chatbot, api_key_file=file) as server:
        chat = open_page(address_of(server), ready=False)
        chat.wait("#model[data-state=key]")
        chat.page.click("#notice-do")
        chat.page.fill("#ask-field", "wrong")
        chat.page.keyboard.press("Enter")
        chat.until("() => document.querySelector('#notice-text').textContent.includes('refused')")
        chat.page.click("#notice-do")
        chat.page.fill("#ask-field", "a-key-that-is-long-enough-1234")
        chat.page.keyboard.press("Enter")
        chat.wait("#model[data-state=ready]")
        chat.ask("Hello")
        assert chat.page.locator(".error").count() == 0
        other = open_page(address_of(server), fragment="#key=a-key-that-is-long-enough-1234")
        assert other.page.url == address_of(server)


def test_a_server_that_is_full_says_when_to_come_back(open_page, chatbot, gate):
    with running(chatbot, slots=1, queue=0) as server:
        first = open_page(address_of(server))
        first.say("Hello")
        until(lambda: server.health().running == 1)
        second = open_page(address_of(server))
        second.ask("Hello")
        assert "Try again in" in second.page.locator(".error").inner_text()
        gate.open.set()
        first.answer()
        second.do("regenerate")
        second.gone(".error")
        second.answer()
        assert first.texts[0] == second.texts[0]
        assert second.page.locator(".error").count() == 0


def test_a_server_that_ends_while_it_answers_is_no_end_of_the_answer(open_page, chatbot, gate):
    with running(chatbot, temperature=0, limits=Limits(drain_seconds=0.2)) as server:
        chat = open_page(address_of(server))
        chat.say("Hello")
        for _ in range(12):
            gate.steps.release()
        until(lambda: gate.tokens == 12)
        server.server.stop()
        until(lambda: server.app.stopping)
        chat.page.wait_for_timeout(300)
        gate.open.set()
        chat.answer()
        assert chat.page.locator(".message.last .error").count() == 1
        assert contents(chat)[-1]["ending"] == "cut"
        until(lambda: server.codes)
    # The page finds out at the latest when it asks, and then keeps what is typed.
    chat.page.fill("#message", "Are you there?")
    chat.page.keyboard.press("Enter")
    chat.wait("#model[data-state=offline]")
    chat.page.fill("#message", "Still there?")
    chat.page.keyboard.press("Enter")
    assert chat.page.input_value("#message") == "Still there?"


def test_no_file_of_the_page_is_offered_where_the_page_is_not(chatbot):
    with running(chatbot, page=False) as server:
        for path in ("/", "/static/page.js", "/static/words.json"):
            assert server.ask(path).status == 404


@pytest.mark.parametrize(
    "path",
    [
        "/static/../serve/app.py", "/static/..%2fapp.py", "/static/%2e%2e/app.py",
        "/static/", "/static/index.html", "/static/page.js/", "/static//page.js",
        "/.git/config", "/static/.git",
        "/static/page.css?x=/../..", "/page/page.js", "/static/PAGE.JS", "/static/page.js%00.css",
    ],
)  # fmt: skip
def test_an_address_that_is_no_file_of_the_page_leads_nowhere(server, path):
    answer = server.ask(path)
    assert answer.status == (200 if "?" in path else 404)
    assert b"__future__" not in answer.content


def test_every_file_of_the_page_has_its_type_and_its_policy(server):
    from mistill.serve.http.page_files import page_files

    for path, file in page_files().items():
        answer = server.ask(path)
        assert answer.content == file.content
        assert answer.headers["content-type"] == file.content_type
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
