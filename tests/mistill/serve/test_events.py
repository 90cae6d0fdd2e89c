"""Events of a stream: tokens that come faster than eyes can follow share one, and nothing is lost.

What a stream says in all must not depend on how its tokens were put into events.
"""

from __future__ import annotations

import asyncio
import json
import time
from asyncio import selector_events
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mistill.chat.stream_text import TextStream
from mistill.errors import SettingsError
from mistill.serve import chat as chat_module
from mistill.serve.http.connections import BoundedProtocol, GatheringTransport
from mistill.serve.replies import DueInboxes, End, Failure, Inbox, Piece, Replies, Reply
from mistill.serve.requests import ChatRequest
from mistill.serve.settings import ServeSettings
from mistill.text.vocabulary import load_vocabulary
from tests.mistill.serve.running import RunningServer, running, until, with_template
from tests.mistill.serve.test_forms import HERMES, PERSON, TOOLS, form
from tests.mistill.serve.test_life import Gate

INTERVAL = 1000
"""Milliseconds in which a tiny model writes any reply of these tests."""


@pytest.fixture(scope="module")
def folder(chatbot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chatbot whose template speaks of tools."""
    return with_template(chatbot, tmp_path_factory.mktemp("events") / "bot", HERMES)


@pytest.fixture(scope="module")
def apart(folder: Path) -> Iterator[RunningServer]:
    """A server that sends every token by itself."""
    with running(folder, stream_interval_ms=0) as one:
        yield one


@pytest.fixture(scope="module")
def together(folder: Path) -> Iterator[RunningServer]:
    """A server that sends hardly anything but the first token and the end of a reply."""
    with running(folder, stream_interval_ms=INTERVAL) as one:
        yield one


def said(events: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What a stream says of each choice in all."""
    choices: dict[int, dict[str, Any]] = defaultdict(lambda: defaultdict(str))
    for event in events:
        for choice in event["choices"]:
            of = choices[choice["index"]]
            delta = choice.get("delta", choice)
            of["text"] += delta.get("content") or delta.get("text") or ""
            of["calls"] = [
                *(of["calls"] or []),
                *((call["index"], call["function"]) for call in delta.get("tool_calls", ())),
            ]
            for name, values in (choice["logprobs"] or {}).items():
                of[name] = [*(of[name] or []), *(values or [])]
            of["reason"] += choice["finish_reason"] or ""
    return {index: dict(of) for index, of in choices.items()}


CHATS: dict[str, dict[str, Any]] = {
    "plain": {"max_tokens": 30, "ignore_eos": True},
    "log-probabilities of several choices": {
        "n": 3, "seed": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": 2,
        "max_tokens": 20, "ignore_eos": True,
    },
    "a stop string": {"stop": ["e", "a"], "max_tokens": 40, "ignore_eos": True},
    "characters in several tokens": {
        "response_format": {"type": "regex", "regex": "안녕하세요, 바람입니다"},
        "logprobs": True, "max_tokens": 90,
    },
    "a call of a tool": {
        "tools": TOOLS[:1], "tool_choice": "required", "seed": 3, "temperature": 1.0,
        "max_tokens": 160,
    },
    "JSON": {"response_format": form(PERSON), "seed": 2, "temperature": 1.0, "max_tokens": 60},
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_a_stream_says_the_same_in_few_events_as_token_by_token(
    name: str, apart: RunningServer, together: RunningServer
) -> None:
    fields = {**CHATS[name], "stream": True, "stream_options": {"include_usage": True}}
    one, few = (server.chat(**fields).events for server in (apart, together))
    assert said(few) == said(one)
    assert few[-1]["usage"] == one[-1]["usage"]
    whole = together.chat(**CHATS[name]).json
    assert whole["usage"]["completion_tokens"] == few[-1]["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        of = said(few)[choice["index"]]
        assert of["reason"] == choice["finish_reason"]
        assert of["text"].strip() == (choice["message"]["content"] or "").strip()
        calls = choice["message"].get("tool_calls", ())
        assert [call for _, call in of["calls"]] == [call["function"] for call in calls]
        if choice["logprobs"]:
            assert of["content"] == choice["logprobs"]["content"]


@pytest.mark.parametrize("logprobs", [None, 2])
def test_completions_say_the_same_in_few_events_as_token_by_token(
    logprobs: int | None, apart: RunningServer, together: RunningServer
) -> None:
    body = {"prompt": ["The wind", "안녕"], "max_tokens": 24, "temperature": 1.5, "seed": 4}
    body |= {"n": 2, "ignore_eos": True, "logprobs": logprobs}
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    one, few = (server.ask("/v1/completions", streamed).events for server in (apart, together))
    assert said(few) == said(one)
    assert few[-1]["usage"] == one[-1]["usage"]
    assert len(few) < len(one) / 2
    whole = apart.ask("/v1/completions", body).json
    for choice in whole["choices"]:
        of = said(few)[choice["index"]]
        assert of["text"] == choice["text"]
        if logprobs is not None:
            assert {key: of[key] for key in choice["logprobs"]} == {
                key: [*value] for key, value in choice["logprobs"].items()
            }


def test_an_interval_of_0_sends_every_token_by_itself(
    apart: RunningServer, together: RunningServer
) -> None:
    fields: dict[str, Any] = {"logprobs": True, "max_tokens": 30, "ignore_eos": True}
    lengths = [
        [
            len(event["choices"][0]["logprobs"]["content"])
            for event in server.chat(stream=True, **fields).events
            if event["choices"][0]["logprobs"]
        ]
        for server in (apart, together)
    ]
    assert lengths[0] == [1] * 30
    # The first token, the rest, and what an interval that ends meanwhile holds.
    assert sum(lengths[1]) == 30
    assert len(lengths[1]) <= 4


def test_the_first_token_comes_before_the_second_is_written(
    together: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    gate.steps.release()
    try:
        with together.streaming(logprobs=True, ignore_eos=True, max_tokens=6) as response:
            content = b""
            while b'"content":[{' not in content:
                content += response.readline()
            assert gate.tokens == 1
    finally:
        gate.open.set()


def test_what_was_written_before_an_error_comes_before_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with running(folder, stream_interval_ms=INTERVAL) as server, ThreadPoolExecutor(1) as pool:
        options: dict[str, Any] = {"logprobs": True, "max_tokens": 400, "ignore_eos": True}
        asked = pool.submit(server.chat, stream=True, **options)
        for _ in range(5):
            gate.steps.release()
        until(lambda: gate.tokens == 5)
        # It waits for leave to write a sixth token, and is told to stop meanwhile.
        pool_stop = ThreadPoolExecutor(1)
        pool_stop.submit(server.app.served.scheduler.close)
        until(lambda: server.app.served.scheduler._stop_now)
        gate.open.set()
        *before, error = asked.result().events
        pool_stop.shutdown()
    assert error["error"]["code"] == "stopped"
    assert len(said(before)[0]["content"]) == 6


# --- what is due ----------------------------------------------------------------------------------


class Loop:
    """Notes how often it was woken."""

    def __init__(self) -> None:
        self.wakes = 0
        self.is_closed = False

    def call_soon_threadsafe(self, function: Callable[..., None], *given: object) -> None:
        if self.is_closed:
            raise RuntimeError("Event loop is closed")
        self.wakes += 1
        function(*given)


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def piece(text: str = "x") -> Piece:
    return Piece(5, text, ends=False, score=None)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def due(clock: Clock) -> DueInboxes:
    return DueInboxes(20.0, clock)


@pytest.fixture
def loop() -> Loop:
    return Loop()


def inbox_of(loop: Loop, due: DueInboxes) -> Inbox:
    return Inbox(loop, due)  # type: ignore[arg-type]


def test_the_loop_is_woken_for_the_first_token_each_interval_and_the_end(
    clock: Clock, due: DueInboxes, loop: Loop
) -> None:
    inbox = inbox_of(loop, due)
    wakes = []
    for step in range(21):
        assert inbox.put(0, piece() if step < 20 else End("stop", ""))
        due.tell()
        wakes.append(loop.wakes)
        clock.now += 4
    # At 0, 20, 40 and 60, and the end at 80.
    assert wakes == [1, 1, 1, 1, 1, *[2] * 5, *[3] * 5, *[4] * 5, 5]


def test_the_loop_is_woken_once_for_all_streams(clock: Clock, due: DueInboxes, loop: Loop) -> None:
    inboxes = [inbox_of(loop, due) for _ in range(5)]
    for number, inbox in enumerate(inboxes):
        clock.now = 101.0 + number
        inbox.put(0, piece())
        inbox.put(1, piece())
    due.tell()
    due.tell()
    assert loop.wakes == 1
    # They began at different moments, and are due at the same.
    clock.now = 119.0
    for inbox in inboxes:
        inbox.put(0, piece())
    due.tell()
    assert loop.wakes == 1
    clock.now = 121.0
    for inbox in inboxes:
        inbox.put(0, piece())
    due.tell()
    assert loop.wakes == 2
    assert all(inbox._open for inbox in inboxes)


@pytest.mark.parametrize("text", ["", "x"])
def test_a_first_token_without_text_holds_up_no_later_one(
    text: str, due: DueInboxes, loop: Loop
) -> None:
    inbox = inbox_of(loop, due)
    inbox.put(0, piece(""))
    due.tell()
    assert loop.wakes == 1
    for wakes in (2, 2):
        inbox.put(0, piece(text))
        due.tell()
        assert loop.wakes == (wakes if text else 1)


def test_a_reply_that_is_not_streamed_waits_for_its_end(
    clock: Clock, due: DueInboxes, loop: Loop
) -> None:
    inbox = inbox_of(loop, due)
    inbox.holds = True
    for _ in range(50):
        inbox.put(0, piece())
        due.tell()
        clock.now += 15
    assert loop.wakes == 1  # the first token tells that it does not wait in the queue
    inbox.put(0, Failure(ValueError()))
    due.tell()
    assert loop.wakes == 2


def test_what_waits_in_an_inbox_is_taken_with_what_is_due_or_once_its_reader_gives_up() -> None:
    async def take() -> None:
        due = DueInboxes(20.0, Clock())
        inbox = Inbox(asyncio.get_running_loop(), due)
        inbox.put(0, piece("a"))
        due.tell()
        assert [event.text for _, event in await inbox.take(60)] == ["a"]  # type: ignore[union-attr]
        inbox.put(0, piece("b"))
        inbox.put(0, piece("c"))
        due.tell()
        assert [event.text for _, event in await inbox.take(0.01)] == ["b", "c"]  # type: ignore[union-attr]
        assert await inbox.take(0.01) == []
        inbox.put(0, piece("d"))
        inbox.put(0, End("stop", "e"))
        due.tell()
        assert [event.text for _, event in await inbox.take(60)] == ["d", "e"]  # type: ignore[union-attr]
        inbox.wake()
        began = time.monotonic()
        assert await inbox.take(60) == []
        assert time.monotonic() - began < 30

    asyncio.run(take())


def test_a_request_that_ended_leaves_no_timer_to_its_loop() -> None:
    """A timer holds its inbox, and all that stands in it, until it goes off."""

    async def give_up(stop: Callable[[Inbox], None]) -> list[asyncio.TimerHandle]:
        loop = asyncio.get_running_loop()
        inbox = Inbox(loop, DueInboxes(20.0, Clock()))
        taker = loop.create_task(inbox.take(600))
        await asyncio.sleep(0)
        assert len(waiting(loop)) == 1
        taker.cancel()
        with suppress(asyncio.CancelledError):
            await taker
        stop(inbox)
        return waiting(loop)

    def waiting(loop: asyncio.AbstractEventLoop) -> list[asyncio.TimerHandle]:
        timers = loop._scheduled  # type: ignore[attr-defined]
        return [timer for timer in timers if not timer.cancelled()]

    def stop_replies(inbox: Inbox) -> None:
        Replies(SimpleNamespace(), [], inbox, 30.0).stop()  # type: ignore[arg-type]

    assert len(asyncio.run(give_up(lambda _: None))) == 1, "the test can see one that is left"
    assert asyncio.run(give_up(Inbox.close)) == []
    assert asyncio.run(give_up(stop_replies)) == []


def test_a_shorter_wait_moves_the_timer_and_a_longer_one_leaves_it() -> None:
    async def take() -> None:
        loop = asyncio.get_running_loop()
        inbox = Inbox(loop, DueInboxes(20.0, Clock()))
        for seconds, most in ((600, 600), (0.05, 0.05), (0.2, 0.2)):
            began = loop.time()
            taker = loop.create_task(inbox.take(seconds))
            await asyncio.sleep(0)
            timer = inbox._timer
            assert timer is not None
            assert timer.when() <= began + most + 0.01
            if seconds == 600:
                taker.cancel()
                with suppress(asyncio.CancelledError):
                    await taker
            else:
                assert await taker == []
                # A clock of another step than the loop's may be a moment behind.
                assert loop.time() - began >= seconds - 0.02
        inbox.close()

    asyncio.run(take())


def test_the_engine_hears_that_the_server_is_gone(due: DueInboxes, loop: Loop) -> None:
    inbox = inbox_of(loop, due)
    assert inbox.put(0, piece())
    loop.is_closed = True
    due.tell()
    assert not inbox.put(0, piece())


def test_the_end_of_a_call_is_told_at_once_however_it_is_cut(
    chatbot: Path, clock: Clock, loop: Loop
) -> None:
    vocabulary = load_vocabulary(chatbot)
    mark = "</tool_call>"
    text = "{}</tool_call>\nabc</tool_call></tool_cal l>"
    ids = vocabulary.encode(text)
    due = DueInboxes(20.0, clock)
    inbox = inbox_of(loop, due)
    stream = TextStream(vocabulary, every_byte=True)
    reply = Reply(0, [1], inbox, stream, (), urgent=mark)
    wakes, shown = [], ""
    for token in ids:
        before, shown = loop.wakes, shown + vocabulary.token_bytes(token).decode()
        reply.token(token)
        due.tell()
        if loop.wakes > before:
            wakes.append(shown.count(mark))
    assert shown == text
    assert wakes == [0, 1, 2]  # the first token of all, and once after each mark


def test_text_around_a_call_keeps_its_place_in_shared_events() -> None:
    request = ChatRequest(messages=[], stream=True)
    served, reply = SimpleNamespace(name="bot", vocabulary=None), SimpleNamespace(index=0)
    answer = chat_module._Answer(served, request, [reply], "hermes", ())  # type: ignore[arg-type, list-item]
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    pieces = [piece(text) for text in ("Wait", ".", call[:20], call[20:], "Do", "ne")]
    content = answer.part(reply, [*pieces, End("stop", "!")])  # type: ignore[arg-type]
    events = [json.loads(line[6:]) for line in content.decode().split("\n\n") if line]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"content": "Wait."}
    assert deltas[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert deltas[2:] == [{"content": "Done!"}, {}]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_intervals_out_of_their_range_are_refused() -> None:
    for wrong in (-1, 1001):
        with pytest.raises(SettingsError, match="stream_interval_ms must be"):
            ServeSettings(stream_interval_ms=wrong)


def test_the_tokens_so_far_are_counted_in_every_event(together: RunningServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = together.chat(
        stream=True, stream_options=options, max_tokens=20, ignore_eos=True
    ).events
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 20
    assert json.dumps(events[1]["usage"]) != "null"


# --- what is written at once ----------------------------------------------------------------------


def test_an_answer_is_one_write_and_so_is_the_beginning_and_the_end_of_a_stream(
    together: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    true_write = selector_events._SelectorSocketTransport.write  # type: ignore[attr-defined]

    def write(transport: asyncio.Transport, data: bytes) -> None:
        written.append(data)
        true_write(transport, data)

    monkeypatch.setattr(selector_events._SelectorSocketTransport, "write", write)  # type: ignore[attr-defined]
    assert together.chat().status == 200
    assert len(written) == 1
    assert written[0].startswith(b"HTTP/1.1 200")
    written.clear()
    assert together.chat(stream=True, max_tokens=30, ignore_eos=True).status == 200
    assert written[0].startswith(b"HTTP/1.1 200")
    assert b'"content":' in written[0]
    assert b"data: [DONE]" in written[-1]
    assert written[-1].endswith(b"\r\n0\r\n\r\n")


def test_what_was_written_goes_out_before_a_connection_is_closed_and_not_after() -> None:
    class Transport:
        def __init__(self) -> None:
            self.done: list[object] = []

        def write(self, data: bytes) -> None:
            self.done.append(data)

        def close(self) -> None:
            self.done.append("closed")

        def is_closing(self) -> bool:
            return "closed" in self.done

    async def use() -> tuple[list[object], list[object]]:
        first, second = Transport(), Transport()
        loop = asyncio.get_running_loop()
        one, two = (GatheringTransport(other, loop) for other in (first, second))  # type: ignore[arg-type]
        for data in (b"a", b"b"):
            one.write(data)
            two.write(data)
        assert first.done == []
        one.close()
        await asyncio.sleep(0)
        two.write(b"c")
        two.write(b"d")
        second.close()  # by the other side
        await asyncio.sleep(0)
        return first.done, second.done

    assert asyncio.run(use()) == ([b"ab", "closed"], [b"ab", "closed"])


def test_what_is_sent_now_goes_out_after_what_was_to_go_out_soon() -> None:
    written: list[bytes] = []
    transport = SimpleNamespace(write=written.append, is_closing=lambda: False)

    async def use() -> None:
        one = GatheringTransport(transport, asyncio.get_running_loop())  # type: ignore[arg-type]
        one.write(b"a")
        one.send(b"b")
        assert written == [b"ab"]
        one.send(b"c")
        one.write(b"d")
        await asyncio.sleep(0)

    asyncio.run(use())
    assert written == [b"ab", b"c", b"d"]


@pytest.mark.parametrize(
    ("cycle", "flow"),
    [
        (SimpleNamespace(disconnected=False), SimpleNamespace(write_paused=True)),
        (SimpleNamespace(disconnected=True), SimpleNamespace(write_paused=False)),
        (None, SimpleNamespace(write_paused=False)),
        (SimpleNamespace(disconnected=False), None),
    ],
    ids=["does not read on", "has left", "no request", "no connection"],
)
def test_nothing_is_sent_at_once_to_a_client_that_cannot_take_it(cycle: Any, flow: Any) -> None:
    sent: list[bytes] = []
    connection: Any = SimpleNamespace(
        cycle=cycle, flow=flow, _gathering=SimpleNamespace(send=sent.append)
    )
    assert not BoundedProtocol.send_part(connection, b"x")
    assert sent == []
    connection.cycle = SimpleNamespace(disconnected=False)
    connection.flow = SimpleNamespace(write_paused=False)
    assert BoundedProtocol.send_part(connection, b"x" * 17)
    assert sent == [b"11\r\n" + b"x" * 17 + b"\r\n"]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_stream_has_chunks_only_for_a_client_that_reads_them(
    version: str, apart: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bool] = []
    true_send = BoundedProtocol.send_part

    def send(connection: BoundedProtocol, content: bytes) -> bool:
        sent.append(true_send(connection, content))
        return sent[-1]

    monkeypatch.setattr(BoundedProtocol, "send_part", send)
    body = json.dumps(
        {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 90, "temperature": 0}
        | {"stream": True, "ignore_eos": True}
    ).encode()
    head, _, content = apart.raw(
        b"POST /v1/chat/completions HTTP/%b\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (version.encode(), len(body), body)
    ).partition(b"\r\n\r\n")
    assert (b"transfer-encoding: chunked" in head.lower()) == (version == "1.1")
    if version == "1.1":
        parts = []
        while content:
            size, _, content = content.partition(b"\r\n")
            parts.append(content[: int(size, 16)])
            assert content[int(size, 16) :][:2] == b"\r\n"
            content = content[int(size, 16) + 2 :]
        assert parts.pop() == b""
        content = b"".join(parts)
    said_by_stream = [line.removeprefix(b"data: ") for line in content.split(b"\n\n") if line]
    assert said_by_stream.pop() == b"[DONE]"
    assert set(sent) == ({True} if version == "1.1" else set())
    whole = apart.chat(max_tokens=90, ignore_eos=True)
    assert said([json.loads(line) for line in said_by_stream])[0]["text"] == whole.text


def test_an_inbox_waits_as_long_as_its_reader_whatever_it_waited_for_before() -> None:
    async def take() -> None:
        loop = asyncio.get_running_loop()
        due = DueInboxes(20.0, Clock())
        inbox = Inbox(loop, due)
        for seconds in (0.02, 60.0, 0.03, 0.01):
            if seconds == 60.0:
                loop.call_later(0.05, inbox.wake)
            began = loop.time()
            assert await inbox.take(seconds) == []
            assert loop.time() - began >= min(seconds, 0.05) - 0.002
            assert loop.time() - began < 30
        # A timer that goes off before its reader wants to give up is set again.
        loop.call_soon(inbox.wake)
        assert await inbox.take(0.03) == []
        loop.call_later(0.09, inbox.wake)
        began = loop.time()
        assert await inbox.take(60.0) == []
        assert loop.time() - began >= 0.088
        waiting = loop.create_task(inbox.take(60.0))
        await asyncio.sleep(0)
        inbox.close()
        inbox.wake()
        assert await waiting == []
        assert inbox._timer is None

    asyncio.run(take())
