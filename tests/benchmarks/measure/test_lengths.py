from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.figures.footprint import StepBytes
from benchmarks.figures.latency import Turn
from benchmarks.figures.passages import Passage
from benchmarks.measure.lengths import (
    TimedModel,
    latencies,
    lengths_left_out,
    new_tokens_at,
    take_turns,
)
from benchmarks.measure.loading import drop_from_page_cache, read_into_page_cache, resident_share
from benchmarks.report.timing_columns import roofline_share
from benchmarks.settings import BenchSettings
from mistill.errors import SettingsError
from tests.benchmarks.made import made_comparison

TEXT = [Passage(np.arange(1, 2001), np.ones(1999, bool))]
Log = list[tuple[str, list[int], int, float]]


def timed(name: str, context: int, log: Log, rate: float = 100.0) -> TimedModel:
    def writes(prompt: list[int], new_tokens: int, seconds: float) -> Turn:
        log.append((name, prompt, new_tokens, seconds))
        return Turn(
            prompt_tokens=len(prompt),
            first_token_seconds=1.0,
            token_seconds=(0.5,) * (new_tokens - 1),
        )

    return TimedModel(
        name=name, context_length=context, take_turn=writes, prompt_tokens_per_second=rate
    )


def test_models_take_turns_at_every_length_they_hold():
    log: Log = []
    settings = BenchSettings(
        rounds=2, prompts=(30,), depths=(0, 50), new_tokens=4, turn_seconds=5.0
    )
    models = [timed("long", 500, log), timed("short", 40, log)]

    take_turns(models, TEXT, settings)

    warm_up, turns = log[:2], log[2:]
    assert [(name, len(prompt), seconds) for name, prompt, _, seconds in warm_up] == [
        ("long", 50, 0.0),
        ("short", 30, 0.0),
    ]
    assert [(name, len(prompt), new) for name, prompt, new, _ in turns] == [
        *(("long", 1, 4), ("short", 1, 4), ("long", 30, 2), ("short", 30, 2), ("long", 50, 4)),
        *(("short", 1, 4), ("long", 1, 4), ("short", 30, 2), ("long", 30, 2), ("long", 50, 4)),
    ]
    # Writing may take five seconds, and reading fifty tokens half a second.
    assert {seconds for _, prompt, _, seconds in turns if len(prompt) == 50} == {5.5}
    assert sorted(models[0].turns) == [0, 30, 50]
    assert sorted(models[1].turns) == [0, 30]
    assert lengths_left_out(settings, 40) == ("50 tokens and 4 more: the context holds 40",)
    assert lengths_left_out(settings, 54) == ()


def test_no_two_turns_in_a_row_begin_with_the_same_token():
    log: Log = []

    take_turns([timed("one", 500, log)], TEXT, BenchSettings(rounds=3, prompts=(8, 9), depths=(7,)))

    first = [prompt[0] for _, prompt, _, _ in log]
    assert all(a != b for a, b in itertools.pairwise(first))


def test_a_length_that_is_read_and_written_after_is_timed_once():
    settings = BenchSettings(prompts=(512, 32), depths=(512,), new_tokens=9)

    assert new_tokens_at(settings) == {32: 2, 512: 9}
    turn = Turn(prompt_tokens=512, first_token_seconds=4.0, token_seconds=(0.1,))
    (found,) = latencies({512: [turn]}, (32, 512))
    assert (found.tokens, found.latency.prompt_tokens_per_second) == (512, 128.0)


@pytest.mark.parametrize("given", [(0, 1024), ("0,1024",), ("1024", "0"), ("1024, 0", 1024)])
def test_lengths_may_be_given_in_one_word_or_in_many(given: Any):
    assert BenchSettings(depths=given).depths == (0, 1024)


@pytest.mark.parametrize(
    "option", [{"prompts": (0,)}, {"depths": (-1,)}, {"depths": ("deep",)}, {"loads": -1}], ids=str
)
def test_lengths_out_of_range_are_refused(option: dict[str, Any]):
    with pytest.raises(SettingsError, match=next(iter(option))):
        BenchSettings(**option)


def test_what_is_dropped_is_gone_and_what_is_read_is_there(tmp_path: Path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "weights").write_bytes(os.urandom(1 << 22))
    (tmp_path / "empty").touch()

    read_into_page_cache(tmp_path)
    # The kernel may take back a page at any time, and on a busy machine it does.
    assert resident_share(tmp_path) > 0.9
    drop_from_page_cache(tmp_path)
    if resident_share(tmp_path) == 1.0:
        pytest.skip("this file system lives in memory")
    assert resident_share(tmp_path) < 0.05
    read_into_page_cache(tmp_path)
    assert resident_share(tmp_path) > 0.9


def test_a_system_that_cannot_be_asked_to_drop_files_has_no_cold_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "weights").write_bytes(bytes(1 << 16))
    monkeypatch.delattr(os, "posix_fadvise")
    read_into_page_cache(tmp_path)
    drop_from_page_cache(tmp_path)
    assert resident_share(tmp_path) > 0.9


def test_the_share_of_the_roofline_is_as_worked_by_hand():
    model = made_comparison().models[-1]  # 131 tokens/s after 128 tokens of prompt
    assert roofline_share(model) is None
    # 50 MB a step and 1 kB a position, 151.5 positions deep on average, from 10 GB/s.
    bytes_ = StepBytes(
        weight_bytes=1,
        packed_bytes=50_000_000,
        cache_bytes_per_position=1000,
        memory_bytes_per_second=10e9,
    )
    allowed = 10e9 / (50e6 + 151.5e3)
    share = roofline_share(replace(model, step_bytes=bytes_))
    assert share == pytest.approx(model.latency.decode_tokens_per_second / allowed)


def test_a_slow_kernel_lowers_the_roofline_and_a_fast_one_does_not():
    bytes_ = StepBytes(
        weight_bytes=1,
        packed_bytes=50_000_000,
        cache_bytes_per_position=0,
        memory_bytes_per_second=10e9,
    )
    assert bytes_.ceiling(0) == pytest.approx(200)
    assert replace(bytes_, kernel_seconds=0.004).ceiling(0) == pytest.approx(200)
    assert replace(bytes_, kernel_seconds=0.008).ceiling(0) == pytest.approx(125)
