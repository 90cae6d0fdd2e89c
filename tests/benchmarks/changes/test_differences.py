"""Two reports compared: every verdict with its reason.

The file is long because every kind of figure (bytes, clock, memory, text, reference) is tested both
ways.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import diff
from benchmarks.changes.differences import ReportDiff
from benchmarks.changes.verdicts import Change
from benchmarks.figures.answers import Answers
from benchmarks.figures.conventions import QuotedPerplexity
from benchmarks.figures.fidelity import Fidelity
from benchmarks.figures.latency import Latency, Turn
from benchmarks.figures.model_result import ModelResult
from benchmarks.figures.perplexity import Perplexity
from benchmarks.figures.replies import Replies
from benchmarks.report.report import Report
from benchmarks.settings import DiffSettings
from mistill.cli.app import main
from mistill.errors import FolderError, SettingsError
from mistill.measures.significance import (
    between,
    of_mean,
)
from tests.benchmarks.made import made_comparison

SPEED, KL = "decode_tokens_per_second", "mean_kl_nats"


@pytest.fixture(scope="module")
def comparison() -> Report:
    made = made_comparison(samples=False)
    names = ("teacher", "student", "chatbot-8", "chatbot-4")
    return replace(made, models=tuple(map(made.__getitem__, names)))


def changed(comparison: Report, model: str, /, **fields: Any) -> Report:
    """The same report with other fields of one model."""
    models = tuple(
        replace(found, **fields) if found.name == model else found for found in comparison.models
    )
    return replace(comparison, models=models)


def timed(rates: list[float], first: float = 13) -> Latency:
    """Rounds at these speeds, which take so many tokens' time to the first one."""
    return Latency(
        turns=tuple(
            Turn(
                prompt_tokens=128,
                first_token_seconds=first / rate,
                token_seconds=(1 / rate,) * 8,
            )
            for rate in rates
        )
    )


def found_of(found: ReportDiff, model: str, key: str) -> Change:
    (change,) = [c for c in found.changes if (c.model, c.column.key) == (model, key)]
    return change


# --- verdicts -----------------------------------------------------------------------------------


def test_a_report_differs_from_itself_in_nothing(comparison: Report):
    found = diff(comparison, comparison)

    assert {change.reason for change in found.changes} == {"equal"}
    assert found.passed
    assert len({change.model for change in found.changes}) == len(comparison.models)


def test_a_slower_model_is_worse_and_a_faster_one_better(comparison: Report):
    base = changed(comparison, "chatbot-4", latency=timed([100, 101, 99]))
    slower = changed(comparison, "chatbot-4", latency=timed([80, 80.5, 79.5]))

    worse = found_of(diff(base, slower), "chatbot-4", SPEED)
    better = found_of(diff(slower, base), "chatbot-4", SPEED)

    assert (worse.verdict, better.verdict) == ("worse", "better")
    assert worse.relative == pytest.approx(-0.2)
    assert worse.interval is not None
    assert -0.23 < worse.interval[0] < -0.2 < worse.interval[1] < -0.17
    assert {c.column.nature for c in diff(base, slower).regressions} == {"clock"}


def test_a_first_token_that_comes_later_is_worse(comparison: Report):
    base = changed(comparison, "student", latency=timed([30, 30.5, 29.5]))
    later = changed(comparison, "student", latency=timed([30, 30.5, 29.5], first=18))

    found = diff(base, later)

    assert found_of(found, "student", "first_token_ms").verdict == "worse"
    assert found_of(found, "student", "prompt_tokens_per_second").verdict == "worse"
    assert found_of(found, "student", SPEED).reason == "equal"


def test_a_change_within_the_spread_of_the_rounds_is_none(comparison: Report):
    base = changed(comparison, "chatbot-4", latency=timed([100, 130, 80]))
    other = changed(comparison, "chatbot-4", latency=timed([85, 110, 68]))

    found = found_of(diff(base, other), "chatbot-4", SPEED)

    assert found.relative == pytest.approx(-0.15)
    assert (found.verdict, found.reason) == ("same", "within the noise")


def test_a_sure_change_that_is_small_is_none(comparison: Report):
    base = changed(comparison, "chatbot-4", latency=timed([100, 100.001, 99.999]))
    other = changed(comparison, "chatbot-4", latency=timed([96, 96.001, 95.999]))

    found = found_of(diff(base, other), "chatbot-4", SPEED)
    strict = found_of(diff(base, other, clock_tolerance=0.01), "chatbot-4", SPEED)

    assert (found.verdict, found.reason) == ("same", "less than 5%")
    assert strict.verdict == "worse"


