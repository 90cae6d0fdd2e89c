"""Many jobs at once against the same prompts one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
from numpy.typing import NDArray

import export
from mistill.engine.language_model import Choose, greedy
from mistill.engine.onnx_model import CHUNK, OnnxModel
from mistill.engine.sampling import Sampler, SamplingSettings
from mistill.engine.scheduler import Job, Scheduler, chunk_size
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


def test_chunks_are_whole_and_none_has_one_position_but_where_the_model_reads_one_alone() -> None:
    for total in range(1, 400):
        for most in (3, 16, 32, CHUNK):
            done, sizes = 0, []
            while done < total:
                sizes.append(chunk_size(done, total, most))
                done += sizes[-1]
            assert done == total
            assert max(sizes) <= most
            assert (sizes[-1] == 1) == (total % CHUNK == 1)
            assert 1 not in sizes[:-1]


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
    assert list(scores) == [0, 128, 256]
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


def test_a_client_that_leaves_frees_its_row_and_changes_nobody_else(model: OnnxModel) -> None:
    """Queued, in its prompt, and at its third token."""
    prompt = some_ids(30, 3)
    expected = alone(model, prompt)
    third = threading.Event()
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
        scheduler.cancel(writing)
        assert writes.calls_after_end == 0


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

        def crash(*_: object) -> None:
            both.wait(LONG)
            raise MemoryError("no memory for the graph")

        monkeypatch.setattr(scheduler._rows, "step", crash)
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
