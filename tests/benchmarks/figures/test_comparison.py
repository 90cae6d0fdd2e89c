from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.figures.comparison import SCHEMA
from benchmarks.figures.frontier import dominators
from benchmarks.figures.latency import Latency, Turn
from benchmarks.figures.model_result import ModelResult
from benchmarks.report.report import Report
from mistill.errors import FolderError, SettingsError
from tests.benchmarks.made import made_comparison


@pytest.fixture(scope="module")
def comparison() -> Report:
    return made_comparison()


def test_json_comes_back_as_it_was(comparison: Report):
    assert Report.from_json(comparison.to_json()) == comparison


def test_json_holds_derived_figures_for_scripts(comparison: Report):
    document = json.loads(comparison.to_json())

    assert document["schema"] == SCHEMA
    record = document["models"][6]["summary"]
    assert record["size_mb"] == pytest.approx(74)
    assert record["bits_per_weight"] == pytest.approx(74 * 8 / 106)
    assert record["decode_tokens_per_second"] == pytest.approx(131)
    assert record["mean_kl_nats"] == comparison["chatbot-4"].mean_kl
    assert record["slow_token_ms"] == pytest.approx(1000 * 1.06 / 131)
    assert document["models"][0]["summary"]["mean_kl_nats"] is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "mistill-comparison-99"}'])
def test_what_is_not_a_report_is_refused(text: str):
    with pytest.raises(FolderError, match="the report"):
        Report.from_json(text)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("models",), {}, "models in the report should be a list"),
        (("models", 0), None, r"models\[0\] in the report should be an object, not None"),
        (("models", 0, "latency"), "fast", "latency in the report should be an object"),
        (("models", 0, "latency", "turns", 0, "seconds"), None, "in the report lacks"),
        (("models", 0, "name"), 7, "name in the report should be text"),
        (("machine",), [], "machine in the report should be an object"),
        (("text", "tokens_scored"), "many", "tokens_scored in the report should be a whole number"),
        (("settings", "rounds"), -3, "rounds"),
        (("date",), "\ud800", "half of a character"),
    ],
)
def test_a_report_with_other_values_is_refused_in_one_line(
    comparison: Report, tmp_path: Path, place: tuple[str | int, ...], value: Any, words: str
):
    document = json.loads(comparison.to_json())
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    if value is None and place[-1] == "seconds":
        inner.clear()
    else:
        inner[place[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(document))
    with pytest.raises((FolderError, SettingsError), match=words) as refused:
        Report.from_file(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_report_that_is_nested_too_deeply_is_refused(tmp_path: Path):
    (tmp_path / "report.json").write_text("[" * 100_000)
    with pytest.raises(FolderError, match="nested too deeply"):
        Report.from_file(tmp_path)


def test_a_model_is_found_by_its_name(comparison: Report):
    assert comparison["student-nf4"].form == "nf4"
    with pytest.raises(KeyError, match="not among teacher, pruned"):
        comparison["stranger"]


def test_speedup_is_over_transformers_on_the_model_named(comparison: Report):
    assert comparison.speedup("chatbot-4", over="student") == pytest.approx(131 / 23)
    with pytest.raises(SettingsError, match="was not timed on chatbot-8"):
        comparison.speedup("chatbot-4", over="chatbot-8")


# --- the frontier -------------------------------------------------------------------------------


def placed(model: ModelResult, *, speed: float, size: int, name: str) -> ModelResult:
    turn = Turn(prompt_tokens=1, first_token_seconds=1.0, token_seconds=(1 / speed,))
    return dataclasses.replace(
        model,
        name=name,
        latency=Latency(turns=(turn,)),
        footprint=dataclasses.replace(model.footprint, weight_bytes=size),
    )


def test_a_model_worse_in_one_thing_and_better_in_none_is_dominated(comparison: Report):
    model = comparison["student"]
    best = placed(model, speed=20, size=100, name="best")
    slower = placed(model, speed=10, size=100, name="slower")
    slower_and_smaller = placed(model, speed=10, size=50, name="smaller")

    found = dominators([best, slower, slower_and_smaller])

    assert found == {"best": (), "slower": ("best", "smaller"), "smaller": ()}


def test_differences_within_the_noise_dominate_nobody(comparison: Report):
    model = comparison["student"]
    one = placed(model, speed=20.2, size=1000, name="one")
    other = placed(model, speed=20.0, size=1010, name="other")

    assert dominators([one, other]) == {"one": (), "other": ()}


def test_fidelity_saves_a_large_and_slow_model(comparison: Report):
    found = dominators(comparison.models)

    assert found["teacher"] == ()
    assert "student" in found["pruned"]