def quality(model: ModelResult, factor: float) -> Fidelity:
    assert model.fidelity is not None
    rows = model.fidelity.divergences
    return replace(model.fidelity, divergences=tuple(tuple(x * factor for x in p) for p in rows))


def test_kl_is_judged_token_by_token(comparison: Report):
    model = comparison["chatbot-8"]
    further = changed(comparison, "chatbot-8", fidelity=quality(model, 1.03))
    assert model.fidelity is not None
    noise = model.fidelity.kl_standard_error

    found = found_of(diff(comparison, further), "chatbot-8", KL)

    # Less than the standard error of either mean, and yet beyond doubt on the same tokens.
    assert noise is not None
    assert found.new is not None
    assert found.old is not None
    assert found.new - found.old < noise
    assert found.verdict == "worse"
    assert found.interval is not None
    assert found.interval[0] < 0.03 < found.interval[1]


def test_what_rounding_of_sums_changes_is_no_change(comparison: Report):
    tiny = Fidelity(divergences=((1e-6,) * 9, (2e-6,) * 9), agreements=((1,) * 9,) * 2)
    twice = Fidelity(divergences=((2e-6,) * 9, (4e-6,) * 9), agreements=((1,) * 9,) * 2)

    found = diff(
        changed(comparison, "chatbot-8", fidelity=tiny),
        changed(comparison, "chatbot-8", fidelity=twice),
    )

    assert found_of(found, "chatbot-8", KL).verdict == "same"


def test_bytes_are_counted_and_not_measured(comparison: Report):
    footprint = comparison["chatbot-4"].footprint
    larger = replace(footprint, weight_bytes=footprint.weight_bytes * 102 // 100)
    record = replace(footprint, weight_bytes=footprint.weight_bytes + 100)

    grown = diff(comparison, changed(comparison, "chatbot-4", footprint=larger))
    written = diff(comparison, changed(comparison, "chatbot-4", footprint=record))

    assert found_of(grown, "chatbot-4", "size_mb").verdict == "worse"
    assert found_of(written, "chatbot-4", "size_mb").verdict == "same"
    assert written.passed


# --- what cannot be compared --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("processor", "Xeon", "another processor (AMD EPYC 7763, then Xeon)"),
        ("threads", 4, "other threads (2, then 4)"),
        ("instructions", ("avx2",), "other vector instructions"),
        ("governor", "powersave", "another frequency governor"),
    ],
)
def test_speeds_of_other_machines_are_not_compared(
    comparison: Report, field: str, value: Any, words: str
):
    slow = changed(comparison, "chatbot-4", latency=timed([1, 1.1, 1.2]))
    machine = replace(comparison.machine, **{field: value})

    found = diff(comparison, replace(slow, machine=machine))

    assert found_of(found, "chatbot-4", SPEED).verdict == "unknown"
    assert found_of(found, "chatbot-4", "peak_memory_mb").verdict == "unknown"
    assert found_of(found, "chatbot-4", KL).verdict == "same"
    assert any("speed and memory are not compared" in n and words in n for n in found.notes)
    assert found.passed


def test_speeds_at_other_prompts_are_not_compared(comparison: Report):
    other = replace(comparison, settings=replace(comparison.settings, prompt_tokens=512))

    found = diff(comparison, other)

    assert found_of(found, "chatbot-4", SPEED).reason == "prompt_tokens was 128, then 512"
    assert found_of(found, "chatbot-4", "peak_memory_mb").verdict == "same"


def test_quality_on_another_text_is_not_compared(comparison: Report):
    other = replace(comparison, text=replace(comparison.text, fingerprint="1e" * 32))

    found = diff(comparison, other)

    for key in ("perplexity", KL, "kl_99th_percentile_nats", "top1_agreement"):
        assert found_of(found, "chatbot-4", key).verdict == "unknown"
    assert found_of(found, "chatbot-4", SPEED).verdict == "same"


def with_texts_of_its_own(comparison: Report, whole: str, questions: str) -> Report:
    """Chatbot-4 has read a whole text in windows, and was asked questions."""
    quoted = QuotedPerplexity(
        convention="gptq",
        context_length=2048,
        text_fingerprint=whole,
        window_losses=(400.0, 410.0, 390.0),
        window_tokens=(100, 100, 100),
        window_bytes=(300, 300, 300),
    )
    answers = Answers(
        fingerprint=questions,
        kinds=("fact",) * 3,
        log_probabilities=((-1.0, -2.0),) * 3,
        answer_bytes=((1, 1),) * 3,
        right=(0, 0, 1),
    )
    replies = Replies(fingerprint=questions, texts=("a b a b a b", "c d e f"), ended=(True, True))
    return changed(comparison, "chatbot-4", quoted=(quoted,), answers=answers, replies=replies)


