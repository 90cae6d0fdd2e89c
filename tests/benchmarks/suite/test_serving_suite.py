"""Ratios of servers that were loaded in turn, worked by hand."""

from __future__ import annotations

import pytest

from benchmarks.serving.load import Level
from benchmarks.suite import serving
from benchmarks.suite.tables import FORMS


def level(clients: int, speed: float, processor_seconds: float | None = 2.0) -> Level:
    return Level(
        clients=clients,
        replies=1,
        failures=0,
        new_tokens=10,
        tokens_per_second=speed,
        first_token_seconds=(0.1, 0.3),
        gap_seconds=(0.01,),
        tokens_per_event=5.0,
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


def test_the_table_shows_ratios_of_turns_and_what_else_was_watched():
    levels = {
        name: {1: [level(1, 10 * speed)], 4: [level(4, 20 * speed)]}
        for name, speed in (("mistill", 3), ("other", 2))
    }
    ratio = {"median": 0.98, "lowest": 0.97, "highest": 1.01}
    lines = FORMS["serving"](
        {
            "totals": serving.totals(levels),
            "alone": {
                "tokens_per_second_over_chatbot": ratio,
                "first_token_milliseconds_over_engine": {**ratio, "median": 4.5},
            },
            "joining": {
                "1": {
                    "multiple": {"median": 2.5, "lowest": 2.0, "highest": 3.0},
                    "first_token_seconds": {**ratio, "median": 0.4},
                }
            },
            "later_turn": {"first_token_seconds": {**ratio, "median": 0.029}, "prompt_tokens": 931},
            "many": {"requests": 1000, "wrong": 0, "growth": 0.004, "descriptors": [9, 9]},
            "idle": {"seconds": 10.0, "processor_seconds": 0.0},
        }
    )
    text = "\n".join(lines)
    assert (
        "| 4 | 60.0 | 2.00 (2.00 to 2.00) | 1.50 (1.50 to 1.50) | 200, 298 | 200, 298 "
        "| 10, 10 | 5.00 |" in lines
    )
    assert "mistill 0 MB, other 0 MB" in text
    assert "0.98 (0.97 to 1.0) times as fast as `ChatBot`" in text
    assert "joins 1 that is being answered, the 99th percentile of the gaps is 2.5 (2.0" in text
    assert "begins after 29 ms" in text
    assert "0 wrong replies, +0.4% of resident memory, +0 open descriptors" in text
