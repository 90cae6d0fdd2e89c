"""Continuous batching: jobs join and leave a running batch between two steps.

One thread runs the graph. A step writes a token of every text that is being written, and reads a
chunk of the prompt of one text that is not: a prompt is read in small chunks while others write, so
that nobody waits long for a token, and in large ones where nobody does. This is iteration-level
scheduling (Yu et al., 2022, section 3, https://www.usenix.org/conference/osdi22/presentation/yu)
with the chunked prompts of Sarathi (Agrawal et al., 2023, https://arxiv.org/abs/2308.16369).

It is one file because the queue, the rows and the life of a job share one lock and one thread.

B is batch, T positions, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mistill.engine.language_model import Choose
from mistill.engine.onnx_model import CHUNK, OnnxModel
from mistill.engine.text_rows import TextRows
from mistill.errors import EngineStoppedError, QueueFullError
from mistill.settings import require, require_range

Ending = Literal["end of turn", "stopped", "max_new_tokens", "context", "cancelled"]
State = Literal["running", "stopping", "stopped", "crashed"]

CHUNK_BESIDE_WRITERS = 32
"""Positions of a prompt that are read between two tokens of the others."""

MOST_SLOTS = 16
DEFAULT_QUEUE = 32

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where the tokens of a job go.

    Its methods are called in the engine's thread; they must be quick and never wait. After ``end``
    or ``fail`` nothing more is called.
    """

    def token(self, token: int) -> bool:
        """Take a token that was written, the one that ends the turn included.

        Args:
            token: Its id.

        Returns:
            Whether to go on writing.
        """

    def end(self, ending: Ending) -> None:
        """Take the end of the job.

        Args:
            ending: Why it ended; ``stopped`` if ``token`` returned False.
        """

    def fail(self, error: Exception) -> None:
        """Take what went wrong; the job has ended.

        Args:
            error: What ``choose`` or the sink raised, or an ``EngineStoppedError``.
        """


