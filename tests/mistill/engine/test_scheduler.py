"""Many jobs at once against the same prompts one by one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import export
from mistill.engine import scheduler as scheduler_module
from mistill.engine.language_model import Choose, greedy
from mistill.engine.onnx_model import CHUNK, OnnxModel, chunk_size
from mistill.engine.sampling import Sampler, SamplingSettings
from mistill.engine.scheduler import Job, Scheduler, usual_slots, write_all
from mistill.engine.text_rows import TextRows, bytes_per_position
from mistill.errors import ContextError, EngineStoppedError, QueueFullError, SettingsError
from tests.tiny import tiny_model

LONG = 60
"""Seconds within which anything here ends, on the slowest machine."""


@pytest.fixture(scope="module", params=["full attention", "sliding window"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    folder = tmp_path_factory.mktemp("scheduler")
    window = 16 if request.param == "sliding window" else None
    source = tiny_model(folder / "model", seed=2, sliding_window=window)
    return OnnxModel(export.to_onnx(source, folder / "chatbot", parity_positions=0), threads=1)


class Heard:
    """A sink that remembers what it was told."""

    def __init__(self, until: int | None = None) -> None:
        self.tokens: list[int] = []
        self.ending: str | None = None
        self.error: Exception | None = None
        self.calls_after_end = 0
        self.until = until
        self.hold: Callable[[int], object] = lambda token: None
        self._over = threading.Event()

    def token(self, token: int) -> bool:
        self.calls_after_end += self._over.is_set()
        self.tokens.append(token)
        self.hold(token)
        return len(self.tokens) != self.until

    def end(self, ending: str) -> None:
        self.calls_after_end += self._over.is_set()
        self.ending = ending
        self._over.set()

    def fail(self, error: Exception) -> None:
        self.calls_after_end += self._over.is_set()
        self.error = error
        self._over.set()

    def wait(self) -> Heard:
        assert self._over.wait(LONG), "the job did not end"
        assert self.calls_after_end == 0
        return self


def some_ids(count: int, seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, 300, count).tolist()
    return ids


def a_job(
    prompt: list[int],
    sink: Heard,
    *,
    tokens: int = 40,
    choose: Choose = greedy,
    end_ids: tuple[int, ...] = (),
) -> Job:
    return Job(prompt=prompt, max_new_tokens=tokens, choose=choose, end_ids=end_ids, sink=sink)


def alone(model: OnnxModel, prompt: list[int], tokens: int = 40, choose: Choose = greedy):
    model._cache.rewind(0)
    return list(islice(model.stream(prompt, choose), tokens))


def test_jobs_of_every_length_that_join_and_leave_write_what_they_write_alone(
    model: OnnxModel,
) -> None:
    start = some_ids(20, 1)
    prompts = [some_ids(count, count) for count in (1, 2, 57, 33, 34, 128, 129, 130, 257, 160)]
    prompts += [start, start + some_ids(7, 4), start[:12], start[:12]]
    lengths = [3 + 7 * number % 40 for number in range(len(prompts))]
    expected = [alone(model, prompt, n) for prompt, n in zip(prompts, lengths, strict=True)]
    with Scheduler(model, slots=4) as scheduler:
        sinks = [Heard() for _ in prompts]
        for prompt, count, sink in zip(prompts, lengths, sinks, strict=True):
            scheduler.submit(a_job(prompt, sink, tokens=count))
        assert [sink.wait().tokens for sink in sinks] == expected
        assert {sink.ending for sink in sinks} == {"max_new_tokens"}
        assert scheduler.health().running == 0


def test_chunks_are_even_where_more_follows_and_none_has_one_position() -> None:
    for total in range(1, 400):
        for most in (3, 8, 32, CHUNK):
            sizes: list[int] = []
            while sum(sizes) < total:
                sizes.append(chunk_size(total - sum(sizes), most))
            assert sum(sizes) == total
            assert max(sizes) <= most
            assert not any(size % 2 for size in sizes[:-1])
            assert 1 not in sizes or total == 1


def test_what_sinks_were_told_in_a_step_is_told_of_once_after_it(model: OnnxModel) -> None:
    told: list[object] = []
    everybody_is_there = threading.Event()

    def hold(token: int) -> None:
        assert everybody_is_there.wait(LONG)
        told.append(token)

    sinks = [Heard() for _ in range(3)]
    with Scheduler(model, slots=3, after_tokens=lambda: told.append("after")) as scheduler:
        for number, sink in enumerate(sinks):
            sink.hold = hold
            scheduler.submit(a_job(some_ids(20, number), sink, tokens=30))
        everybody_is_there.set()
        for sink in sinks:
            sink.wait()
    steps = "".join("t" if isinstance(one, int) else "|" for one in told).split("|")
    assert sum(map(len, steps)) == 90
    assert max(map(len, steps)) == 3  # of all who write side by side
    assert steps[-1] == ""


@pytest.mark.parametrize(
    ("unnoticed", "positions"), [(0.0, 4), (0.025, 4), (0.185, 16), (9.0, 126)]
)
def test_a_prompt_that_joins_is_read_in_pieces_that_nobody_notices(
    model: OnnxModel, unnoticed: float, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    sizes: list[int] = []
    read, step = TextRows.read, TextRows.step

    def slow_read(rows: TextRows, row: int, tokens: list[int], *given: Any, **named: Any) -> Any:
        nonlocal now
        now += 0.01 * len(tokens)
        sizes.append(len(tokens))
        return read(rows, row, tokens, *given, **named)

    def slow_step(rows: TextRows, *given: Any, **named: Any) -> Any:
        nonlocal now
        now += 0.01
        return step(rows, *given, **named)

    monkeypatch.setattr(scheduler_module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(TextRows, "read", slow_read)
    monkeypatch.setattr(TextRows, "step", slow_step)
    writes, joins = threading.Event(), threading.Event()
    writer, joiner = Heard(), Heard()

    def hold(token: int) -> None:
        if len(writer.tokens) == 5:
            writes.set()
            assert joins.wait(LONG)

    with Scheduler(model, slots=2, unnoticed_seconds=unnoticed) as scheduler:
        writer.hold = hold
        scheduler.submit(a_job(some_ids(20, 1), writer, tokens=200))
        assert writes.wait(LONG)
        scheduler.submit(a_job(some_ids(400, 2), joiner, tokens=1))
        joins.set()
        joiner.wait()
        writer.wait()
    assert sizes[0] == 20
    assert max(sizes[1:]) == positions
    assert sizes.count(positions) > 1


def test_a_seed_draws_the_same_beside_others(model: OnnxModel) -> None:
    def sampler(seed: int) -> Sampler:
        settings = SamplingSettings(temperature=1.5, repetition_penalty=1.2)
        return Sampler(settings, np.random.default_rng(seed))

    prompts = [some_ids(15, seed) for seed in range(3)]
    expected = [alone(model, prompt, 20, sampler(seed)) for seed, prompt in enumerate(prompts)]
    with Scheduler(model, slots=3) as scheduler:
        sinks = [Heard() for _ in prompts]
        for seed, (prompt, sink) in enumerate(zip(prompts, sinks, strict=True)):
            scheduler.submit(a_job(prompt, sink, tokens=20, choose=sampler(seed)))
        assert [sink.wait().tokens for sink in sinks] == expected


def test_each_reason_for_an_end_has_its_name(model: OnnxModel) -> None:
    prompt = some_ids(15, 1)
    written = alone(model, prompt)
    full = some_ids(model.context_length - 5, 2)
    jobs = {
        "end of turn": a_job(prompt, Heard(), end_ids=(written[4],)),
        "stopped": a_job(prompt, Heard(until=3)),
        "max_new_tokens": a_job(prompt, Heard(), tokens=4),
        "context": a_job(full, Heard()),
    }
    with Scheduler(model, slots=2) as scheduler:
        for job in jobs.values():
            scheduler.submit(job)
        for ending, job in jobs.items():
            assert isinstance(job.sink, Heard)
            assert job.sink.wait().ending == ending
            assert job.new_tokens == len(job.sink.tokens)
            assert job.submitted <= (job.started or 0) <= (job.first_token or 0) <= (job.ended or 0)
    assert [jobs[name].new_tokens for name in jobs] == [written.index(written[4]) + 1, 3, 4, 5]


def test_a_job_without_new_tokens_only_scores_its_prompt(model: OnnxModel) -> None:
    prompt = some_ids(300, 5)
    expected = model.logits(np.array([prompt]))[0]
    scores: dict[int, NDArray[np.float32]] = {}
    job = a_job(prompt, Heard(), tokens=0)
    job.prompt_scores = lambda first, logits: scores.update({first: logits.copy()})
    with Scheduler(model, slots=2) as scheduler:
        scheduler.submit(a_job(some_ids(9, 1), Heard(), tokens=100))
        scheduler.submit(job)
        assert isinstance(job.sink, Heard)
        assert job.sink.wait().ending == "max_new_tokens"
        assert job.sink.tokens == []
    assert len(scores) == 3
    np.testing.assert_array_equal(np.concatenate(list(scores.values())), expected)


def test_a_job_that_raises_ends_alone(model: OnnxModel) -> None:
    class Gone(BaseException):
        """What some libraries raise when they fail."""

    def broken(logits: NDArray[np.float32]) -> int:
        raise Gone("broken")

    def refuse(*_: object) -> None:
        raise KeyError("sink")

    prompt = some_ids(15, 1)
    bad, worse, scored, good = Heard(), Heard(), Heard(), Heard()
    worse.hold = refuse
    failing = a_job(prompt, scored)
    failing.prompt_scores = refuse
    with Scheduler(model, slots=4) as scheduler:
        for job in (
            a_job(prompt, good),
            a_job(prompt, bad, choose=broken),
            a_job(prompt, worse),
            failing,
        ):
            scheduler.submit(job)
        assert good.wait().tokens == alone(model, prompt)
        assert "Gone: broken" in str(bad.wait().error)
        assert isinstance(worse.wait().error, KeyError)
        assert isinstance(scored.wait().error, KeyError)
        assert scheduler.health().state == "running"


def test_a_sink_that_raises_at_the_end_is_logged_without_its_words(
    model: OnnxModel, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Heard):
        def end(self, ending: str) -> None:
            super().end(ending)
            raise ValueError("a word of the conversation")

    with Scheduler(model, slots=1) as scheduler:
        job = a_job(some_ids(9, 1), Broken(), tokens=2)
        scheduler.submit(job)
        assert isinstance(job.sink, Heard)
        job.sink.wait()
        assert tokens_of(finished(scheduler, some_ids(9, 1), 2)) == job.sink.tokens
    assert "ValueError" in caplog.text
    assert "conversation" not in caplog.text


def test_a_client_that_leaves_frees_its_row_and_changes_nobody_else(
    model: OnnxModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queued, in its prompt, and at its third token."""
    prompt = some_ids(30, 3)
    expected = alone(model, prompt)
    third = threading.Event()
    read_afterwards: list[list[int]] = []
    read = TextRows.read

    def noted(self: TextRows, row: int, tokens: list[int], *options: Any, **more: Any) -> Any:
        if third.is_set():
            read_afterwards.append(tokens)
        return read(self, row, tokens, *options, **more)

    monkeypatch.setattr(TextRows, "read", noted)
    with Scheduler(model, slots=3) as scheduler:
        stays, writes, reads, queued = Heard(), Heard(), Heard(), Heard()
        writing = a_job(some_ids(40, 4), writes, tokens=400)
        reading = a_job(some_ids(400, 5), reads)
        waiting = a_job(some_ids(9, 6), queued)

        def leave(token: int) -> None:
            if len(writes.tokens) == 3:
                # In the engine's thread, between two tokens: the very next step must see it.
                for job in (writing, reading, waiting):
                    scheduler.cancel(job)
                third.set()

        writes.hold = leave
        for job in (a_job(prompt, stays), writing, reading, waiting):
            scheduler.submit(job)
        assert third.wait(LONG)
        assert stays.wait().tokens == expected
        assert len(writes.wait().tokens) == 3
        for heard in (writes, reads, queued):
            assert heard.wait().ending == "cancelled"
        assert reads.tokens == queued.tokens == []
        assert reading.started is not None
        assert waiting.started is None
        assert read_afterwards == []
        scheduler.cancel(writing)
        assert writes.calls_after_end == 0