def test_what_is_read_besides_the_scored_text_is_compared_where_it_is_the_same(
    comparison: Report,
):
    old = with_texts_of_its_own(comparison, "whole", "questions")
    other = replace(old, text=replace(old.text, fingerprint="1e" * 32))
    own = with_texts_of_its_own(comparison, "longer", "others")

    for key in ("perplexity_gptq", "smoke_accuracy", "distinct_3"):
        assert found_of(diff(old, other), "chatbot-4", key).reason == "equal"
        found = found_of(diff(old, own), "chatbot-4", key)
        assert (found.verdict, found.reason) == ("unknown", "it was measured on another text")
    assert found_of(diff(old, other), "chatbot-4", "perplexity").verdict == "unknown"
    assert found_of(diff(old, own), "chatbot-4", "perplexity").reason == "equal"


def test_the_distance_from_another_reference_is_not_compared(comparison: Report):
    other = changed(comparison, "teacher", fingerprint="cd" * 32)

    found = diff(comparison, other)

    assert found_of(found, "chatbot-4", KL).reason == "teacher is another model than it was"
    assert found_of(found, "chatbot-4", "perplexity").verdict == "same"


def test_one_round_says_nothing_about_speed(comparison: Report):
    one = changed(comparison, "student", latency=timed([30]))

    found = found_of(diff(one, comparison), "student", SPEED)

    assert (found.verdict, found.reason) == ("unknown", "a single round has no spread")


def test_a_figure_of_one_report_alone_is_shown(comparison: Report):
    without = changed(comparison, "student", transformers_latency=None)

    found = found_of(diff(comparison, without), "student", "transformers_decode_tokens_per_second")

    assert (found.new, found.reason) == (None, "not in the new report")


def test_versions_and_load_are_named(comparison: Report):
    machine = replace(
        comparison.machine,
        versions={**comparison.machine.versions, "onnxruntime": "1.32.0"},
        load_average=1.7,
    )

    notes = "\n".join(diff(comparison, replace(comparison, machine=machine)).notes)

    assert "onnxruntime 1.31.1, then 1.32.0" in notes
    assert "when the new report began: load average 1.7 on 2 processors" in notes
    assert "torch" not in notes


def test_a_machine_that_is_slower_today_is_told_by_an_engine_that_has_not_changed(
    comparison: Report,
):
    def today(rate: float, rival: float) -> Report:
        latency, other = (timed([r, r * 1.002, r * 0.998]) for r in (rate, rival))
        return changed(comparison, "student", latency=latency, transformers_latency=other)

    slow_day = diff(today(30, 23), today(27, 20.7))
    slow_model = diff(today(30, 23), today(27, 22.9))

    assert found_of(slow_day, "student", SPEED).verdict == "same"
    assert slow_day.passed
    assert any("changed by 10.0%" in note for note in slow_day.notes)
    assert found_of(slow_model, "student", SPEED).verdict == "worse"


# --- models -------------------------------------------------------------------------------------


def test_a_model_that_is_gone_fails(comparison: Report):
    fewer = replace(comparison, models=comparison.models[:-1])

    gone, come = diff(comparison, fewer), diff(fewer, comparison)

    assert (gone.missing, gone.passed) == (("chatbot-4",), False)
    assert (come.added, come.passed) == (("chatbot-4",), True)


def test_a_model_of_another_name_is_paired(comparison: Report):
    renamed = changed(comparison, "chatbot-4", name="chatbot-new")

    found = diff(comparison, renamed, pairs=("chatbot-4=chatbot-new",))

    assert found.missing == found.added == ()
    assert found_of(found, "chatbot-new", SPEED).reason == "equal"


def test_reports_without_a_common_model_are_refused(comparison: Report):
    one = replace(comparison, models=comparison.models[:1])
    other = replace(comparison, models=comparison.models[1:2])

    with pytest.raises(SettingsError, match=r"no model in common.*pairs, OLD=NEW"):
        diff(one, other)
    with pytest.raises(SettingsError, match="pairs names nobody, which the new report lacks"):
        diff(one, one, pairs=("teacher=nobody",))


@pytest.mark.parametrize(
    "options",
    [{"confidence": 1.0}, {"tolerance": -0.1}, {"clock_tolerance": 1.0}, {"pairs": ("a",)}],
)
def test_nonsense_is_refused(options: dict[str, Any]):
    with pytest.raises(SettingsError, match=next(iter(options))):
        DiffSettings(**options)


# --- nothing has changed ------------------------------------------------------------------------