@dataclass(eq=False, kw_only=True)
class Job:
    """A prompt to be continued.

    Attributes:
        prompt: Token ids, at least one.
        max_new_tokens: Most tokens to write; 0 only reads the prompt.
        choose: Picks the tokens; one of its own for each job, because a sampler remembers.
        end_ids: Tokens that end the turn and are its last.
        sink: Where the tokens go.
        owner: What was read for one owner is used again for the same owner alone.
        prompt_scores: Takes the first position of a chunk of the prompt and the logits of its
            positions, shape (T, V), which are valid during the call. The prompt is then read whole
            and in the chunks of ``OnnxModel.logits``.
        cached_tokens: Tokens of the prompt that were not read, because their keys and values were
            there; set by the scheduler, as what follows.
        new_tokens: Tokens written so far.
        submitted: When it was submitted, in seconds of ``time.monotonic``.
        started: When the reading of its prompt began; None before.
        first_token: When its first token was written; None before.
        ended: When it ended; None before.
    """

    prompt: list[int]
    max_new_tokens: int
    choose: Choose
    end_ids: Collection[int]
    sink: Sink
    owner: str = ""
    prompt_scores: Callable[[int, NDArray[np.float32]], None] | None = None
    cached_tokens: int = field(default=0, init=False)
    new_tokens: int = field(default=0, init=False)
    submitted: float = field(default=0.0, init=False)
    started: float | None = field(default=None, init=False)
    first_token: float | None = field(default=None, init=False)
    ended: float | None = field(default=None, init=False)
    _cancelled: bool = field(default=False, init=False, repr=False)
    # The token that was chosen and not yet read.
    _next: int | None = field(default=None, init=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Health:
    """How the engine is.

    Attributes:
        state: ``running``; ``stopping`` once it takes no more jobs; ``stopped`` or ``crashed``.
        heartbeat_seconds: For how long the engine's thread has given no sign of life: the time
            since its last step began, 0 if it waits for work.
        waiting: Jobs in the queue.
        running: Jobs that have a row.
        slots: Most jobs that can have a row at once.
    """

    state: State
    heartbeat_seconds: float
    waiting: int
    running: int
    slots: int


class Scheduler:
    """Runs many jobs on one model at once.

    Attributes:
        model: The model.
        slots: Most jobs that write at once.
        queue: Most jobs that wait for a slot.
    """

    model: OnnxModel
    slots: int
    queue: int

    def __init__(
        self,
        model: OnnxModel,
        *,
        slots: int | None = None,
        queue: int | None = None,
    ) -> None:
        """Start the engine's thread.

        Args:
            model: A model on the processor; nothing else should run it meanwhile.
            slots: Most jobs that write at once; None takes as many as fit into the memory.
            queue: Most jobs that wait; None takes 32.

        Raises:
            SettingsError: If a number is out of range, or the model runs elsewhere than on the
                processor.
        """
        require_range("slots", slots, 1, 256)
        require_range("queue", queue, 0)
        require(
            model.provider == "cpu",
            f"only a model on the processor can be scheduled, not one on {model.provider}; open "
            "it with provider cpu",
        )
        self.model = model
        self.slots = slots or 4
        self.queue = DEFAULT_QUEUE if queue is None else queue
        self._rows = TextRows(
            model.session, self.slots, model.context_length, model.vocabulary_size
        )
        self._jobs: dict[int, Job] = {}
        self._waiting: deque[Job] = deque()
        self._left: list[Job] = []
        self._state: State = "running"
        self._stop_now = False
        self._beat = time.monotonic()
        self._idle = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="mistill engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a job, which is told of in its sink from now on.

        Args:
            job: A job that was not submitted before.

        Raises:
            ValueError: If its prompt is empty or holds an id that is not in the vocabulary.
            ContextError: If its prompt exceeds the context.
            QueueFullError: If all slots are taken and the queue is full.
            EngineStoppedError: If the scheduler is closed or its engine crashed.
        """
        job.prompt = self.model.checked(job.prompt)
        require_range("max_new_tokens", job.max_new_tokens, 0)
        with self._changed:
            if self._state != "running":
                raise EngineStoppedError(_stopped(self._state))
            if len(self._waiting) + len(self._jobs) >= self.slots + self.queue:
                raise QueueFullError(
                    f"{len(self._jobs)} requests are being answered and {len(self._waiting)} "
                    "wait, which is all that may; try again later"
                )
            job.submitted = time.monotonic()
            self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """End a job before its time, from any thread; its row is free after the step that runs.

        Args:
            job: Any job; one that has ended is left as it is.
        """
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._left.append(job)
            job._cancelled = True
            self._changed.notify_all()

    def health(self) -> Health:
        """How the engine is; does not wait for it.

        Returns:
            Its state, the age of its last sign of life, and how busy it is.
        """
        with self._changed:
            alive = self._state in ("running", "stopping") and self._thread.is_alive()
            return Health(
                state=self._state if alive or self._state == "stopped" else "crashed",
                heartbeat_seconds=0.0 if self._idle else time.monotonic() - self._beat,
                waiting=len(self._waiting),
                running=len(self._jobs),
                slots=self.slots,
            )

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take no more jobs, let those that were taken end, and stop.

        Args:
            drain_seconds: For how long they may go on; after that they fail with an
                ``EngineStoppedError``.
        """
        with self._changed:
            if self._state == "running":
                self._state = "stopping"
            self._changed.notify_all()
        self._thread.join(max(drain_seconds, 0.0))
        with self._changed:
            self._stop_now = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Scheduler:
        """Return itself; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it at once."""
        self.close()

    # --- the engine's thread ----------------------------------------------------------------------

    def _work(self) -> None:
        state: State = "crashed"
        try:
            while self._work_is_there():
                self._step()
            state = "stopped"
        except BaseException:
            _log.exception("the engine crashed")
        finally:
            with self._changed:
                self._state = state
                jobs = [*self._jobs.values(), *self._waiting, *self._left]
                self._jobs.clear()
                self._waiting.clear()
                self._left.clear()
            for job in jobs:
                self._fail(job, EngineStoppedError(_stopped(state)))

    def _work_is_there(self) -> bool:
        """Wait until there is something to do.

        Returns:
            False once the engine shall stop.
        """
        with self._changed:
            while True:
                self._beat = time.monotonic()
                if self._stop_now:
                    return False
                if self._jobs or self._waiting or self._left:
                    return True
                if self._state == "stopping":
                    return False
                self._idle = True
                self._changed.wait()
                self._idle = False

    def _step(self) -> None:
        self._let_leave()
        self._let_join()
        reading = [row for row, job in self._jobs.items() if job._next is None]
        if reading:
            self._read_chunk(reading[0], alone=len(reading) == len(self._jobs))
        self._write_tokens()

    def _let_leave(self) -> None:
        with self._changed:
            left = list(self._left)
            self._left.clear()
        for job in left:
            self._end(job, "cancelled")
        for row, job in list(self._jobs.items()):
            if job._cancelled:
                self._leave(row, "cancelled")

    def _let_join(self) -> None:
        with self._changed:
            while self._waiting and len(self._jobs) < self.slots:
                row = next(row for row in range(self.slots) if row not in self._jobs)
                self._jobs[row] = self._waiting.popleft()
                self._rows.rewind(row, 0)

    def _read_chunk(self, row: int, *, alone: bool) -> None:
        """Read on in a prompt, and choose the first token after its end.

        Args:
            row: The row of a job whose prompt is not read to its end.
            alone: Whether nobody waits for a token meanwhile.
        """
        job = self._jobs[row]
        if job.started is None:
            job.started = time.monotonic()
        done, total = len(self._rows.texts[row]), len(job.prompt)
        scored = job.prompt_scores is not None
        size = chunk_size(done, total, CHUNK if alone or scored else CHUNK_BESIDE_WRITERS)
        logits = self._rows.read(row, job.prompt[done : done + size], every_position=scored)
        if job.prompt_scores is not None:
            try:
                job.prompt_scores(done, logits)
            except BaseException as error:
                self._leave(row, error)
                return
        if done + size == total:
            self._choose(row, logits[-1])

    def _write_tokens(self) -> None:
        """Read the last token of every text that is being written, and choose the next."""
        writing = sorted(row for row, job in self._jobs.items() if job._next is not None)
        if not writing:
            return
        first = self._side_by_side(writing)
        jobs = [self._jobs[row] for row in range(first, first + len(writing))]
        logits = self._rows.step(first, [job._next for job in jobs if job._next is not None])
        for row in range(first, first + len(writing)):
            self._choose(row, logits[row - first])

    def _side_by_side(self, writing: list[int]) -> int:
        """Move the rows that are being written side by side, at the least cost.

        Args:
            writing: The rows, ascending.

        Returns:
            The first of them after that.
        """
        count, texts = len(writing), self._rows.texts

        def moved(first: int) -> tuple[list[int], list[int]]:
            block = range(first, first + count)
            return [row for row in writing if row not in block], [
                row for row in block if row not in writing
            ]

        def cost(first: int) -> int:
            return sum(len(texts[row]) for rows in moved(first) for row in rows)

        if writing[-1] - writing[0] == count - 1:
            return writing[0]
        first = min(range(self.slots - count + 1), key=cost)
        for source, target in zip(*moved(first), strict=True):
            self._rows.exchange(source, target)
            with self._changed:
                jobs = self._jobs.pop(source), self._jobs.pop(target, None)
                for row, job in zip((target, source), jobs, strict=True):
                    if job is not None:
                        self._jobs[row] = job
        return first

    def _choose(self, row: int, logits: NDArray[np.float32]) -> None:
        """Choose the next token of a row, and let the job leave if it ends here."""
        job = self._jobs[row]
        try:
            ending = self._next_token(job, logits)
        except BaseException as error:
            self._leave(row, error)
            return
        if ending is not None:
            self._leave(row, ending)

    def _next_token(self, job: Job, logits: NDArray[np.float32]) -> Ending | None:
        """Choose a token and hand it to the sink; what ends the job, if it ends."""
        context = self.model.context_length
        if job.new_tokens == job.max_new_tokens:
            return "max_new_tokens"
        if len(job.prompt) + job.new_tokens == context:
            return "context"
        token = job._next = job.choose(logits)
        job.new_tokens += 1
        if job.first_token is None:
            job.first_token = time.monotonic()
        goes_on = job.sink.token(token)
        if token in job.end_ids:
            return "end of turn"
        if not goes_on:
            return "stopped"
        if job.new_tokens == job.max_new_tokens:
            return "max_new_tokens"
        return "context" if len(job.prompt) + job.new_tokens == context else None

    def _leave(self, row: int, ending: Ending | BaseException) -> None:
        with self._changed:
            job = self._jobs.pop(row)
        if isinstance(ending, BaseException):
            self._fail(job, ending)
        else:
            self._end(job, ending)

    def _end(self, job: Job, ending: Ending) -> None:
        job.ended = time.monotonic()
        try:
            job.sink.end(ending)
        except BaseException:
            _log.exception("the sink of a job failed at its end")

    def _fail(self, job: Job, error: BaseException) -> None:
        job.ended = time.monotonic()
        if not isinstance(error, Exception):
            # Some libraries raise what is no Exception when they fail; it must not end the thread.
            error = RuntimeError(f"{type(error).__name__}: {error}")
        try:
            job.sink.fail(error)
        except BaseException:
            _log.exception("the sink of a job failed at its failure")


def chunk_size(done: int, total: int, most: int) -> int:
    """How many positions of a prompt are read next.

    ONNX Runtime computes a position that is read alone on another path, with other rounding. So
    a position is read alone only where ``OnnxModel`` does so too, in its chunks of ``CHUNK``:
    where the prompt's last one is the first of a chunk.

    Args:
        done: Positions that were read.
        total: Positions of the prompt, more than those.
        most: Most positions to read, at least 3.

    Returns:
        At least 1.
    """
    left = total - done
    if left > 1 and total % CHUNK == 1:
        left -= 1
    return most - 1 if left == most + 1 else min(most, left)


def _stopped(state: State) -> str:
    if state == "crashed":
        return "the engine has crashed; the server must be started anew"
    return "the engine is stopping and takes no more requests"
