"""Replies while they are written: from the engine's thread to the server's loop.

A reply is a job of the scheduler. What the engine writes goes into the request's inbox, which wakes
the loop once for all that came since it last looked. A client that leaves ends its jobs.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistill.chat.stream_text import TextStream
from mistill.engine.log_probabilities import Scored, TokenScore, log_normalizers, token_score
from mistill.engine.scheduler import Ending, Job, Scheduler
from mistill.errors import QueueFullError
from mistill.serve.http.exchange import ClientGoneError, Exchange
from mistill.serve.refusals import busy


class Piece(NamedTuple):
    """A token that was written.

    Attributes:
        token: Its id.
        text: What can be shown now and could not before; often nothing.
        ends: Whether it is the mark that ends the turn.
        score: How probable it was; None where that was not asked for.
    """

    token: int
    text: str
    ends: bool
    score: TokenScore | None


class End(NamedTuple):
    """The end of a reply.

    Attributes:
        reason: ``stop`` or ``length``, or ``cancelled``.
        text: The text that was held back until now.
    """

    reason: str
    text: str


class Failure(NamedTuple):
    """A reply that cannot go on.

    Attributes:
        error: Why.
    """

    error: Exception


Event = Piece | End | Failure
_REASONS: dict[Ending, str] = {
    "end of turn": "stop",
    "stopped": "stop",
    "max_new_tokens": "length",
    "context": "length",
    "cancelled": "cancelled",
}


class Inbox:
    """What the engine has written for one request and the loop has not taken yet."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Open an inbox.

        Args:
            loop: The server's loop.
        """
        self._loop = loop
        self._events: deque[tuple[int, Event]] = deque()
        self._there = asyncio.Event()
        self._woken = False

    def put(self, index: int, event: Event) -> bool:
        """Put an event in, from any thread.

        Args:
            index: Number of the reply.
            event: The event.

        Returns:
            False once the server is gone.
        """
        self._events.append((index, event))
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._there.set)
            except RuntimeError:
                return False
        return True

    def wake(self) -> None:
        """Let whoever waits look, from the loop."""
        self._there.set()

    async def take(self, seconds: float | None) -> list[tuple[int, Event]]:
        """Take all that came.

        Args:
            seconds: How long to wait; None for as long as it takes.

        Returns:
            The events, in the order in which they came; none if none came in time.
        """
        if not self._events:
            try:
                async with asyncio.timeout(seconds):
                    await self._there.wait()
            except TimeoutError:
                return []
        self._there.clear()
        self._woken = False
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events


class Reply:
    """One reply; the sink of its job.

    Attributes:
        index: Its number among those of the request.
        prompt: Token ids of its prompt; one object for all choices of a prompt.
        job: The job; set once it is made.
        prompt_scores: How probable each token of the prompt was, from its second one.
    """

    index: int
    prompt: list[int]
    job: Job
    prompt_scores: list[TokenScore]

    def __init__(
        self,
        index: int,
        prompt: list[int],
        inbox: Inbox,
        text: TextStream,
        end_ids: Collection[int],
        scored: Scored | None = None,
    ) -> None:
        """Begin a reply.

        Args:
            index: Its number among those of the request.
            prompt: Token ids of its prompt.
            inbox: Where its events go.
            text: Makes text of its tokens.
            end_ids: Tokens that end the turn.
            scored: Records how probable the tokens are.
        """
        self.index = index
        self.prompt = prompt
        self.prompt_scores = []
        self._inbox = inbox
        self._text = text
        self._end_ids = end_ids
        self._scored = scored

    def token(self, token: int) -> bool:
        """Take a token; see ``Sink``."""
        ends = token in self._end_ids
        text = "" if ends else self._text.add(token)
        score = None if self._scored is None else self._scored.scores[-1]
        listened = self._inbox.put(self.index, Piece(token, text, ends, score))
        return listened and not self._text.stopped

    def end(self, ending: Ending) -> None:
        """Take the end; see ``Sink``."""
        text = self._text.finish(cut_off=ending in ("max_new_tokens", "context"))
        self._inbox.put(self.index, End(_REASONS[ending], text))

    def fail(self, error: Exception) -> None:
        """Take what went wrong; see ``Sink``."""
        self._inbox.put(self.index, Failure(error))

    def scorer(self, top: int) -> Callable[[int, NDArray[np.float32]], None]:
        """What records how probable the tokens of the prompt are.

        Args:
            top: How many of the most probable tokens to list at each position.

        Returns:
            A function for ``Job.prompt_scores``.
        """

        def record(first: int, logits: NDArray[np.float32]) -> None:
            # The numbers that evaluations compute in process, to the bit.
            normalizers = log_normalizers(logits)
            following = self.prompt[first + 1 : first + 1 + len(logits)]
            for scores, normalizer, token in zip(logits, normalizers, following, strict=False):
                self.prompt_scores.append(token_score(scores, token, top, float(normalizer)))

        return record


class Replies:
    """The replies of one request while they are written.

    At most as many jobs as the engine has slots are in its hands at once; the others follow as
    those end, so that a long list of prompts takes no more of the queue than one does.
    """

    def __init__(
        self, scheduler: Scheduler, replies: Sequence[Reply], inbox: Inbox, queue_seconds: float
    ) -> None:
        """Take the replies, each with its job.

        Args:
            scheduler: The engine.
            replies: The replies.
            inbox: Where their events go.
            queue_seconds: How long the first of them may wait for a slot.
        """
        self._scheduler = scheduler
        self._replies = {reply.index: reply for reply in replies}
        self._later = deque(replies)
        self._inbox = inbox
        self._queue_seconds = queue_seconds
        self._began = time.monotonic()
        self._started = False
        self._running: set[int] = set()
        self._gone: asyncio.Task[None] | None = None

    def start(self, exchange: Exchange) -> None:
        """Hand the first jobs to the engine, and watch whether the client stays.

        Args:
            exchange: The request, whose body was read.

        Raises:
            QueueFullError: If the queue is full.
            EngineStoppedError: If the engine takes no more jobs.
        """
        self._submit(self._later[0])
        self._later.popleft()
        self._fill()
        self._gone = asyncio.get_running_loop().create_task(exchange.until_gone())
        self._gone.add_done_callback(lambda _: self._inbox.wake())

    @property
    def unfinished(self) -> bool:
        """Whether some reply has not ended."""
        return bool(self._running or self._later)

    async def take(self, seconds: float | None = None) -> list[tuple[Reply, Event]]:
        """Wait for something to happen.

        Args:
            seconds: How long to wait; None for as long as it takes.

        Returns:
            Replies and events, in order; none if none came in time.

        Raises:
            ClientGoneError: If the client has closed the connection.
            RefusalError: If no slot became free in time.
        """
        if not self._started:
            left = self._began + self._queue_seconds - time.monotonic()
            seconds = left if seconds is None else min(seconds, left)
        events = await self._inbox.take(max(0.0, seconds) if seconds is not None else None)
        if self._gone is not None and self._gone.done():
            raise ClientGoneError
        for index, event in events:
            if not isinstance(event, Piece):
                self._running.discard(index)
        self._fill()
        if not self._started:
            jobs = [self._replies[index].job for index in self._running]
            self._started = bool(events) or any(job.started is not None for job in jobs)
            if not self._started and time.monotonic() - self._began >= self._queue_seconds:
                raise busy(
                    f"no slot became free in {self._queue_seconds:g} seconds; try again later",
                    self._queue_seconds,
                )
        return [(self._replies[index], event) for index, event in events]

    def stop(self) -> None:
        """End what has not ended, and watch no longer."""
        if self._gone is not None:
            self._gone.cancel()
        self._later.clear()
        for index in self._running:
            self._scheduler.cancel(self._replies[index].job)

    def _fill(self) -> None:
        while self._later and len(self._running) < self._scheduler.slots:
            try:
                self._submit(self._later[0])
            except QueueFullError:
                if self._running:
                    return  # when one of these ends there is room
                raise
            self._later.popleft()

    def _submit(self, reply: Reply) -> None:
        self._scheduler.submit(reply.job)
        self._running.add(reply.index)
