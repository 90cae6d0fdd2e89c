"""A model compared with itself differs in nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.figures.latency import Latency
from benchmarks.report.report import Report
from benchmarks.settings import BenchSettings
from benchmarks.suite import same_twice
from benchmarks.suite.tables import FORMS
from tests.benchmarks.made import made_comparison

SETTINGS = BenchSettings(threads=1, rounds=3)


def slower(found: Report, factor: float) -> Report:
    """The second model takes so many times as long."""
    first, second = found.models
    turns = tuple(
        replace(
            turn,
            first_token_seconds=turn.first_token_seconds * factor,
            token_seconds=tuple(seconds * factor for seconds in turn.token_seconds),
        )
        for turn in second.latency.turns
    )
    return replace(found, models=(first, replace(second, latency=Latency(turns=turns))))


@pytest.fixture
def twins() -> Report:
    found = made_comparison(count=1, samples=False)
    (model,) = found.models
    return replace(found, models=(model, replace(model, name="twin")))


@pytest.mark.parametrize(("factor", "alarms"), [(1.0, 0), (1.02, 0), (3.0, 4)])
def test_only_what_differs_is_called_a_difference(
    factor: float,
    alarms: int,
    twins: Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[Path]] = []

    def compare(models: list[Path], **_: Any) -> Report:
        asked.append(models)
        return slower(twins, factor)

    monkeypatch.setattr("benchmarks.suite.same_twice.benchmarks.compare", compare, raising=False)
    model = tmp_path / "model"
    model.mkdir()
    (model / "file").write_text("weights")
    found = same_twice.measure(model, "text", 4, False, SETTINGS)
    assert found["comparisons_with_an_alarm"] == alarms
    assert found["met"] is (alarms == 0)
    assert ("decode_tokens_per_second" in found["alarms"]) is (alarms > 0)
    # The two change places, and are different folders.
    assert asked[0] == asked[1][::-1]
    assert len(set(asked[0])) == 2
    assert f"{alarms} of 4 comparisons" in FORMS["same_twice"](found)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True])
def test_a_model_is_compared_with_itself(apart: bool, model: Path, chats: Path) -> None:
    settings = BenchSettings(
        threads=1,
        rounds=3,
        prompt_tokens=8,
        new_tokens=8,
        scored_tokens=60,
        transformers_generate=False,
    )
    found = same_twice.measure(model, str(chats), 1, apart, settings)
    # Whatever the clock says, the same weights predict the same.
    assert not {"perplexity", "bits_per_byte"} & set(found["alarms"])
    assert {"decode_tokens_per_second", "perplexity"} <= set(found["half_widths"])
