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
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mistill.cost_model.free_memory import free_memory
from mistill.engine.key_value_cache import common_prefix
from mistill.engine.language_model import Choose, greedy
from mistill.engine.onnx_model import CHUNK, OnnxModel, chunk_size
from mistill.engine.prefix_store import PrefixStore, StoredText
from mistill.engine.text_rows import Scored, TextRows, bytes_per_position
from mistill.errors import EngineStoppedError, QueueFullError
from mistill.settings import require, require_range

Ending = Literal["end of turn", "stopped", "max_new_tokens", "context", "cancelled"]
State = Literal["running", "stopping", "stopped", "crashed"]

LEAST_CHUNK = 4
"""Fewest positions of a prompt that are read between two tokens of the others."""

READING_SHARE = 1.25
"""Time for reading prompts between two tokens of the others, as a multiple of that of a step."""

SHORT_PROMPT = 128
"""A prompt with so many unread positions does not wait for the end of a longer one."""

MOST_SLOTS = 256
USUAL_SLOTS = 16
"""Slots where the memory holds more: a step over more rows takes as long as two steps."""

DEFAULT_QUEUE = 32
USUAL_TEXT = 2048
"""Positions of a text for which slots are chosen, in a model with a longer context."""

MEMORY_SHARE = 1 / 4
"""Share of the free memory that the texts being written may take."""

STORE_SHARE = 1 / 16
MOST_STORE_BYTES = 256 << 20
"""By default, what was read before takes this share of the free memory, and no more bytes."""

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
            positions, shape (T, V), which are valid during the call. The prompt is then read whole,
            in the chunks of ``OnnxModel.logits`` and with its scores.
        repeatable: Whether the tokens must not depend on who else is served and what was read
            before. ONNX Runtime rounds otherwise where it writes a token than where it reads one,
            and in some graphs where an odd number of them are computed together. Then only keys and
            values of tokens that were read are used again, and numbers are made even.
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
    repeatable: bool = False
    cached_tokens: int = field(default=0, init=False)
    new_tokens: int = field(default=0, init=False)
    submitted: float = field(default=0.0, init=False)
    started: float | None = field(default=None, init=False)
    first_token: float | None = field(default=None, init=False)
    ended: float | None = field(default=None, init=False)
    _cancelled: bool = field(default=False, init=False, repr=False)
    # The token that was chosen and not yet read.
    _next: int | None = field(default=None, init=False, repr=False)
    # The number of the last chunk that was read of its prompt.
    _turn: int = field(default=0, init=False, repr=False)

    @property
    def _reads(self) -> bool:
        return self._next is None


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


@dataclass(kw_only=True)
class Statistics:
    """What the engine has done since it was started.

    Attributes:
        endings: Jobs by their ending; ``failed`` for those that failed and ``refused`` for those
            that a full queue refused.
        prompt_tokens: Tokens of all prompts whose reading began.
        cached_tokens: Those that were not read, because their keys and values were there.
        new_tokens: Tokens written.
        steps: Steps in which tokens were written.
        text_bytes: Memory that the keys and values in the rows take.
        store_bytes: Memory that the keys and values of texts read before take.
        stored_texts: Number of those texts.
    """

    endings: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    text_bytes: int = 0
    store_bytes: int = 0
    stored_texts: int = 0

    def count(self, ending: str) -> None:
        """Count a job that has ended.

        Args:
            ending: How.
        """
        self.endings[ending] = self.endings.get(ending, 0) + 1


