"""Replies sent as they are written, as server-sent events.

A stream ends with ``[DONE]``, and one that breaks off with an error event before it, because a
client takes a stream that merely stops for a whole reply.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Any

import msgspec

from mistill.errors import ContextError, EngineStoppedError, QueueFullError, SettingsError
from mistill.serve.http.exchange import ClientGoneError, Exchange
from mistill.serve.refusals import RefusalError, bad_request, busy, own_fault, unavailable
from mistill.serve.replies import End, Event, Failure, Replies, Reply

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


async def stream_replies(
    exchange: Exchange,
    replies: Replies,
    *,
    headers: dict[str, str],
    opening: Callable[[], bytes],
    part: Callable[[Reply, Event], bytes],
    closing: Callable[[], bytes],
    ping_seconds: float,
) -> None:
    """Send replies as they are written.

    The stream begins with the first token, or after some silence; until then an error has a status
    of its own.

    Args:
        exchange: The request.
        replies: Its replies, which have started.
        headers: More headers of the answer.
        opening: Events at the beginning.
        part: Events for a piece of a reply or its end; may be none.
        closing: Events at the end.
        ping_seconds: Silence after which a comment is sent.

    Raises:
        RefusalError: If the replies fail before the stream begins.
        ClientGoneError: If the client leaves.
    """
    began = False
    try:
        while replies.unfinished:
            events = await replies.take(ping_seconds)
            raise_failure(events)
            content = b"".join([part(reply, happened) for reply, happened in events])
            if not began:
                began = True
                await exchange.begin_stream(headers)
                content = opening() + content
            if content or not events:
                await exchange.stream(content or PING)
    except ClientGoneError:
        raise
    except Exception as error:
        if not began:
            raise
        exchange.facts["ending"] = "error"
        await exchange.stream(b"data: " + refusal_of(error).body() + b"\n\n" + DONE)
    else:
        await exchange.stream(closing() + DONE)
    await exchange.end_stream()


def raise_failure(events: list[tuple[Reply, Event]]) -> None:
    """Raise what a client is told of a reply that failed, if one did.

    Args:
        events: What happened.

    Raises:
        RefusalError: If a reply failed or was ended by somebody else.
    """
    for _, happened in events:
        if isinstance(happened, Failure):
            if isinstance(happened.error, EngineStoppedError):
                raise RefusalError(
                    500, "the server stopped before the reply was whole", code="stopped"
                )
            raise refusal_of(happened.error)
        if isinstance(happened, End) and happened.reason == "cancelled":
            raise RefusalError(500, "the reply was ended before it was whole", code="stopped")
