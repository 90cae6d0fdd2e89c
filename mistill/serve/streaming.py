"""Answers of replies: whole, or as they are written, as server-sent events.

A stream ends with ``[DONE]``, and one that breaks off with an error event before it, because a
client takes a stream that merely stops for a whole reply.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from mistill.errors import ContextError, EngineStoppedError, QueueFullError, SettingsError
from mistill.serve.generation import Served
from mistill.serve.http.exchange import ClientGoneError, Exchange
from mistill.serve.refusals import RefusalError, bad_request, busy, own_fault, unavailable
from mistill.serve.replies import End, Event, Failure, Inbox, Replies, Reply
from mistill.serve.requests import Generation

DONE = b"data: [DONE]\n\n"
PING = b": still here\n\n"
_log = logging.getLogger("mistill.serve")


def event(value: Any) -> bytes:
    """A value as a server-sent event.

    Args:
        value: What msgspec writes as JSON, which holds no line breaks.

    Returns:
        The bytes.
    """
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def refusal_of(error: Exception, *, retry_seconds: float = 5.0) -> RefusalError:
    """What a client is told of an error.

    Args:
        error: Anything that was raised.
        retry_seconds: After how long a queue that is full may have room.

    Returns:
        The refusal; what may be a bug of ours is logged, without its message, which may hold
        words of a conversation.
    """
    if isinstance(error, RefusalError):
        return error
    if isinstance(error, QueueFullError):
        return busy(str(error), retry_seconds)
    if isinstance(error, EngineStoppedError):
        return unavailable(str(error))
    if isinstance(error, ContextError):
        return bad_request(str(error), "messages", "context_length_exceeded")
    if isinstance(error, SettingsError):  # of a constraint that turns out to be too complex
        return bad_request(str(error)[:500], "response_format")
    log_bug(error)
    return own_fault()


def log_bug(error: BaseException) -> None:
    """Log where an error came from, without its message.

    Args:
        error: What was raised.
    """
    places = "".join(
        f" {frame.filename.rpartition('/')[2]}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)[-8:]
    )
    _log.error("%s at%s", type(error).__name__, places)


class Answer(ABC):
    """The answer to a request, whole or in parts.

    Attributes:
        request: The request.
        replies: Its replies.
        headers: More headers of the answer.
    """

    request: Generation
    replies: list[Reply]
    headers: dict[str, str]

    def __init__(
        self,
        model: str,
        request: Generation,
        replies: Sequence[Reply],
        ignored: Sequence[str],
        *,
        kind: str,
        part_kind: str,
    ) -> None:
        """Begin an answer.

        Args:
            model: Name of the model.
            request: The request.
            replies: Its replies, which have not started.
            ignored: Names of fields that were ignored.
            kind: What clients know a whole answer by.
            part_kind: What they know a part of one by.
        """
        self.request = request
        self.replies = list(replies)
        self.headers = {"X-Ignored-Fields": ", ".join(ignored)} if ignored else {}
        self._kind = kind
        self._part_kind = part_kind
        prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        options = request.stream_options
        self._usage = options is not None and options.include_usage
        self._usage_always = options is not None and options.continuous_usage_stats

    @abstractmethod
    def opening(self) -> bytes:
        """Events at the beginning of a stream."""

    @abstractmethod
    def part(self, reply: Reply, happened: Sequence[Event]) -> bytes:
        """Take what happened to a reply.

        Args:
            reply: The reply.
            happened: Pieces of it, or its end, in order.

        Returns:
            Events for a stream, as few as hold all of it; may be none.
        """

    @abstractmethod
    def choices(self) -> list[dict[str, Any]]:
        """The replies as a whole answer lists them."""

    def whole(self) -> dict[str, Any]:
        """The answer, once all replies have ended."""
        return {
            **self._head,
            "object": self._kind,
            "choices": self.choices(),
            "usage": usage(self.replies),
        }

    def closing(self) -> bytes:
        """Events at the end of a stream."""
        if not self._usage:
            return b""
        counts = usage(self.replies)
        return event({**self._head, "object": self._part_kind, "choices": [], "usage": counts})

    def chunk(self, choice: Mapping[str, Any]) -> bytes:
        """An event for one reply.

        Args:
            choice: What it says of the reply.

        Returns:
            The event.
        """
        value = {**self._head, "object": self._part_kind, "choices": [choice]}
        if self._usage:
            value["usage"] = usage(self.replies) if self._usage_always else None
        return event(value)


Prepare = Callable[[Served, bytes, Inbox, str], Answer]


async def respond(served: Served, exchange: Exchange, prepare: Prepare) -> None:
    """Answer a request for replies.

    Args:
        served: The model.
        exchange: The request.
        prepare: Makes the replies of the body, an inbox and the request's owner, in a thread.

    Raises:
        RefusalError: If it cannot be answered.
        ClientGoneError: If the client leaves.
    """
    content = await exchange.body()
    inbox = Inbox(asyncio.get_running_loop(), served.due)
    answer = await served.workers.run(prepare, served, content, inbox, exchange.owner)
    inbox.holds = not answer.request.streams
    replies = Replies(served.scheduler, answer.replies, inbox, served.settings.queue_seconds)
    try:
        replies.start(exchange)
        if answer.request.streams:
            together = served.due.interval_seconds > 0
            await _stream(exchange, replies, answer, served.limits.ping_seconds, together)
        else:
            written: list[tuple[Reply, Event]] = []
            while replies.unfinished:
                events = await replies.take()
                _raise_failure(events)
                written += events
            whole = await served.workers.run(_whole, answer, written)
            await exchange.answer_json(whole, answer.headers)
    finally:
        replies.stop()
        served.counts.ended(exchange, answer.replies)


async def _stream(
    exchange: Exchange, replies: Replies, answer: Answer, ping_seconds: float, together: bool
) -> None:
    """Send replies as they are written.

    The stream begins with the first token, or after some silence; until then an error has a status
    of its own.
    """
    began = False
    # The last events, which are sent with the end: a client wakes once for both.
    last = b""
    try:
        while replies.unfinished:
            events = await replies.take(ping_seconds)
            whole = _before_failure(events)
            if not began:
                _raise_failure(events)
            content = _parts(answer, whole, together=together)
            if not began:
                began = True
                await exchange.begin_stream(answer.headers)
                content = answer.opening() + content
            if not replies.unfinished:
                last = content
            elif content or not events:
                await exchange.stream(content or PING)
            _raise_failure(events[len(whole) :])
    except ClientGoneError:
        raise
    except Exception as error:
        if not began:
            raise
        exchange.facts["ending"] = "error"
        last += b"data: " + refusal_of(error).body() + b"\n\n" + DONE
    else:
        last += answer.closing() + DONE
    await exchange.end_stream(last)


def _whole(answer: Answer, events: Sequence[tuple[Reply, Event]]) -> dict[str, Any]:
    """A whole answer of all that happened; in a thread of its own."""
    _parts(answer, events, together=True)
    return answer.whole()


def _parts(answer: Answer, events: Sequence[tuple[Reply, Event]], *, together: bool) -> bytes:
    """What happened as events for a stream: of each reply together, or of each token alone."""
    if not together:
        return b"".join([answer.part(reply, (happened,)) for reply, happened in events])
    of: dict[int, tuple[Reply, list[Event]]] = {}
    for reply, happened in events:
        of.setdefault(reply.index, (reply, []))[1].append(happened)
    return b"".join([answer.part(reply, all_of_it) for reply, all_of_it in of.values()])


def _before_failure(events: list[tuple[Reply, Event]]) -> list[tuple[Reply, Event]]:
    """What happened before something failed, which a client gets before it is told of that."""
    for number, (_, happened) in enumerate(events):
        if _failed(happened):
            return events[:number]
    return events


def _failed(happened: Event) -> bool:
    return isinstance(happened, Failure) or (
        isinstance(happened, End) and happened.reason == "cancelled"
    )


def _raise_failure(events: list[tuple[Reply, Event]]) -> None:
    """Raise what a client is told of a reply that failed, or that somebody else has ended."""
    for _, happened in events:
        if isinstance(happened, Failure):
            if isinstance(happened.error, EngineStoppedError):
                raise RefusalError(
                    500, "the server stopped before the reply was whole", code="stopped"
                )
            raise refusal_of(happened.error)
        if _failed(happened):
            raise RefusalError(500, "the reply was ended before it was whole", code="stopped")


def usage(replies: Sequence[Reply]) -> dict[str, Any]:
    """How many tokens a request took.

    Args:
        replies: Its replies.

    Returns:
        The counts under OpenAI's names; a prompt counts once for each of its replies but the
        further choices.
    """
    prompts = {id(reply.prompt): len(reply.prompt) for reply in replies}
    prompt_tokens = sum(prompts.values())
    written = sum(reply.job.new_tokens for reply in replies)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "prompt_tokens_details": {
            "cached_tokens": min(prompt_tokens, sum(reply.job.cached_tokens for reply in replies))
        },
    }
