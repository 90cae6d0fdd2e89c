"""Replies while they are written: from the engine's thread to the server's loop.

A reply is a job of the scheduler. What the engine writes goes into the request's inbox. The loop is
woken once for all inboxes in which something is due after a step of the engine: a token takes a few
milliseconds, and on a laptop whatever the loop does for one lengthens the next. A client that
leaves ends its jobs.

It is one file because the inbox, what puts into it and what takes from it are one handover between
two threads.
"""

from __future__ import annotations

import asyncio
import math
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


class DueInboxes:
    """The inboxes of a server in which something is due, of which its loop is told at once.

    Time is divided into intervals that are the same for all, so that the replies that are written
    side by side are due after the same step of the engine.

    Used in the engine's thread alone.
    """

    def __init__(
        self, interval_seconds: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Begin without one.

        Args:
            interval_seconds: Length of an interval, in each of which a stream gets one event; 0
                makes every token due by itself.
            clock: Tells the time in seconds.
        """
        self.interval_seconds = interval_seconds
        self._clock = clock
        self._due: list[Inbox] = []

    def interval(self) -> float:
        """The number of the interval that it is now.

        Returns:
            It; 0 where every token is due.
        """
        return self._clock() // self.interval_seconds if self.interval_seconds else 0.0

    def passed(self, interval: float) -> bool:
        """Whether an interval is over.

        Args:
            interval: Its number.

        Returns:
            True where every token is due.
        """
        return not self.interval_seconds or self.interval() != interval

    def add(self, inbox: Inbox) -> None:
        """Note that something is due.

        Args:
            inbox: Where.
        """
        if inbox not in self._due:
            self._due.append(inbox)

    def tell(self) -> None:
        """Wake the loop, if something is due: once for all that the engine wrote in a step."""
        if not self._due:
            return
        due, self._due = self._due, []
        try:
            due[0].loop.call_soon_threadsafe(_open_all, due)
        except RuntimeError:  # the loop is closed, as that of a server that was stopped
            for inbox in due:
                inbox.closed = True


def _open_all(inboxes: Sequence[Inbox]) -> None:
    for inbox in inboxes:
        inbox.open()


class Inbox:
    """What the engine has written for one request and the loop has not taken yet.

    Attributes:
        loop: The server's loop.
        closed: Whether nobody will take anything any more.
        holds: Whether pieces wait for the end of the reply, as in an answer that is not streamed.
    """

    loop: asyncio.AbstractEventLoop
    closed: bool
    holds: bool

    def __init__(self, loop: asyncio.AbstractEventLoop, due: DueInboxes) -> None:
        """Open an inbox.

        Args:
            loop: The server's loop.
            due: Where it is noted that something is due in this one.
        """
        self.loop = loop
        self.closed = False
        self.holds = False
        self._due = due
        self._events: deque[tuple[int, Event]] = deque()
        self._open = False
        self._woken = False
        # Whoever takes and waits, until when, and a timer that goes off no later.
        self._taker: asyncio.Future[None] | None = None
        self._end = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._interval = -1.0
        self._begun: set[int] = set()

    def put(self, index: int, event: Event, *, urgent: bool = False) -> bool:
        """Put an event in, from the engine's thread.

        Due are the first token of all, the first one of each reply that a client notices, the
        first in an interval, whatever is urgent, and what is no token; the rest waits for one of
        them.

        Args:
            index: Number of the reply.
            event: The event.
            urgent: Whether the client waits for it.

        Returns:
            False once the server is gone.
        """
        self._events.append((index, event))
        if isinstance(event, Piece):
            noticed = bool(event.text) or event.score is not None
            due = urgent or (noticed and index not in self._begun)
            due = due or (not self.holds and self._due.passed(self._interval))
            if noticed:
                self._begun.add(index)
        else:
            due = True
        if due:
            self._interval = self._due.interval()
            self._due.add(self)
        return not self.closed

    def open(self) -> None:
        """Let whoever waits take what is there, from the loop."""
        self._open = True
        if self._taker is not None and not self._taker.done():
            self._taker.set_result(None)

    def wake(self) -> None:
        """Let whoever waits look, even if nothing is there, from the loop."""
        self._woken = True
        self.open()

    async def take(self, seconds: float | None) -> list[tuple[int, Event]]:
        """Take all that came, once something is due.

        Args:
            seconds: How long to wait; None for as long as it takes.

        Returns:
            The events, in the order in which they came; none if none came in time.
        """
        self._end = math.inf if seconds is None else self.loop.time() + seconds
        while not (self._woken or (self._open and self._events)):
            self._open = False
            self._watch()
            self._taker = self.loop.create_future()
            try:
                await self._taker
            finally:
                self._taker = None
            if not self._open:
                break
        self._open = False
        self._woken = False
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def close(self) -> None:
        """Wait for nothing any more, from the loop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self) -> None:
        """See to it that the timer goes off no later than whoever takes wants to wait.

        One that goes off earlier is left, and set again then: tokens come every few milliseconds,
        and the end of the wait moves with each.
        """
        if self._timer is not None and self._timer.when() > self._end:
            self.close()
        if self._timer is None and self._end < math.inf:
            self._timer = self.loop.call_at(self._end, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._taker is None or self._taker.done():
            return
        if self.loop.time() < self._end:
            self._watch()
        else:
            self._taker.set_result(None)


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
        urgent: str | None = None,
    ) -> None:
        """Begin a reply.

        Args:
            index: Its number among those of the request.
            prompt: Token ids of its prompt.
            inbox: Where its events go.
            text: Makes text of its tokens.
            end_ids: Tokens that end the turn.
            scored: Records how probable the tokens are.
            urgent: Text after which the client is told at once, such as the end of a call.
        """
        self.index = index
        self.prompt = prompt
        self.prompt_scores = []
        self._inbox = inbox
        self._text = text
        self._end_ids = end_ids
        self._scored = scored
        self._urgent = urgent
        self._last_text = ""

    def token(self, token: int) -> bool:
        """Take a token; see ``Sink``."""
        ends = token in self._end_ids
        text = "" if ends else self._text.add(token)
        score = None if self._scored is None else self._scored.scores[-1]
        listened = self._inbox.put(
            self.index, Piece(token, text, ends, score), urgent=self._is_urgent(text)
        )
        return listened and not self._text.stopped

    def end(self, ending: Ending) -> None:
        """Take the end; see ``Sink``."""
        text = self._text.finish(cut_off=ending in ("max_new_tokens", "context"))
        self._inbox.put(self.index, End(_REASONS[ending], text))

    def fail(self, error: Exception) -> None:
        """Take what went wrong; see ``Sink``."""
        self._inbox.put(self.index, Failure(error))

    def _is_urgent(self, text: str) -> bool:
        """Whether the text that is urgent has been written to its end now."""
        if self._urgent is None:
            return False
        text = self._last_text + text
        urgent = self._urgent in text
        self._last_text = text.rpartition(self._urgent)[2][1 - len(self._urgent) :]
        return urgent

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
        self._inbox.close()
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
