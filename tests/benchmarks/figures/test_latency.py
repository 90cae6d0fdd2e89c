from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.figures.latency import Latency, Turn, time_turn
from mistill.engine.language_model import Choose, greedy


class Clock:
    """A clock that moves only when somebody works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Typist:
    """A language model that takes a given time to read and to write, by a fake clock."""

    vocabulary_size = 5
    context_length = 1000

    def __init__(self, clock: Clock, reading: float, writing: Sequence[float]) -> None:
        self.clock, self.reading, self.writing = clock, reading, writing
        self.prompts: list[list[int]] = []

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        raise AssertionError("speed is measured by writing")

    def stream(self, ids: Sequence[int], choose: Choose = greedy) -> Iterator[int]:
        self.prompts.append(list(ids))
        for seconds in itertools.chain([self.reading], itertools.cycle(self.writing)):
            self.clock.now += seconds
            yield 3


def timed(reading: float, writing: Sequence[float], **options: float) -> Turn:
    clock = Clock()
    wanted = {"new_tokens": 5, "seconds": 1e9, **options}
    typist = Typist(clock, reading, writing)
    return time_turn(
        typist,
        [1, 2, 3, 4],
        new_tokens=int(wanted["new_tokens"]),
        seconds=wanted["seconds"],
        clock=clock,
    )


def test_reading_and_writing_are_timed_apart():
    turn = timed(2.0, [0.5, 0.25])

    assert turn == Turn(
        prompt_tokens=4, first_token_seconds=2.0, token_seconds=(0.5, 0.25, 0.5, 0.25)
    )
    assert turn.decode_tokens_per_second == pytest.approx(4 / 1.5)


def test_a_slow_model_stops_when_its_time_is_up():
    assert len(timed(1.0, [1.0], new_tokens=100, seconds=20.5).token_seconds) == 20


def test_a_very_slow_model_still_writes_eight_tokens():
    assert len(timed(60.0, [60.0], new_tokens=100, seconds=1.0).token_seconds) == 7


def test_statistics_of_a_fake_clock_come_out_as_worked_by_hand():
    # Rounds at 1, 2 and 4 tokens per second; first tokens after 4, 2 and 1 seconds.
    rounds = [timed(4.0, [1.0]), timed(2.0, [0.5]), timed(1.0, [0.25])]

    found = Latency(turns=tuple(rounds))

    assert found.first_token_seconds == 2.0
    assert found.first_token_quartiles == (1.5, 2.0, 3.0)
    assert found.prompt_tokens_per_second == 2.0
    assert found.prompt_quartiles == (1.5, 2.0, 3.0)
    assert found.decode_tokens_per_second == 2.0
    assert found.decode_quartiles == (1.5, 2.0, 3.0)
    # Twelve gaps, four of each length; the 95th percentile is among the slowest.
    assert found.slow_token_seconds == 1.0


def test_one_slow_token_is_seen_in_the_tail_and_in_the_rate():
    found = Latency(turns=(timed(1.0, [0.1] * 9 + [1.1], new_tokens=11),))

    assert found.decode_tokens_per_second == pytest.approx(5.0)
    assert found.slow_token_seconds == pytest.approx(0.1 + 0.55 * 1.0)
