"""Queues, clients that leave, crashes, the end of the server, and logs."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import mistill
from mistill.errors import MissingExtraError, SettingsError
from mistill.serve import chat as chat_module
from mistill.serve.http import server as server_module
from mistill.serve.replies import Reply
from mistill.serve.running import serve
from mistill.serve.settings import Limits
from tests.mistill.serve.running import Answer, RunningServer, running, until

QUESTIONS = [f"The wind number {number}" for number in range(10)]


class Gate:
    """Holds the engine before each token until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.steps = threading.Semaphore(0)
        self.tokens = 0
        write = Reply.token

        def held(reply: Reply, token: int) -> bool:
            while not self.open.is_set() and not self.steps.acquire(timeout=0.01):
                pass
            self.tokens += 1
            return write(reply, token)

        monkeypatch.setattr(Reply, "token", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    one = Gate(monkeypatch)
    yield one
    one.open.set()


@pytest.fixture
def asking() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def post(server: RunningServer, **fields: Any) -> socket.socket:
    """A request whose answer nobody has read yet."""
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 64,
        "temperature": 0,
        "ignore_eos": True,
        **fields,
    }
    content = json.dumps(body).encode()
    connection = server.connect()
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    )
    return connection


def cancelled(server: RunningServer) -> int:
    endings = server.app.served.scheduler.statistics().endings
    return int(endings.get("cancelled", 0))


def asked_of(server: RunningServer) -> int:
    """Replies that are written or wait."""
    health = server.health()
    return int(health.running + health.waiting)


def test_requests_beyond_the_queue_are_told_when_to_come_back(
    chatbot: Path, gate: Gate, asking: ThreadPoolExecutor
) -> None:
    with running(chatbot, slots=2, queue=1) as server:
        asked: list[Future[Answer]] = []
        for number in range(3):
            asked.append(asking.submit(server.chat, QUESTIONS[number]))
            until(lambda: asked_of(server) == len(asked))
        for stream in (False, True):
            answer = server.chat(QUESTIONS[3], stream=stream)
            assert answer.status == 429
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert answer.error["type"] == "rate_limit_error"
        gate.open.set()
        texts = [one.result().text for one in asked]
        assert texts == [server.chat(question).text for question in QUESTIONS[:3]]


def test_a_request_does_not_wait_for_ever(
    chatbot: Path, gate: Gate, asking: ThreadPoolExecutor
) -> None:
    with running(chatbot, slots=1, queue_seconds=0.3) as server:
        first = asking.submit(server.chat)
        until(lambda: server.health().running == 1)
        assert server.chat().status == 429
        assert server.health().waiting == 0
        gate.open.set()
        assert first.result().status == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["queued", "in its prompt", "at its third token"])
def test_a_client_that_leaves_frees_its_row_and_changes_nobody(
    chatbot: Path, gate: Gate, asking: ThreadPoolExecutor, when: str, stream: bool
) -> None:
    slots = 1 if when == "queued" else 2
    with running(chatbot, slots=slots) as server:
        stays = asking.submit(server.chat, max_tokens=48, ignore_eos=True)
        until(lambda: server.health().running == 1)
        content = "wind " * 60 if when == "in its prompt" else "Another"
        leaves = post(
            server, stream=stream, messages=[{"role": "user", "content": content}], max_tokens=400
        )
        if when == "queued":
            until(lambda: server.health().waiting == 1)
        else:
            until(lambda: asked_of(server) == 2)
            if when == "at its third token":
                for _ in range(8):
                    gate.steps.release()
                until(lambda: gate.tokens == 8)
        leaves.close()
        if when == "queued":
            until(lambda: server.health().waiting == 0)
        gate.open.set()
        until(lambda: cancelled(server) == 1)
        text = stays.result().text
        assert server.health().running == 0
        assert text == server.chat(max_tokens=48, ignore_eos=True).text
        # Of 400 tokens hardly any were written for the one who left.
        assert server.app.served.scheduler.statistics().new_tokens < 200


def test_conversations_side_by_side_are_those_of_solo_runs(
    server: RunningServer, asking: ThreadPoolExecutor
) -> None:
    alone = [server.chat(question, max_tokens=12, seed=1).text for question in QUESTIONS]
    asked = [
        asking.submit(server.chat, QUESTIONS[number % 10], max_tokens=12, seed=1)
        for number in range(200)
    ]
    texts = []
    for one in asked:
        answer = one.result()
        if answer.status != 429:
            texts.append(answer.text)
    assert texts == [alone[number % 10] for number in range(200)]