def measured_again(comparison: Report, random: np.random.Generator) -> Report:
    """The same models on the same machine another day, as seeds and clocks have it.

    The day as a whole is up to a few per cent faster or slower, rounds vary by three per cent with
    now and then one disturbed; a quantizer's other seed moves every passage by a little.
    """
    day = random.normal(0, 0.01)

    def rounds(model: ModelResult) -> Latency:
        rate = model.latency.decode_tokens_per_second
        noise = random.normal(0, 0.03, 7) - 0.3 * (random.random(7) < 0.05)
        return timed(
            list(rate * np.exp(day + noise)), first=13 * float(np.exp(random.normal(0, 0.02)))
        )

    def passages(rows: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        moved = random.normal(0, 0.1, len(rows))
        return tuple(
            tuple(abs(x * (1 + move + random.normal(0, 0.2))) for x in row)
            for row, move in zip(rows, moved, strict=True)
        )

    def model_again(model: ModelResult) -> ModelResult:
        fidelity = model.fidelity
        return replace(
            model,
            latency=rounds(model),
            perplexity=Perplexity(losses=passages(model.perplexity.losses)),
            fidelity=fidelity and replace(fidelity, divergences=passages(fidelity.divergences)),
            footprint=replace(
                model.footprint,
                peak_memory_bytes=round(
                    model.footprint.peak_memory_bytes * (1 + random.normal(0, 0.01))
                ),
            ),
        )

    return replace(comparison, models=tuple(map(model_again, comparison.models)))


def test_of_twenty_repetitions_at_most_one_is_called_a_difference(comparison: Report):
    few = replace(comparison, models=comparison.models[2:])
    random = np.random.default_rng(1)
    called = 0
    for _ in range(40):
        found = diff(measured_again(few, random), measured_again(few, random))
        called += bool(found.regressions or found.improvements)
        assert all(change.verdict != "unknown" for change in found.changes)

    assert called <= 40 / 20


def test_of_hundreds_of_questions_about_nothing_chance_answers_few():
    """The tests themselves, without a tolerance: their error is the one that was asked for."""
    random = np.random.default_rng(5)
    rounds = [between(*np.log(random.lognormal(0, 0.1, (2, 5))).tolist()) for _ in range(1500)]
    texts = []
    for _ in range(1500):
        effects = random.normal(0, 0.3, (12, 1)) + random.normal(0, 1, (12, 6))
        texts.append(of_mean(np.zeros((12, 6)).tolist(), effects.tolist()))

    for shifts in (rounds, texts):
        alarms = np.mean([shift.p_value() < 0.05 for shift in shifts if shift is not None])
        # Three standard errors of a share of 0.05 among 1500.
        assert abs(alarms - 0.05) < 0.017


# --- what is shown ------------------------------------------------------------------------------


@pytest.fixture
def reports(comparison: Report, tmp_path: Path) -> tuple[Path, Path]:
    turns = comparison["chatbot-4"].latency.turns
    slow = [replace(t, token_seconds=tuple(s * 1.5 for s in t.token_seconds)) for t in turns]
    slower = changed(comparison, "chatbot-4", latency=Latency(turns=tuple(slow)))
    paths = tmp_path / "old", tmp_path / "new.json"
    paths[0].mkdir()
    (paths[0] / "report.json").write_text(comparison.to_json())
    paths[1].write_text(slower.to_json())
    return paths


def test_the_command_prints_what_changed(
    reports: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    old, new = map(str, reports)

    assert main(["bench", "diff", old, new]) == 0
    shown = capsys.readouterr().out
    assert "1 worse, 0 better" in shown
    row = next(line for line in shown.splitlines() if "Writing" in line)
    assert row.split()[-1] == "worse"
    assert main(["bench", "diff", old, new, "--fail-on-regression", "--json"]) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["regressions"] == 1
    assert document["passed"] is False
    (worse,) = [change for change in document["changes"] if change["verdict"] == "worse"]
    assert (worse["model"], worse["measure"]) == ("chatbot-4", SPEED)
    assert worse["relative"] == pytest.approx(1 / 1.5 - 1)
    assert main(["bench", "diff", new, old, "--fail-on-regression"]) == 0


def test_markdown_shows_what_moved_and_counts_the_rest(
    reports: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    assert main(["bench", "diff", *map(str, reports), "--markdown"]) == 0

    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.startswith("| chatbot-4")]
    assert [row.split("|")[2].strip() for row in rows] == ["**Writing, tok/s**", "9 figures"]
    assert "| teacher | all figures |" in shown
    assert len({line.count("|") for line in shown.splitlines() if line.startswith("|")}) == 1


def test_what_is_no_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(FolderError, match="holds no report"):
        diff(tmp_path, tmp_path)
    (tmp_path / "report.json").write_text('{"schema": "mistill-comparison-1"}')
    assert main(["bench", "diff", str(tmp_path), str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