@dataclass
class _Row:
    """What is known of a row of the buffers.

    Attributes:
        job: The job that has it.
        owner: For whom its text was read.
        used: When it was last used, as a number that rises.
        touched: Positions that take memory.
    """

    job: Job | None = None
    owner: str = ""
    used: int = 0
    touched: int = 0


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
        prefix_bytes: int | None = None,
        queue: int | None = None,
        after_tokens: Callable[[], None] = lambda: None,
        unnoticed_seconds: float = 0.0,
    ) -> None:
        """Start the engine's thread.

        Args:
            model: A model on the processor; nothing else should run it meanwhile.
            slots: Most jobs that write at once; None takes as many as fit into a quarter of the
                free memory, at most 16. Whatever the number, a job waits while it does not fit.
            prefix_bytes: Memory for texts that were read before and are not being continued; None
                takes a sixteenth of the free memory, at most 256 MiB. The last one is always
                there, so that its next turn is not read anew, but with 0 every prompt is read
                whole.
            queue: Most jobs that wait; None takes 32.
            after_tokens: Called in the engine's thread after sinks were called, once for all of
                them: when a prompt was read, and when each text has its next token. It must be
                quick and never fail.
            unnoticed_seconds: Time between two tokens that nobody notices, because those who read
                get what was written in such a time at once. So long a step may take while a
                prompt joins; larger pieces of it take less time together.

        Raises:
            SettingsError: If a number is out of range, or the model runs elsewhere than on the
                processor.
        """
        require_range("slots", slots, 1, MOST_SLOTS)
        require_range("prefix_bytes", prefix_bytes, 0)
        require_range("queue", queue, 0)
        require(
            model.provider == "cpu",
            f"only a model on the processor can be scheduled, not one on {model.provider}; open "
            "it with provider cpu",
        )
        free = free_memory()
        if prefix_bytes is None:
            prefix_bytes = min(int(STORE_SHARE * free), MOST_STORE_BYTES)
        position_bytes = bytes_per_position(model.session)
        # Positions of all rows together for which there is memory.
        self._room = int(MEMORY_SHARE * free) // position_bytes
        self.model = model
        self.slots = slots or usual_slots(self._room, model.context_length)
        self.queue = DEFAULT_QUEUE if queue is None else queue
        self._texts = TextRows(
            model.session, self.slots, model.context_length, model.vocabulary_size
        )
        self._rows = [_Row() for _ in range(self.slots)]
        self._store = PrefixStore(prefix_bytes)
        self._statistics = Statistics()
        self._waiting: deque[Job] = deque()
        self._left: list[Job] = []
        self._state: State = "running"
        self._stop_now = False
        self._beat = time.monotonic()
        self._idle = False
        self._turn = 0
        # A moving average of the time of a step, and the positions that are read beside it.
        self._step_seconds = 0.0
        self._chunk = float(LEAST_CHUNK)
        self._after_tokens = after_tokens
        self._unnoticed_seconds = unnoticed_seconds
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
            running = self._running()
            if len(self._waiting) + running >= self.slots + self.queue:
                self._statistics.count("refused")
                raise QueueFullError(
                    f"{running} requests are being answered and {len(self._waiting)} wait, which "
                    "is all that may; try again later"
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
            dead = self._state in ("running", "stopping") and not self._thread.is_alive()
            return Health(
                state="crashed" if dead else self._state,
                heartbeat_seconds=0.0 if self._idle else time.monotonic() - self._beat,
                waiting=len(self._waiting),
                running=self._running(),
                slots=self.slots,
            )

    def statistics(self) -> Statistics:
        """What the engine has done; does not wait for it.

        Returns:
            A copy.
        """
        with self._changed:
            return replace(
                self._statistics,
                endings=dict(self._statistics.endings),
                text_bytes=sum(row.touched for row in self._rows) * self._texts.position_bytes,
                store_bytes=self._store.size_bytes,
                stored_texts=len(self._store),
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

    def _running(self) -> int:
        return sum(row.job is not None for row in self._rows)

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
                jobs = [row.job for row in self._rows if row.job is not None]
                jobs += [*self._waiting, *self._left]
                for row in self._rows:
                    row.job = None
                self._waiting.clear()
                self._left.clear()
            for job in jobs:
                self._fail(job, EngineStoppedError(_stopped(state)))
            self._after_tokens()

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
                if self._waiting or self._left or self._running():
                    return True
                if self._state == "stopping":
                    return False
                self._idle = True
                self._changed.wait()
                self._idle = False

    def _step(self) -> None:
        self._let_leave()
        self._read_prompts(CHUNK if not self._of_jobs(reading=False) else int(self._chunk))
        self._after_tokens()
        self._write_tokens()
        self._after_tokens()
        if not self._waiting and not self._running():
            self._free_a_row()

    def _let_leave(self) -> None:
        with self._changed:
            left = list(self._left)
            self._left.clear()
        for job in left:
            self._end(job, "cancelled")
        for number, row in enumerate(self._rows):
            if row.job is not None and row.job._cancelled:
                self._leave(number, "cancelled")

    # --- prompts ----------------------------------------------------------------------------------

    def _read_prompts(self, most: int) -> None:
        """Read some positions of prompts, and learn how many may be read beside a step.

        Args:
            most: Positions to read, at least ``LEAST_CHUNK``.
        """
        before, left = time.monotonic(), most
        while left >= LEAST_CHUNK and (row := self._next_to_read()) is not None:
            left -= self._read_chunk(row, left)
        if most < CHUNK and most - left >= LEAST_CHUNK:
            seconds = time.monotonic() - before
            step = self._step_seconds
            allowed = max(READING_SHARE * step, self._unnoticed_seconds - step)
            wanted = (most - left) * allowed / seconds
            self._chunk = min(max(_moved(self._chunk, wanted), LEAST_CHUNK), CHUNK - 1.0)

    def _next_to_read(self) -> int | None:
        """The row of the prompt to read on, which may be that of a job that begins now.

        One prompt is read after another, so that those that begin alike need not be read twice;
        only a short one does not wait for the end of a long one, and takes turns with it.
        """
        readers = self._of_jobs(reading=True)
        if len(readers) < 2:
            begun = self._begin_next(readers[0] if readers else None)
            readers += [] if begun is None else [begun]
        return min(readers, key=lambda row: self._job(row)._turn, default=None)

    def _begin_next(self, reader: int | None) -> int | None:
        """Give the first job that waits a row, if there is one and it may begin now."""
        with self._changed:
            if not self._waiting or self._running() == self.slots:
                return None
            job = self._waiting[0]
            needed = self._positions_of(job)
            taken = sum(self._held(row) for row in self._rows if row.job is not None)
            if taken and taken + needed > self._room:
                return None
        source, shared = self._longest_prefix(job)
        if reader is not None:
            unread = len(self._job(reader).prompt) - len(self._texts.texts[reader])
            if unread <= SHORT_PROMPT or len(job.prompt) - shared > SHORT_PROMPT:
                return None
        row = self._row_for(source, shared)
        self._fill(row, source, shared)
        self._make_room(row, needed)
        with self._changed:
            if not self._waiting or self._waiting[0] is not job:
                return None  # it was cancelled meanwhile
            self._waiting.popleft()
            self._rows[row].job = job
        self._rows[row].owner = job.owner
        job.cached_tokens = shared
        job.started = time.monotonic()
        self._statistics.prompt_tokens += len(job.prompt)
        self._statistics.cached_tokens += shared
        return row

    def _longest_prefix(self, job: Job) -> tuple[int | StoredText | None, int]:
        """The row or stored text of the same owner that shares the most tokens with a prompt.

        The last token is always read again, because its scores are needed, and where the job must
        be repeatable not alone.
        """
        if job.prompt_scores is not None or not self._store.most_bytes:
            return None, 0
        ids = job.prompt[: -2 if job.repeatable else -1]
        source: int | StoredText | None
        source, most = self._store.longest(job.owner, ids, together=job.repeatable)
        for number, row in enumerate(self._rows):
            if row.owner == job.owner:
                shared = common_prefix(self._texts.texts[number], ids)
                if job.repeatable:
                    shared = min(shared, self._texts.read_together[number])
                if shared >= max(most, 1):
                    source, most = number, shared
        return source, most - most % 2 if job.repeatable else most

    def _row_for(self, source: int | StoredText | None, shared: int) -> int:
        """The row that a job gets, whose text may be lost."""
        free = [number for number, row in enumerate(self._rows) if row.job is None]
        if isinstance(source, int) and source in free and self._mostly_shared(source, shared):
            return source
        busy = [number for number, row in enumerate(self._rows) if row.job is not None]

        def least_loss(row: int) -> tuple[int, int]:
            if self._texts.texts[row]:
                return 1, self._rows[row].used
            return 0, min((abs(row - other) for other in busy), default=row)

        return min(free, key=least_loss)

    def _make_room(self, row: int, needed: int) -> None:
        """Give back the memory of rows that no job has, the least recently used first."""
        held = sum(self._held(other) for other in self._rows)
        held += max(needed - self._rows[row].touched, 0)
        idle = [n for n, other in enumerate(self._rows) if other.job is None and n != row]
        for number in sorted(idle, key=lambda number: self._rows[number].used):
            if held <= self._room:
                return
            held -= self._rows[number].touched
            self._keep(number)
            self._texts.release(number)
            self._rows[number].touched = 0

    def _fill(self, row: int, source: int | StoredText | None, shared: int) -> None:
        """Put the first positions of a text into a row; what the row held is stored."""
        if isinstance(source, StoredText):
            self._store.use(source)
        if source != row or not self._mostly_shared(row, shared):
            self._keep(row)
        if isinstance(source, StoredText):
            self._texts.load(row, source, shared)
        elif source is not None and source != row:
            self._texts.copy(source, row, shared)
        else:
            self._texts.rewind(row, shared)
        self._touch(row)

    def _mostly_shared(self, row: int, shared: int) -> bool:
        """Whether a text that begins as that of a row may take its place: little is lost."""
        return 4 * shared >= 3 * len(self._texts.texts[row])

    def _give_back(self) -> None:
        """Forget texts that are not being continued, as many as there is no memory for.

        Those in the store lost their rows earlier, and go first; the last one stays.
        """
        if not self._store.most_bytes:
            return
        idle = [n for n, row in enumerate(self._rows) if row.job is None and row.touched]
        idle.sort(key=lambda number: self._rows[number].used)
        each = self._texts.position_bytes
        held = sum(self._rows[number].touched for number in idle) * each
        self._store.shrink(self._store.most_bytes - held)
        for number in idle[:-1]:
            if held <= self._store.most_bytes:
                return
            held -= self._rows[number].touched * each
            self._texts.release(number)
            self._rows[number].touched = 0

    def _free_a_row(self) -> None:
        """Store the least recently used text while nobody waits, if no row is without one.

        The next job would otherwise wait for it.
        """
        if all(self._texts.texts[number] for number in range(self.slots)) and self.slots > 1:
            row = min(range(self.slots), key=lambda number: self._rows[number].used)
            self._keep(row)
            self._texts.rewind(row, 0)

    def _keep(self, row: int) -> None:
        """Store the text of a row that is about to be lost."""
        self._store.add(
            self._rows[row].owner,
            self._texts.texts[row],
            self._texts.read_together[row],
            self._texts.values(row),
        )

    def _read_chunk(self, row: int, most: int) -> int:
        """Read on in a prompt, and choose the first token after its end.

        Args:
            row: The row of a job whose prompt is not read to its end.
            most: Positions to read at most, where the prompt need not be scored.

        Returns:
            Positions that were read.
        """
        job = self._job(row)
        self._turn += 1
        job._turn = self._turn
        done = len(self._texts.texts[row])
        scored = job.prompt_scores is not None
        size = chunk_size(len(job.prompt) - done, CHUNK if scored else most)
        if scored:
            of: Scored = "every"
        else:
            of = "last" if done + size == len(job.prompt) else "none"
        logits = self._texts.read(
            row, job.prompt[done : done + size], of, paired=job.repeatable or scored
        )
        self._touch(row)
        if job.prompt_scores is not None:
            try:
                job.prompt_scores(done, logits)
            except BaseException as error:
                self._leave(row, error)
                return size
        if done + size == len(job.prompt):
            self._choose(row, logits[-1])
        return size

    # --- tokens -----------------------------------------------------------------------------------

    def _write_tokens(self) -> None:
        """Read the last token of every text that is being written, and choose the next."""
        writing = self._of_jobs(reading=False)
        if not writing:
            return
        first = self._side_by_side(writing)
        rows = range(first, first + len(writing))
        before = time.monotonic()
        tokens = [token for row in rows if (token := self._job(row)._next) is not None]
        paired = any(self._job(row).repeatable for row in rows) and self._rounds_by_rows
        logits = self._texts.step(first, tokens, paired=paired)
        self._step_seconds = _moved(self._step_seconds, time.monotonic() - before)
        self._statistics.steps += 1
        for row in rows:
            self._touch(row)
            self._choose(row, logits[row - first])

    @cached_property
    def _rounds_by_rows(self) -> bool:
        return self._texts.rounds_by_rows()

    def _side_by_side(self, writing: list[int]) -> int:
        """Move the rows that are being written side by side, at the least cost.

        Args:
            writing: The rows, ascending.

        Returns:
            The first of them after that.
        """
        count, texts = len(writing), self._texts.texts

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
            self._texts.exchange(source, target)
            rows = self._rows
            with self._changed:
                touched = rows[source].touched, rows[target].touched
                rows[source], rows[target] = rows[target], rows[source]
                # The texts have changed places; what was written to a row takes memory there still.
                rows[source].touched = max(touched[0], len(texts[source]))
                rows[target].touched = max(touched[1], len(texts[target]))
        return first

    def _choose(self, row: int, logits: NDArray[np.float32]) -> None:
        """Choose the next token of a row, and let the job leave if it ends here."""
        job = self._job(row)
        if job._cancelled:
            self._leave(row, "cancelled")
            return
        try:
            ending = self._next_token(job, logits)
        except BaseException as error:
            self._leave(row, error)
            return
        if ending is not None:
            self._leave(row, ending)

    def _next_token(self, job: Job, logits: NDArray[np.float32]) -> Ending | None:
        """Choose a token and hand it to the sink; what ends the job, if it ends."""
        room = self.model.context_length - len(job.prompt)
        if job.max_new_tokens == 0:
            return "max_new_tokens"
        if room == 0:
            return "context"
        token = job._next = job.choose(logits)
        job.new_tokens += 1
        self._statistics.new_tokens += 1
        if job.first_token is None:
            job.first_token = time.monotonic()
        goes_on = job.sink.token(token)
        if token in job.end_ids:
            return "end of turn"
        if not goes_on:
            return "stopped"
        if job.new_tokens == job.max_new_tokens:
            return "max_new_tokens"
        return "context" if job.new_tokens == room else None

    # --- rows and jobs ----------------------------------------------------------------------------

    def _of_jobs(self, *, reading: bool) -> list[int]:
        """The rows of jobs whose prompt is being read, or else of those that write, ascending."""
        return [
            number
            for number, row in enumerate(self._rows)
            if row.job is not None and row.job._reads == reading
        ]

    def _job(self, row: int) -> Job:
        job = self._rows[row].job
        assert job is not None
        return job

    def _positions_of(self, job: Job) -> int:
        """Positions that a job may need."""
        return min(len(job.prompt) + job.max_new_tokens, self.model.context_length)

    def _held(self, row: _Row) -> int:
        """Positions of a row that take memory, or will."""
        return row.touched if row.job is None else max(row.touched, self._positions_of(row.job))

    def _touch(self, row: int) -> None:
        self._turn += 1
        self._rows[row].used = self._turn
        self._rows[row].touched = max(self._rows[row].touched, len(self._texts.texts[row]))

    def _leave(self, row: int, ending: Ending | BaseException) -> None:
        job = self._job(row)
        with self._changed:
            self._rows[row].job = None
        self._give_back()
        if isinstance(ending, BaseException):
            self._fail(job, ending)
        else:
            self._end(job, ending)

    def _end(self, job: Job, ending: Ending) -> None:
        job.ended = time.monotonic()
        self._statistics.count(ending)
        try:
            job.sink.end(ending)
        except BaseException as failure:
            # The message may hold words of a conversation.
            _log.error("the sink of a job raised %s at its end", type(failure).__name__)

    def _fail(self, job: Job, error: BaseException) -> None:
        job.ended = time.monotonic()
        self._statistics.count("failed")
        if not isinstance(error, Exception):
            # Some libraries raise what is no Exception when they fail; it must not end the thread.
            error = RuntimeError(f"{type(error).__name__}: {error}")
        try:
            job.sink.fail(error)
        except BaseException as failure:
            _log.error("the sink of a job raised %s at its failure", type(failure).__name__)


def usual_slots(room: int, context: int) -> int:
    """How many jobs may write at once.

    Args:
        room: Positions for which there is memory.
        context: Positions of the longest text.

    Returns:
        From 1 to ``USUAL_SLOTS``.
    """
    # Windows counts memory that is reserved as taken, even if nothing was written to it.
    usual = context if sys.platform == "win32" else min(context, USUAL_TEXT)
    return min(max(room // usual, 1), USUAL_SLOTS)


def write_all(
    model: OnnxModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    choose: Sequence[Choose] | None = None,
    end_ids: Collection[int] = (),
    slots: int | None = None,
    finished: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Write replies to several prompts at once, which takes much less time than one by one.

    Each reply is what ``OnnxModel.stream`` writes after its prompt alone, up to the rounding of
    sums, and does not depend on the others.

    Args:
        model: A model on the processor.
        prompts: Token ids, at least one in each.
        max_new_tokens: Most tokens of one reply.
        choose: One for each prompt, because a sampler remembers; all greedy if not given.
        end_ids: Tokens that end a reply and are its last.
        slots: Replies that are written at once; see ``Scheduler``.
        finished: Called once for each reply, in the order of the prompts.

    Returns:
        The replies in the order of the prompts; one that fills the context ends there.

    Raises:
        ValueError: If a prompt is empty or holds an id that is not in the vocabulary.
        ContextError: If one exceeds the context.
    """
    require(max_new_tokens >= 1, f"max_new_tokens must be 1 or more, not {max_new_tokens}")
    require(
        choose is None or len(choose) == len(prompts),
        f"choose must hold one function for each of the {len(prompts)} prompts",
    )
    texts = [model.checked(prompt) for prompt in prompts]
    if not texts:
        return []
    replies = [Reply() for _ in texts]
    written = []
    with Scheduler(model, slots=slots, queue=len(texts)) as scheduler:
        for number, (text, reply) in enumerate(zip(texts, replies, strict=True)):
            scheduler.submit(
                Job(
                    prompt=text,
                    max_new_tokens=max_new_tokens,
                    choose=greedy if choose is None else choose[number],
                    end_ids=end_ids,
                    sink=reply,
                    repeatable=True,
                )
            )
        for reply in replies:
            written.append(reply.wait())
            finished()
    return written


class Reply:
    """A sink that gathers the tokens of a job.

    Attributes:
        tokens: Those that were written so far.
    """

    tokens: list[int]

    def __init__(self, goes_on: Callable[[list[int]], bool] = lambda tokens: True) -> None:
        """Make a sink.

        Args:
            goes_on: Whether to go on after the tokens so far; called in the engine's thread.
        """
        self.tokens = []
        self._goes_on = goes_on
        self._error: Exception | None = None
        self._over = threading.Event()

    def token(self, token: int) -> bool:
        """Take a token; see ``Sink.token``."""
        self.tokens.append(token)
        return self._goes_on(self.tokens)

    def end(self, ending: Ending) -> None:
        """Take the end; see ``Sink.end``."""
        self._over.set()

    def fail(self, error: Exception) -> None:
        """Take what went wrong; see ``Sink.fail``."""
        self._error = error
        self._over.set()

    def wait(self) -> list[int]:
        """Wait for the end of the job.

        Returns:
            The tokens.

        Raises:
            Exception: What the job failed with.
        """
        self._over.wait()
        if self._error is not None:
            raise self._error
        return self.tokens


def _moved(average: float, value: float) -> float:
    """A moving average after one more value; the first is the average."""
    return value if not average else average + (value - average) / 4


def _stopped(state: State) -> str:
    if state == "crashed":
        return "the engine has crashed; the server must be started anew"
    return "the engine is stopping and takes no more requests"