def test_prompts_that_share_a_beginning_get_the_text_of_a_fresh_read(chatbot: Path) -> None:
    texts = ["The strong cold wind blows", "The strong cold wind", "The strong cold wind blows on"]
    with running(chatbot, prefix_mib=0) as fresh:
        expected = [fresh.chat(text, seed=1).text for text in texts]
    with running(chatbot, slots=1) as server:
        for number in (0, 0, 1, 2, 0):
            answer = server.chat(texts[number], seed=1).json
            assert answer["choices"][0]["message"]["content"] == expected[number]
        usage = answer["usage"]
        assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


# --- crashes and the end --------------------------------------------------------------------------


def test_a_crash_of_the_engine_is_told_to_everybody_and_ends_the_server(
    chatbot: Path,
    gate: Gate,
    asking: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(server_module, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(server_module, "_TELL_SECONDS", 1.5)
    with running(chatbot) as server:
        whole = asking.submit(server.chat)
        stream = asking.submit(server.chat, stream=True)
        until(lambda: asked_of(server) == 2)
        gate.steps.release()
        gate.steps.release()
        until(lambda: gate.tokens >= 2)

        def boom(*_: Any) -> Any:
            raise SystemError("canary of a crash")

        monkeypatch.setattr(server.app.served.scheduler, "_step", boom)
        gate.open.set()
        assert whole.result().status == 500
        content = stream.result().content
        if stream.result().status == 200:
            *_, error, done = [part for part in content.split(b"\n\n") if part]
            assert b'data: {"error":' in error
            assert done == b"data: [DONE]"
        else:
            assert stream.result().status == 500
        assert server.ask("/health").status == 503
        assert server.chat().status == 503
        until(lambda: server.codes)
        assert server.codes == [1]
    assert "canary of a crash" not in content.decode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_mistake_of_ours_is_told_and_named_without_its_words(
    server: RunningServer,
    stream: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    taken = 0

    def take(turn: Any, happened: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 3:
            raise KeyError("canary")
        return whole(turn, happened)

    whole = chat_module._Turn.take
    monkeypatch.setattr(chat_module._Turn, "take", take)
    answer = server.chat("canary", stream=stream)
    if answer.status == 200:  # it had begun
        assert stream
        assert answer.events[-1]["error"]["type"] == "server_error"
    else:
        assert answer.status == 500
    assert "KeyError at" in caplog.text
    assert "canary" not in caplog.text + answer.content.decode()
    monkeypatch.undo()
    assert server.chat().status == 200


def test_a_stop_lets_replies_end(chatbot: Path, asking: ThreadPoolExecutor) -> None:
    with running(chatbot) as server:
        stream = asking.submit(server.chat, stream=True, max_tokens=300, ignore_eos=True)
        until(lambda: server.health().running == 1)
        server.server.stop()
        events = stream.result().events
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        until(lambda: server.codes)
        assert server.codes == [0]


def test_a_stop_ends_replies_that_take_too_long_with_an_error(
    chatbot: Path, gate: Gate, asking: ThreadPoolExecutor
) -> None:
    with running(chatbot, limits=Limits(drain_seconds=0.3)) as server:
        whole = asking.submit(server.chat, max_tokens=400, ignore_eos=True)
        until(lambda: server.health().running == 1)
        stream = asking.submit(server.chat, stream=True, max_tokens=400, ignore_eos=True)
        until(lambda: asked_of(server) == 2)
        for _ in range(6):
            gate.steps.release()
        until(lambda: gate.tokens == 6)
        server.server.stop()
        until(lambda: server.app.stopping)
        refused = server.chat()
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) > 0
        assert server.ask("/health").status == 503
        time.sleep(0.4)
        gate.steps.release()
        gate.steps.release()
        gate.open.set()
        assert stream.result().events[-1]["error"]["code"] == "stopped"
        assert whole.result().status == 500
        until(lambda: server.codes)
        assert server.codes == [0]


@contextlib.contextmanager
def process(chatbot: Path, **options: Any) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """mistill serve as a command, and its port."""
    code = "import sys; from mistill.cli import main; sys.exit(main(sys.argv[1:]))"
    root = str(Path(mistill.__file__).parents[1])
    command = [sys.executable, "-c", code, "serve", str(chatbot), "--port", "0", "--threads", "1"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        **options,
    ) as one:
        assert one.stdout is not None
        first = one.stdout.readline()
        try:
            yield one, int(first.strip().rstrip("/").rpartition(":")[2])
        finally:
            one.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_with_0(chatbot: Path, number: int) -> None:
    # Whoever runs the tests in the background may have them ignore SIGINT, and a server that
    # inherits that goes on ignoring it.
    def heed() -> None:
        signal.signal(number, signal.SIG_DFL)

    with process(chatbot, stderr=subprocess.PIPE, preexec_fn=heed) as (command, port):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        command.send_signal(number)
        assert command.wait(60) == 0
        assert command.stderr is not None
        assert "Traceback" not in command.stderr.read()
        connection.close()


def test_a_second_signal_ends_it_now(chatbot: Path) -> None:
    with process(chatbot, stderr=subprocess.DEVNULL) as (command, port):
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "n": 4}
        body |= {"ignore_eos": True, "max_tokens": 450, "logprobs": True, "top_logprobs": 20}
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(body),
            {"Content-Type": "application/json"},
        )
        assert connection.getresponse().status == 200
        command.send_signal(signal.SIGTERM)
        command.send_signal(signal.SIGTERM)
        assert command.wait(60) == 0
        connection.close()


def test_a_closed_standard_error_stops_no_answer(chatbot: Path) -> None:
    with process(chatbot, preexec_fn=lambda: os.close(2)) as (command, port):
        for _ in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/v1/models")
            assert connection.getresponse().status == 200
            connection.close()
        command.send_signal(signal.SIGTERM)
        assert command.wait(60) == 0


def test_a_log_that_fails_stops_no_answer(server: RunningServer) -> None:
    class Full(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError(28, "No space left on device")

    handler, logger = Full(), logging.getLogger("mistill.serve")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        assert server.chat().status == 200
        assert server.ask("/no").status == 404
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


# --- logs -----------------------------------------------------------------------------------------


def test_no_log_at_any_level_holds_a_word_of_a_conversation(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    names = [None, "mistill", "mistill.serve", "uvicorn", "uvicorn.error", "asyncio", "h11"]
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            caplog.set_level(1, logger=name)
        server.chat("canary")
        server.chat("canary", stream=True, stop=["canary"])
        server.chat("canary " * 400)
        server.chat(messages=[{"role": "canary", "content": "canary"}])
        server.chat(messages=[{"role": "user", "content": {"canary": 1}}])
        server.chat(model="canary", canary="canary")
        server.chat(response_format={"type": "regex", "regex": "canary["})
        server.ask("/v1/completions", {"prompt": "canary", "echo": True, "logprobs": 1})
        server.ask("/v1/completions", b'{"canary')
        server.ask("/canary?canary=canary", headers={"X-Canary": "canary", "Host": "canary"})
        server.ask("/canary", method="CANARY")
        server.raw(b"canary\r\n\r\n")
        with post(server, stream=True, messages=[{"role": "user", "content": "canary"}]):
            pass
        until(lambda: server.health().running == 0)
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
    assert "POST /v1/chat/completions 200" in caplog.text
    assert "canary" not in caplog.text.lower()


def test_the_command_prints_its_addresses(chatbot: Path) -> None:
    with process(chatbot, stderr=subprocess.DEVNULL) as (command, port):
        assert command.stdout is not None
        line = f"for clients: base_url http://127.0.0.1:{port}/v1, model {chatbot.name}"
        assert command.stdout.readline().strip() == line
        command.send_signal(signal.SIGTERM)
        assert command.wait(60) == 0


def test_the_page_can_be_left_out(chatbot: Path) -> None:
    with running(chatbot, page=False) as server:
        assert server.ask("/").status == server.ask("/static/page.js").status == 404
        assert not server.server.has_page
        assert server.ask("/v1/models").status == 200


def test_metrics_count_what_was_served_in_prometheus_text(chatbot: Path) -> None:
    with running(chatbot, metrics=True) as server:

        def metrics() -> dict[str, float]:
            lines = server.ask("/metrics").content.decode().splitlines()
            values = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
            return {name: float(value) for name, value in values}

        before = metrics()
        answer = server.chat("A question that nobody asked", max_tokens=5, ignore_eos=True)
        after = metrics()
    usage = answer.json["usage"]

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("mistill_prompt_tokens_total") == usage["prompt_tokens"]
    assert grown("mistill_generation_tokens_total") == 5
    assert grown('mistill_request_success_total{finished_reason="length"}') == 1
    assert grown("mistill_time_to_first_token_seconds_count") == 1
    assert grown('mistill_e2e_request_latency_seconds_bucket{le="+Inf"}') == 1
    assert grown('mistill_http_requests_total{status="200"}') == 2
    assert after["mistill_num_requests_running"] == 0


def test_a_server_runs_on_the_provider_it_is_given_or_not_at_all(
    chatbot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingExtraError, match="has no CUDAExecutionProvider here"):
        serve(chatbot, provider="cuda", port=0)
    with pytest.raises(SettingsError, match=r"provider must be cpu, cuda, .* or directml"):
        serve(chatbot, provider="gpu", port=0)  # type: ignore[arg-type]
