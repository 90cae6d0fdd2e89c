"""A reply that is being written: its parts as they come, how it ended, and how fast it was."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from mistill.chat.stream_text import TextStream
from mistill.engine.log_probabilities import TokenScore

Ending = Literal["end of turn", "stop string", "max_new_tokens", "context", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a reply was.

    Attributes:
        prompt_tokens: Tokens of the whole conversation up to the reply, whether the model read
            them anew or had them in its cache.
        first_token_seconds: From the question to the reply's first token.
        new_tokens: Tokens of the reply, the one that ends the turn included.
        tokens_per_second: Speed of decoding, after the first token; 0 if there was only one.
    """

    prompt_tokens: int
    first_token_seconds: float
    new_tokens: int
    tokens_per_second: float


@dataclass(kw_only=True)
class WrittenReply:
    """What is known of a reply.

    Attributes:
        text: The text so far.
        prompt_tokens: Tokens of the conversation up to it.
        seconds_before: Time from the question until the model began.
        scores: How probable each token was; empty if that was not asked for.
        ending: Reason for its end; None while it is being written.
        speed: How fast it was; None while it is being written.
    """

    text: str = ""
    prompt_tokens: int
    seconds_before: float
    scores: list[TokenScore] = field(default_factory=list)
    ending: Ending | None = None
    speed: Speed | None = None


class Reply(Generator[str, None, None]):
    """The parts of a reply, none of which is empty or breaks a character, as they are written.

    It may be read in another thread than the one that asked. A reply that is closed, or that nobody
    keeps, ends there.
    """

    def __init__(self, written: WrittenReply, parts: Generator[str, None, None]) -> None:
        """Make a reply.

        Args:
            written: What is known of it, kept up to date by its parts.
            parts: Writes it.
        """
        self._written = written
        self._parts = parts
        # Two threads that read one reply get its parts in turn.
        self._lock = threading.RLock()

    @property
    def text(self) -> str:
        """The text that was read so far."""
        return self._written.text

    @property
    def ending(self) -> Ending | None:
        """Reason for its end; None while it is being written."""
        return self._written.ending

    @property
    def speed(self) -> Speed | None:
        """How fast it was; None while it is being written."""
        return self._written.speed

    @property
    def scores(self) -> list[TokenScore]:
        """How probable each token was, if that was asked for."""
        return self._written.scores

    def send(self, value: None) -> str:
        """Wait for the next part; see ``generator.send``."""
        with self._lock:
            return self._parts.send(value)

    def throw(
        self,
        typ: type[BaseException] | BaseException,
        val: object = None,
        tb: TracebackType | None = None,
    ) -> str:
        """End it by an exception; see ``generator.throw``."""
        error = typ if isinstance(typ, BaseException) else typ()
        with self._lock:
            return self._parts.throw(error)

    def close_if_idle(self) -> None:
        """End it, unless another thread is waiting for a part of it."""
        if self._lock.acquire(blocking=False):
            try:
                self._parts.close()
            finally:
                self._lock.release()


def write_reply(
    written: WrittenReply,
    tokens: Iterator[int],
    text: TextStream,
    *,
    end_ids: Collection[int],
    max_new_tokens: int,
    ended: Callable[[WrittenReply], None],
) -> Generator[str, None, None]:
    """The parts of a reply.

    Args:
        written: What is known of the reply; kept up to date.
        tokens: What the model writes.
        text: Turns tokens into text.
        end_ids: Tokens that end the reply and are not part of it.
        max_new_tokens: Most tokens.
        ended: Called at the end, whatever ends it, unless nothing of it was asked for.

    Yields:
        Parts of the text that are not empty.
    """
    seconds: list[float] = []
    ending: Ending | None = None
    try:
        while ending is None:
            before = time.perf_counter()
            token = next(tokens, None)
            if token is None:
                ending = "context"
                break
            seconds.append(time.perf_counter() - before)
            if token in end_ids:
                ending = "end of turn"
                break
            part = text.add(token)
            written.text += part
            if text.stopped:
                ending = "stop string"
            elif len(seconds) == max_new_tokens:
                ending = "max_new_tokens"
            if part:
                yield part
        part = text.finish(cut_off=ending in ("max_new_tokens", "context"))
        written.text += part
        if part:
            yield part
    finally:
        written.ending = ending or "interrupted"
        written.speed = _speed(written.prompt_tokens, written.seconds_before, seconds)
        ended(written)


def _speed(prompt_tokens: int, seconds_before: float, seconds: list[float]) -> Speed:
    """Speed from the time that each token of a reply took."""
    later = sum(seconds[1:])
    return Speed(
        prompt_tokens=prompt_tokens,
        first_token_seconds=seconds_before + sum(seconds[:1]),
        new_tokens=len(seconds),
        tokens_per_second=(len(seconds) - 1) / later if later else 0.0,
    )
