"""The load client against servers whose times and answers are known."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

import export
from benchmarks import ServingSettings, bench_serving
from benchmarks.serving.load import Level, quantiles, run_level
from benchmarks.serving.processes import usage_of
from benchmarks.serving.prompts import Prompts
from benchmarks.serving.serving_report import ServingReport
from benchmarks.serving.streams import Server, _lines
from mistill.errors import ServerError, SettingsError
from tests.tiny import tiny_model

GAP = 0.03


class Scripted(BaseHTTPRequestHandler):
    """Answers every request with a few pieces, a gap before each, two tokens a word."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[dict[str, Any]]] = []
    keys: ClassVar[list[str | None]] = []
    broken: ClassVar[str] = ""
    pieces: ClassVar[list[str]] = ["one", " two", " three"]

    def do_GET(self) -> None:
        self._send(b'{"data": [{"id": "a model"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        self.keys.append(self.headers["Authorization"])
        if self.broken == "refused":
            self.send_error(429)
            return
        pieces = self.pieces[: body["max_tokens"]]
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for piece in pieces:
            time.sleep(GAP)
            self._event({"choices": [{"delta": {"content": piece}}], "usage": None})
        if self.broken == "error":
            self._event({"error": {"message": "out of tea"}})
        words = len(body["messages"][0]["content"].split())
        written = len(" ".join(pieces).split())
        usage = {"prompt_tokens": 2 * words + 5, "completion_tokens": written}
        self._event({"choices": [], "usage": usage})
        if self.broken != "cut":
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def log_message(self, *_: object) -> None:
        pass

    def _event(self, value: object) -> None:
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("asked", "keys"):
        monkeypatch.setattr(Scripted, name, [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("cut", [1, 3, 7, 50])
def test_lines_have_the_time_of_the_piece_that_brought_their_end(cut: int) -> None:
    body = b"".join(
        b"%x\r\n%b\r\n" % (len(chunk), chunk)
        for chunk in (b"data: a\n\nda", b"ta: b\r\n\r\n", b": ping\n\ndata: c", b"\n\ndata: d")
    )
    body += b"0\r\n\r\n"
    pieces = [
        (float(number), body[start : start + cut])
        for number, start in enumerate(range(0, len(body), cut))
    ]
    lines = _lines(pieces, chunked=True)
    assert [line.strip() for _, line in lines] == [b"data: a", b"data: b", b"data: c"]
    # Where the line feed of each stands in the body.
    ends = [body.index(end) + len(end) - 1 for end in (b"data: a\n", b"ta: b\r\n", b"\r\n\n")]
    assert [moment for moment, _ in lines] == [end // cut for end in ends]


def test_a_body_without_chunks_ends_where_its_length_says() -> None:
    content = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\ndata: [DONE]\n\n'

    class Plain(Scripted):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._send(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Plain) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            reply = Server(url).reply([{"role": "user", "content": "?"}], max_tokens=1)
        finally:
            server.shutdown()
    assert reply.text == "x"


@pytest.mark.parametrize("body", [b"zz\r\ndata: x\r\n", b"", b"5\r\ndat"])
def test_a_body_of_broken_chunks_is_refused_in_words(body: bytes) -> None:
    class Broken(Scripted):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            with pytest.raises(ServerError, match=r"without a size|without \[DONE\]"):
                Server(url).reply([{"role": "user", "content": "?"}], max_tokens=1)
        finally:
            server.shutdown()


def test_the_times_of_a_reply_are_those_at_which_it_came(url: str) -> None:
    server = Server(url, key="secret")
    assert server.model == "a model"
    reply = server.reply([{"role": "user", "content": "a b c"}], max_tokens=3)
    assert (reply.text, reply.prompt_tokens, reply.new_tokens) == ("one two three", 11, 3)
    assert len(reply.gap_seconds) == 2
    # A sleep is never shorter than asked for.
    assert min(reply.first_token_seconds, *reply.gap_seconds) > 0.9 * GAP
    assert reply.seconds >= reply.first_token_seconds + sum(reply.gap_seconds)
    assert Scripted.keys == ["Bearer secret"]
    assert Scripted.asked[0]["stream_options"] == {"include_usage": True}


def test_tokens_that_share_an_event_all_count(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "pieces", ["one", " two three four", " five six"])
    server = Server(url)
    reply = server.reply([{"role": "user", "content": "a"}], max_tokens=6)
    assert (reply.events, reply.new_tokens) == (3, 6)
    # Five tokens come after the first one, in two gaps.
    assert reply.tokens_per_second == pytest.approx(5 / sum(reply.gap_seconds))
    level = run_level(server, Prompts(server, 40), clients=2, requests=1, new_tokens=6)
    assert (level.new_tokens, level.tokens_per_event) == (12, 2.0)
    assert len(level.gap_seconds) == 4
    one = server.reply([{"role": "user", "content": "a"}], max_tokens=1)
    assert one.tokens_per_second is None


def test_prompts_have_the_length_that_was_asked_for_and_differ_from_the_start(url: str) -> None:
    server = Server(f"{url}/v1/")
    prompts = Prompts(server, 105)
    asked = [prompts.next() for _ in range(20)]
    assert len({messages[0]["content"][:7] for messages in asked}) == 20
    lengths = {server.reply(messages, max_tokens=1).prompt_tokens for messages in asked[:3]}
    assert max(lengths) - min(lengths) <= 2
    assert abs(lengths.pop() - 105) <= 2


def test_a_level_counts_what_all_clients_got(url: str) -> None:
    server = Server(url)
    level = run_level(
        server,
        Prompts(server, 40),
        clients=3,
        requests=2,
        new_tokens=3,
        process=os.getpid(),
    )
    assert (level.replies, level.failures, level.new_tokens) == (6, 0, 18)
    assert len(level.first_token_seconds) == 6
    assert len(level.gap_seconds) == 12
    # Three clients at once, each of whom waits three gaps for each of two replies.
    assert 0 < level.tokens_per_second <= 18 / (6 * GAP)
    assert level.peak_bytes is None or level.peak_bytes > 10**6
    assert level.to_dict()["gap_seconds"]["p50"] >= 0.9 * GAP


def test_quantiles_are_those_worked_by_hand() -> None:
    assert quantiles([0.0, 1.0, 2.0, 3.0, 100.0])["p50"] == 2
    assert quantiles(list(range(101)))["p99"] == 99
    assert quantiles([]) == {"p50": None, "p99": None}


@pytest.mark.parametrize(
    ("broken", "words"),
    [("cut", "without .DONE."), ("error", "out of tea"), ("refused", "answered 429")],
)
def test_a_reply_that_is_not_whole_counts_as_a_failure(
    url: str, monkeypatch: pytest.MonkeyPatch, broken: str, words: str
) -> None:
    server = Server(url)
    prompts = Prompts(server, 20)
    monkeypatch.setattr(Scripted, "broken", broken)
    with pytest.raises(ServerError, match=words):
        run_level(server, prompts, clients=1, requests=1, new_tokens=3)


def test_a_target_that_is_no_server_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="neither a folder nor an address"):
        bench_serving(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match="must be an address"):
        Server("ftp://example.org")
    with pytest.raises(ServerError, match="does not name a model"):
        Server("http://127.0.0.1:1")
    for options in ({"clients": ("0",)}, {"clients": ()}, {"new_tokens": 1}, {"requests": 0}):
        with pytest.raises(SettingsError):
            ServingSettings(**options)


def test_the_report_holds_every_number_of_clients(url: str) -> None:
    report = bench_serving(url, clients=(2, 1), requests=1, rounds=2, new_tokens=2)
    figures = report.figures()
    assert list(figures) == [1, 2]
    assert figures[1]["times_the_first"] == 1
    assert figures[2]["failures"] == 0
    assert len(report.to_dict()["levels"]) == 4
    console = Console(width=100, record=True)
    console.print(report.table())
    shown = console.export_text()
    assert "tokens/s" in shown
    assert "tokens/event" in shown
    assert figures[1]["tokens_per_event"] == 1


def test_a_folder_is_served_while_it_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    folder = export.to_onnx(tiny_model(tmp_path / "model"), tmp_path / "bot", parity_positions=0)
    report = bench_serving(
        folder, clients=(1, 2), requests=1, rounds=1, prompt_tokens=200, new_tokens=8, threads=1
    )
    level = report.levels[2][0]
    assert (level.replies, level.failures, level.new_tokens) == (2, 0, 16)
    if usage_of(os.getpid()) is not None:
        assert level.peak_bytes is not None
        assert level.peak_bytes > 10**7


def test_where_no_gap_was_timed_the_table_has_a_dash() -> None:
    level = Level(
        clients=1, replies=1, failures=0, new_tokens=1, tokens_per_second=5.0,
        first_token_seconds=(0.2,), gap_seconds=(), tokens_per_event=1.0, prompt_tokens=9.0,
        processor_seconds=None, peak_bytes=None,
    )  # fmt: skip
    report = ServingReport(
        name="bot", settings=ServingSettings(clients=(1,)), machine={}, levels={1: [level]}
    )
    shown = io.StringIO()
    Console(file=shown, width=120).print(report.table())
    assert "200 / 200" in shown.getvalue()
    assert "- / -" in shown.getvalue()
    assert report.to_dict()["clients"]["1"]["gap_p50"] is None
