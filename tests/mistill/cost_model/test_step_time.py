"""How large a chatbot may be that is to write as fast as asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import export
from mistill.cost_model import step_time
from mistill.cost_model.step_time import TimedSize, size_for_speed, time_steps
from mistill.engine.opening import open_model
from mistill.errors import SettingsError

SMALL, LARGE = TimedSize(50e6, 0.002), TimedSize(100e6, 0.004)


def test_between_two_sizes_the_time_of_a_step_is_a_line():
    # 3 ms a step is half way; a twentieth is to spare.
    size, predicted = size_for_speed(1 / 0.003 / 1.05, SMALL, LARGE)
    assert size == pytest.approx(75e6)
    assert predicted == pytest.approx(1 / 0.003)


def test_what_the_largest_reaches_takes_the_largest():
    assert size_for_speed(100, SMALL, LARGE) == (100e6, 250)


def test_what_the_smallest_just_reaches_takes_the_smallest():
    assert size_for_speed(490, SMALL, LARGE) == (50e6, 500)
    assert size_for_speed(500, SMALL, LARGE) == (50e6, 500)


def test_a_machine_that_is_busy_while_the_smaller_one_writes_gets_no_nonsense():
    size, predicted = size_for_speed(200, TimedSize(50e6, 0.0049), TimedSize(100e6, 0.0048))
    assert (size, round(predicted)) == (50e6, 204)


def test_what_cannot_be_reached_is_refused_with_what_can():
    with pytest.raises(SettingsError, match=r"50\.0 MB in 4 bits, writes 500 a second here"):
        size_for_speed(501, SMALL, LARGE)


def test_models_take_turns_and_first_tokens_do_not_count(monkeypatch: pytest.MonkeyPatch):
    clock, turns = [0.0], []

    class Fake:
        context_length, vocabulary_size = 32, 3

        def __init__(self, name: str) -> None:
            self.name = name
            self.written = 0

        def stream(self, prompt: Sequence[int]) -> Iterator[int]:
            turns.append(self.name)
            assert len(prompt) == 16
            clock[0] += 5.0  # reading the prompt
            while True:
                # One token in eight is held up.
                self.written += 1
                slow = 9.0 if self.written % 8 == 0 else 1.0
                clock[0] += slow * {"a": 0.25, "b": 0.5}[self.name]
                yield 0

    def tick() -> float:
        return clock[0]

    monkeypatch.setattr("time.perf_counter", tick)
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert time_steps([Fake("a"), Fake("b")]) == [0.25, 0.5]
    assert turns == ["a", "b"] * 6


@pytest.mark.parametrize("context", [3, 16, 17])
def test_a_short_context_is_timed_by_the_tokens_that_it_holds(
    context: int, monkeypatch: pytest.MonkeyPatch
):
    class Fake:
        context_length, vocabulary_size = context, 3

        def stream(self, prompt: Sequence[int]) -> Iterator[int]:
            assert 0 < len(prompt) < context - 1
            yield from [0] * (context - len(prompt))

    monkeypatch.setattr("time.sleep", lambda _: None)
    (seconds,) = time_steps([Fake()])
    assert seconds > 0


def test_a_real_chatbot_is_timed(tmp_path: Path, model: Path, monkeypatch: Any):
    monkeypatch.setattr(step_time, "_SETTLE_SECONDS", 0)
    (seconds,) = time_steps([open_model(export.to_onnx(model, tmp_path / "chatbot"))])
    assert 0 < seconds < 1
