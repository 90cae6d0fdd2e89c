"""Ratios of servers that were loaded in turn, worked by hand."""

from __future__ import annotations

import pytest

from benchmarks.serving.load import Level
from benchmarks.suite import serving


def level(clients: int, speed: float, processor_seconds: float | None = 2.0) -> Level:
    return Level(
        clients=clients,
        replies=1,
        failures=0,
        new_tokens=10,
        tokens_per_second=speed,
        first_token_seconds=(0.1, 0.3),
        gap_seconds=(0.01,),
        prompt_tokens=5.0,
        processor_seconds=processor_seconds,
        peak_bytes=None if processor_seconds is None else int(speed),
    )


def test_totals_are_ratios_of_the_same_round():
    totals = serving.totals(
        {
            "mistill": {1: [level(1, 10), level(1, 20)], 4: [level(4, 30), level(4, 20)]},
            "other": {1: [level(1, 5), level(1, 40)], 4: [level(4, 10), level(4, 40, None)]},
        }
    )
    ours, other = totals["mistill"]["4"], totals["other"]["4"]
    assert ours["tokens_per_second"] == 25
    assert ours["over_one_client"] == [1.0, 2.0, 3.0]
    assert ours["ours_over_it"] == [1.0, 1.0, 1.0]
    assert other["ours_over_it"] == [0.5, 1.75, 3.0]
    assert other["over_one_client"] == [1.0, 1.5, 2.0]
    assert ours["first_token"]["p50"] == pytest.approx(0.2)
    assert ours["peak_bytes"] == 30
    assert other["processor_seconds_per_token"] == pytest.approx(0.2)


def test_what_the_system_does_not_tell_is_left_out():
    totals = serving.totals({"mistill": {1: [level(1, 10, None)]}})
    assert "peak_bytes" not in totals["mistill"]["1"]
    assert "processor_seconds_per_token" not in totals["mistill"]["1"]