def test_a_job_that_is_cancelled_during_a_step_gets_no_token_of_it(
    model: OnnxModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(some_ids(9, 1), Heard())
    step = TextRows.step

    def cancelling(self: TextRows, *arguments: Any, **options: Any) -> Any:
        if job.new_tokens == 4:
            scheduler.cancel(job)
        return step(self, *arguments, **options)

    monkeypatch.setattr(TextRows, "step", cancelling)
    with Scheduler(model, slots=1) as scheduler:
        scheduler.submit(job)
        assert isinstance(job.sink, Heard)
        assert job.sink.wait().ending == "cancelled"
        assert len(job.sink.tokens) == 4


def test_a_full_queue_refuses_at_once_and_the_others_are_served(model: OnnxModel) -> None:
    gate = threading.Event()
    sinks = [Heard() for _ in range(4)]
    sinks[0].hold = lambda token: gate.wait(LONG)
    with Scheduler(model, slots=1, queue=2) as scheduler:
        for sink in sinks[:3]:
            scheduler.submit(a_job(some_ids(9, 1), sink, tokens=5))
        with pytest.raises(QueueFullError, match="try again later"):
            scheduler.submit(a_job(some_ids(9, 1), sinks[3]))
        gate.set()
        assert [len(sink.wait().tokens) for sink in sinks[:3]] == [5, 5, 5]
        scheduler.submit(a_job(some_ids(9, 1), sinks[3], tokens=5))
        sinks[3].wait()


def test_a_crash_fails_every_job_and_shows_in_the_health(
    model: OnnxModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Scheduler(model, slots=1) as scheduler:
        first, second = Heard(), Heard()
        both = threading.Event()

        def crash(*_: object, **__: object) -> None:
            both.wait(LONG)
            raise MemoryError("no memory for the graph")

        monkeypatch.setattr(scheduler._texts, "step", crash)
        for sink in (first, second):
            scheduler.submit(a_job(some_ids(9, 1), sink))
        both.set()
        for sink in (first, second):
            assert isinstance(sink.wait().error, EngineStoppedError)
        scheduler._thread.join(LONG)
        assert scheduler.health().state == "crashed"
        with pytest.raises(EngineStoppedError, match="crashed"):
            scheduler.submit(a_job(some_ids(9, 1), Heard()))


def test_closing_lets_jobs_end_for_a_while_and_then_fails_them(model: OnnxModel) -> None:
    patient, endless = Heard(), Heard()
    scheduler = Scheduler(model, slots=1)
    scheduler.submit(a_job(some_ids(9, 1), patient, tokens=30))
    scheduler.close(LONG)
    assert patient.wait().ending == "max_new_tokens"
    assert scheduler.health().state == "stopped"

    gate = threading.Event()
    scheduler = Scheduler(model, slots=1)
    endless.hold = lambda token: gate.set()
    scheduler.submit(a_job(some_ids(9, 1), endless, tokens=450))
    assert gate.wait(LONG)
    endless.hold = lambda token: threading.Event().wait(0.01)
    scheduler.close(0.05)
    assert isinstance(endless.wait().error, EngineStoppedError)
    assert len(endless.tokens) < 450
    with pytest.raises(EngineStoppedError, match="no more"):
        scheduler.submit(a_job(some_ids(9, 1), Heard()))


def test_bad_jobs_are_refused_when_they_are_submitted(model: OnnxModel) -> None:
    with Scheduler(model, slots=1) as scheduler:
        for prompt, tokens, error in (
            ([], 1, ValueError),
            ([10_000], 1, ValueError),
            (some_ids(model.context_length + 1, 1), 1, ContextError),
            ([5], -1, SettingsError),
        ):
            with pytest.raises(error):
                scheduler.submit(a_job(prompt, Heard(), tokens=tokens))
    with pytest.raises(SettingsError, match="slots"):
        Scheduler(model, slots=0)


# --- what was read before -------------------------------------------------------------------------


def finished(scheduler: Scheduler, prompt: list[int], tokens: int = 12, **options: object) -> Job:
    """A job that has run to its end."""
    job = a_job(prompt, Heard(), tokens=tokens)
    for name, value in options.items():
        setattr(job, name, value)
    scheduler.submit(job)
    assert isinstance(job.sink, Heard)
    assert job.sink.wait().error is None
    return job


def tokens_of(job: Job) -> list[int]:
    assert isinstance(job.sink, Heard)
    return job.sink.tokens


@pytest.mark.parametrize("slots", [1, 3])
def test_prompts_that_begin_like_earlier_ones_are_answered_as_if_read_afresh(
    model: OnnxModel, slots: int
) -> None:
    """Exact, longer, shorter, diverging, a later turn, and again after others took the row."""
    first = some_ids(100, 1)
    with Scheduler(model, slots=slots) as scheduler:
        reply = tokens_of(finished(scheduler, first))
        turn = first + reply + some_ids(9, 2)
        others = [some_ids(60, seed) for seed in range(10, 14)]
        for prompt, cached in [
            (first, 99),
            (first + some_ids(5, 3), 100),
            (first[:50], 49),
            (first[:70] + some_ids(20, 4), 70),
            (turn, 100),
            *((other, 0) for other in others),
            (turn, 120),
            (first, 99),
            (others[0], 59),
            ([first[0]], 0),
        ]:
            job = finished(scheduler, prompt)
            assert tokens_of(job) == alone(model, prompt, 12), (len(prompt), job.cached_tokens)
            assert job.cached_tokens >= cached, len(prompt)
        statistics = scheduler.statistics()
        assert statistics.cached_tokens > 0
        assert statistics.stored_texts > 0
        assert statistics.store_bytes > 0


def test_interleaved_conversations_share_nothing(model: OnnxModel) -> None:
    """Each turn of four conversations over two rows is what it is in a conversation alone."""
    rng = np.random.default_rng(0)
    texts = [some_ids(10, seed) for seed in range(4)]
    with Scheduler(model, slots=2) as scheduler:
        for turn in range(12):
            prompts = [text + some_ids(int(rng.integers(1, 9)), 100 + turn) for text in texts]
            jobs = [a_job(prompt, Heard(), tokens=6) for prompt in prompts]
            for job in jobs:
                job.repeatable = True
                scheduler.submit(job)
            for number, (job, prompt) in enumerate(zip(jobs, prompts, strict=True)):
                assert isinstance(job.sink, Heard)
                assert job.sink.wait().tokens == alone(model, prompt, 6)
                texts[number] = prompt + job.sink.tokens
        assert scheduler.statistics().cached_tokens > 400


def test_what_one_owner_had_read_is_not_used_for_another(model: OnnxModel) -> None:
    prompt = some_ids(80, 1)
    with Scheduler(model, slots=2) as scheduler:
        assert finished(scheduler, prompt, owner="a").cached_tokens == 0
        assert finished(scheduler, prompt, owner="b").cached_tokens == 0
        for other in range(4):  # into the store
            finished(scheduler, some_ids(60, other + 5), owner="c")
        assert finished(scheduler, prompt, owner="d").cached_tokens == 0
        assert finished(scheduler, prompt, owner="b").cached_tokens == 79


def test_no_bytes_for_prefixes_read_every_prompt_whole(model: OnnxModel) -> None:
    prompt = some_ids(80, 1)
    with Scheduler(model, slots=2, prefix_bytes=0) as scheduler:
        jobs = [finished(scheduler, prompt) for _ in range(3)]
        assert [job.cached_tokens for job in jobs] == [0, 0, 0]
        assert scheduler.statistics().stored_texts == 0


def test_a_repeatable_job_uses_only_what_was_read_and_not_what_was_written(
    model: OnnxModel,
) -> None:
    prompt = some_ids(40, 1)
    with Scheduler(model, slots=2) as scheduler:
        reply = tokens_of(finished(scheduler, prompt, tokens=20))
        turn = prompt + reply + some_ids(5, 2)
        assert finished(scheduler, turn, repeatable=True).cached_tokens == 40
        # The reply was read in the meantime.
        again = finished(scheduler, turn, repeatable=True)
        assert again.cached_tokens == len(turn) - 3  # an even number
        assert tokens_of(again) == alone(model, turn, 12)


def test_what_was_copied_from_a_written_reply_counts_as_written(model: OnnxModel) -> None:
    prompt = some_ids(40, 1)
    with Scheduler(model, slots=3) as scheduler:
        reply = tokens_of(finished(scheduler, prompt, tokens=80))
        diverging = prompt + reply[:20] + some_ids(9, 2)
        assert finished(scheduler, diverging).cached_tokens == 60
        again = finished(scheduler, prompt + reply[:15] + some_ids(9, 3), repeatable=True)
        assert again.cached_tokens == 40
        assert tokens_of(again) == alone(model, again.prompt, 12)


def test_prompts_that_begin_alike_and_come_together_are_read_once(model: OnnxModel) -> None:
    prompt = some_ids(200, 1)
    with Scheduler(model, slots=4) as scheduler:
        jobs = [a_job(prompt, Heard(), tokens=10) for _ in range(4)]
        for job in jobs:
            scheduler.submit(job)
        expected = alone(model, prompt, 10)
        for job in jobs:
            assert isinstance(job.sink, Heard)
            assert job.sink.wait().tokens == expected
        assert sorted(job.cached_tokens for job in jobs) == [0, 199, 199, 199]


def test_a_short_prompt_does_not_wait_for_a_long_one(model: OnnxModel) -> None:
    both = threading.Event()
    ended: list[str] = []

    def note(name: str, token: int) -> None:
        ended.append(name)

    with Scheduler(model, slots=4) as scheduler:
        writing = a_job(some_ids(9, 3), Heard(), tokens=200)
        long, short = a_job(some_ids(480, 1), Heard(), tokens=1), a_job([5], Heard(), tokens=1)
        for name, job in (("long", long), ("short", short)):
            assert isinstance(job.sink, Heard)
            job.sink.hold = partial(note, name)
        assert isinstance(writing.sink, Heard)
        writing.sink.hold = lambda token: both.wait(LONG)
        for job in (writing, long, short):
            scheduler.submit(job)
        both.set()
        for job in (long, short):
            assert isinstance(job.sink, Heard)
            job.sink.wait()
    assert ended == ["short", "long"]


# --- memory ---------------------------------------------------------------------------------------


def test_a_job_that_does_not_fit_into_the_memory_waits(
    model: OnnxModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mistill.engine import scheduler as module

    # Room for 300 positions.
    free = 300 * bytes_per_position(model.session) * 4
    monkeypatch.setattr(module, "free_memory", lambda: free)
    most = 0
    with Scheduler(model, slots=4, prefix_bytes=1 << 20) as scheduler:
        jobs = [a_job(some_ids(80, seed), Heard(), tokens=40) for seed in range(6)]
        jobs.append(a_job(some_ids(400, 9), Heard(), tokens=5))  # more than there is room for

        def count(token: int) -> None:
            nonlocal most
            most = max(most, scheduler.health().running)

        for job in jobs:
            assert isinstance(job.sink, Heard)
            job.sink.hold = count
            scheduler.submit(job)
        for job in jobs:
            assert isinstance(job.sink, Heard)
            assert job.sink.wait().tokens == alone(model, job.prompt, job.max_new_tokens)
        assert most == 2
        again = finished(scheduler, some_ids(80, 0), 40)
        assert tokens_of(again) == alone(model, again.prompt, 40)
        held = sum(map(len, scheduler._texts.texts)) * bytes_per_position(model.session)
        assert held <= free // 4
        assert scheduler.statistics().text_bytes <= free // 4


def test_what_is_not_being_continued_takes_no_more_memory_than_it_may(model: OnnxModel) -> None:

    most = 250 * bytes_per_position(model.session)
    with Scheduler(model, slots=8, prefix_bytes=most) as scheduler:
        for seed in range(12):
            job = finished(scheduler, some_ids(60, seed))
            assert tokens_of(job) == alone(model, job.prompt, 12)
            statistics = scheduler.statistics()
            assert statistics.text_bytes + statistics.store_bytes <= most
        assert finished(scheduler, some_ids(60, 11)).cached_tokens == 59
        assert finished(scheduler, some_ids(60, 0)).cached_tokens == 0
        # One that alone takes more stays for its next turn.
        long = finished(scheduler, some_ids(400, 1))
        assert finished(scheduler, long.prompt + tokens_of(long) + [5]).cached_tokens == 411
        assert scheduler.statistics().stored_texts == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is given back later")
def test_the_memory_of_each_row_is_what_was_written_to_it(model: OnnxModel) -> None:
    most = 0
    with Scheduler(model, slots=4) as scheduler:
        # One long text, then short ones that leave gaps, so that rows change places.
        lengths = [250, *(5 + 7 * number % 30 for number in range(40))]
        sinks = [Heard() for _ in lengths]
        for number, (length, sink) in enumerate(zip(lengths, sinks, strict=True)):
            scheduler.submit(a_job(some_ids(length, number), sink, tokens=1 + 5 * number % 17))
            if number == 0 or number % 7 == 0:
                sink.wait()
        for sink in sinks:
            sink.wait()
        texts = scheduler._texts
        for number, row in enumerate(scheduler._rows):
            written = [
                np.flatnonzero(array[number].any(axis=(0, 2))) for array in texts._arrays.values()
            ]
            highest = max((int(places[-1]) + 1 for places in written if places.size), default=0)
            assert highest <= row.touched <= highest + 1, number
            most += highest > 200
    assert most < 4  # the others hold short texts, which a long one elsewhere does not lengthen


def test_a_row_that_is_released_takes_no_memory(model: OnnxModel) -> None:
    texts = TextRows(model.session, 2, model.context_length, model.vocabulary_size)
    for row in range(2):
        texts.read(row, some_ids(50, row))
    kept = {name: array.copy() for name, array in texts.values(1).items()}
    texts.release(0)
    assert texts.texts[0] == []
    # Pages that were given back hold zeros when they are taken anew.
    assert not any(array[0].any() for array in texts._arrays.values())
    for name, array in texts.values(1).items():
        np.testing.assert_array_equal(array, kept[name])


def test_a_row_is_freed_while_nobody_waits(model: OnnxModel) -> None:
    with Scheduler(model, slots=2) as scheduler:
        for seed in (1, 2):
            finished(scheduler, some_ids(60, seed))
        while scheduler.statistics().stored_texts == 0:  # behind the end of the last job
            threading.Event().wait(0.01)
        assert [len(text) for text in scheduler._texts.texts] == [0, 71, 0]
        assert finished(scheduler, some_ids(60, 1)).cached_tokens == 59


def test_slots_are_chosen_by_memory() -> None:
    assert usual_slots(room=100, context=512) == 1
    assert usual_slots(room=2048, context=512) == 4
    assert usual_slots(room=10**9, context=512) == 16


# --- replies to many prompts ----------------------------------------------------------------------


def test_each_position_has_the_scores_that_it_has_alone(model: OnnxModel) -> None:
    prompts = [some_ids(30, 1), some_ids(9, 2), some_ids(50, 3)]
    seen: list[list[NDArray[np.float32]]] = [[] for _ in prompts]

    def noting(which: int) -> Choose:
        def choose(logits: NDArray[np.float32]) -> int:
            seen[which].append(logits.copy())
            return greedy(logits)

        return choose

    replies = write_all(
        model, prompts, max_new_tokens=12, choose=[noting(which) for which in range(3)]
    )
    for prompt, reply, scores in zip(prompts, replies, seen, strict=True):
        expected = model.logits(np.array([prompt + reply]))[0, len(prompt) - 1 : -1]
        np.testing.assert_allclose(np.stack(scores), expected, atol=1e-4)


def test_replies_come_in_the_order_of_their_prompts(model: OnnxModel) -> None:
    context = model.context_length
    prompts = [some_ids(count, count) for count in (context - 5, context, 10, 10)]
    replies = write_all(model, prompts, max_new_tokens=20, slots=2)
    assert [len(reply) for reply in replies] == [5, 0, 20, 20]
    assert replies == [alone(model, prompt, 20) for prompt in prompts]
    ends = (replies[2][4],)
    cut = write_all(model, prompts, max_new_tokens=20, end_ids=ends)
    assert cut[3] == replies[3][: replies[3].index(ends[0]) + 1]
    assert write_all(model, [], max_new_tokens=1) == []


def test_bad_prompts_are_refused_before_any_is_answered(model: OnnxModel) -> None:
    with pytest.raises(ContextError):
        write_all(model, [[5], some_ids(model.context_length + 1, 1)], max_new_tokens=1)
    with pytest.raises(ValueError, match="empty"):
        write_all(model, [[5], []], max_new_tokens=1)
    with pytest.raises(SettingsError, match="max_new_tokens"):
        write_all(model, [[5]], max_new_tokens=0)
    with pytest.raises(SettingsError, match="one function for each"):
        write_all(model, [[5], [6]], max_new_tokens=1, choose=[greedy])

    def broken(logits: NDArray[np.float32]) -> int:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        write_all(model, [[5], [6]], max_new_tokens=1, choose=[greedy, broken])


# --- rounding -------------------------------------------------------------------------------------


def test_a_padded_run_leaves_no_trace(model: OnnxModel) -> None:
    """Beside a row or a position that is not kept, all others are what they are without."""
    texts = TextRows(model.session, 3, model.context_length, model.vocabulary_size)
    ids = some_ids(21, 1)
    for row in range(3):
        texts.read(row, ids[: 9 + row])
    last = texts.read(0, ids[9:12], paired=True).copy()
    assert (texts.texts[0], texts.read_together[0]) == (ids[:12], 8)
    scores = model.logits(np.array([ids[:12]]))[0]
    np.testing.assert_allclose(last[0], scores[-1], atol=1e-4)
    every = texts.read(1, ids[10:13], "every", paired=True).copy()
    np.testing.assert_allclose(every, model.logits(np.array([ids[:13]]))[0, 10:], atol=1e-4)
    assert texts.read(2, ids[11:14], "none", paired=True).shape == (0, model.vocabulary_size)
    step = texts.step(1, [ids[13]], paired=True).copy()
    assert [len(text) for text in texts.texts] == [12, 14, 14, 0]
    np.testing.assert_allclose(step[0], model.logits(np.array([ids[:14]]))[0, -1], atol=1e-4)
    # The row beside it goes on as if nothing had been written behind its end.
    step = texts.step(2, [ids[14]]).copy()
    np.testing.assert_allclose(step[0], model.logits(np.array([ids[:15]]))[0, -1], atol=1e-4)
    assert texts.rounds_by_rows() in (True, False)
    assert [len(text) for text in texts.texts] == [12, 14, 15, 0]


@pytest.mark.parametrize("rounds", [True, False])
def test_repeatable_jobs_write_in_pairs_where_the_graph_rounds_by_rows(
    model: OnnxModel, monkeypatch: pytest.MonkeyPatch, rounds: bool
) -> None:
    monkeypatch.setattr(TextRows, "rounds_by_rows", lambda self: rounds)
    steps: list[tuple[int, bool]] = []
    step = TextRows.step

    def noted(self: TextRows, first: int, tokens: list[int], *, paired: bool = False):
        steps.append((len(tokens), paired))
        return step(self, first, tokens, paired=paired)

    monkeypatch.setattr(TextRows, "step", noted)
    prompt = some_ids(31, 1)
    with Scheduler(model, slots=1) as scheduler:
        job = finished(scheduler, prompt, repeatable=True)
        assert set(steps) == {(1, rounds)}
        assert tokens_of(job) == alone(model, prompt, 12)
        steps.clear()
        finished(scheduler, prompt)
        assert set(steps) == {(1, False)}
