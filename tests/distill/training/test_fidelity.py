"""The fidelity card: what is on it, and that its twins are what they are called."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import distill
from distill.settings import TrainSettings
from distill.training.evaluation import Evaluation
from distill.training.fidelity import twin_settings
from mistill.cli.inspection import inspect_folder
from mistill.errors import SettingsError
from mistill.training.checkpoints import run_once
from mistill.training.processes import accelerating
from mistill.training.progress import TrainingProgress

OPTIONS: dict[str, Any] = {
    "tokens": 700,
    "block_length": 64,
    "batch_size": 2,
    "held_out_tokens": 256,
    "learning_rate": 2e-3,
    "evaluate_every": 0,
}


@pytest.fixture(scope="module")
def carded(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, model: Path, chats: Path
) -> Path:
    target = tmp_path_factory.mktemp("card") / "trained"
    return distill.train(model, target, teacher=teacher, texts=chats, twin=True, **OPTIONS)


def test_a_card_sets_a_student_beside_what_its_text_alone_teaches(
    carded: Path, tmp_path: Path, teacher: Path, model: Path, chats: Path
) -> None:
    card = json.loads((carded / "fidelity.json").read_text("utf-8"))
    assert card["student"]["held_out"]["kl"] < card["before"]["kl"]
    assert set(card["before"]) == set(card["student"]["held_out"])
    assert 0 < card["student"]["held_out"]["acceptance"] < 1
    twin = card["twin_of_equal_tokens"]
    assert twin["tokens"] == card["student"]["tokens"]
    # The twin is the student of the same call with nothing but the text to learn from.
    alone = distill.train(
        model, tmp_path / "alone", teacher=teacher, texts=chats, cross_entropy=1.0, **OPTIONS
    )
    same = json.loads((alone / "fidelity.json").read_text("utf-8"))["student"]
    assert twin["held_out"] == same["held_out"]
    assert twin["held_out"] != card["student"]["held_out"]
    quicker = card["student"]["seconds"] / twin["seconds"]
    more = card["twin_of_equal_time"]["tokens"] / twin["tokens"]
    assert more == pytest.approx(quicker, rel=0.35)  # whole steps


def test_a_card_without_twins_says_so(tmp_path: Path, carded: Path) -> None:
    found = inspect_folder(carded)
    assert found.fidelity is not None
    assert found.to_dict()["fidelity"]["student"]["tokens"] > 0
    from rich.console import Console

    console = Console(record=True, width=160, file=(tmp_path / "screen").open("w"))
    console.print(found.panel())
    printed = console.export_text()
    console.file.close()
    assert "from text alone, equal time" in printed
    kl = json.loads((carded / "fidelity.json").read_text("utf-8"))["student"]["held_out"]["kl"]
    assert f"{kl:.4f}" in printed


def evaluation(kl: float) -> Evaluation:
    return Evaluation(
        kl=kl,
        kl_p99=1.0,
        perplexity=2.0,
        teacher_perplexity=None,
        agreement=None,
        acceptance=None,
        calibration_error=0.1,
        teacher_calibration_error=None,
        positions=3,
    )


def progress(seconds: float) -> TrainingProgress[Evaluation]:
    return TrainingProgress(
        step=4,
        tokens=100,
        positions=90,
        seconds=seconds,
        before=evaluation(2.0),
        best=evaluation(1.0),
        best_step=4,
        last=evaluation(1.0),
    )


def test_a_twin_of_equal_time_reads_as_much_more_as_it_is_quicker() -> None:
    settings = TrainSettings(tokens=1_000, on_policy=0.5, divergence="jsd", twin=True)
    first = twin_settings(settings, progress(30.0), None)
    assert first == replace(
        settings, cross_entropy=1.0, on_policy=0.0, divergence="forward_kl", twin=False
    )
    second = twin_settings(settings, progress(30.0), progress(20.0))
    assert second == replace(first, tokens=1_500)


def test_a_twin_that_diverges_takes_nothing_from_the_student(
    tmp_path: Path,
    teacher: Path,
    model: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from distill.training.step import accumulate_gradients as real

    def diverge(*arguments: Any, **options: Any) -> Any:
        sums = real(*arguments, **options)
        settings = arguments[3]
        return replace(sums, loss=float("nan")) if settings.cross_entropy == 1.0 else sums

    monkeypatch.setattr("distill.training.trainer.accumulate_gradients", diverge)
    target = tmp_path / "trained"

    distill.train(model, target, teacher=teacher, texts=chats, twin=True, **OPTIONS)

    card = json.loads((target / "fidelity.json").read_text("utf-8"))
    assert card["student"]["held_out"]["kl"] < card["before"]["kl"]
    assert card["twin_of_equal_tokens"] is card["twin_of_equal_time"] is None
    assert "will lack a twin" in caplog.text


def test_a_run_that_has_ended_is_not_run_again(tmp_path: Path) -> None:
    runs = []

    def run() -> TrainingProgress[Evaluation]:
        runs.append(1)
        return progress(5.0)

    with accelerating(TrainSettings(), logs=tmp_path) as accelerator:
        for _ in range(2):
            assert run_once(tmp_path, accelerator, Evaluation, run) == progress(5.0)
    assert len(runs) == 1


def test_a_student_of_text_alone_has_no_twin() -> None:
    with pytest.raises(SettingsError, match="leave twin out"):
        TrainSettings(twin=True, cross_entropy=1.0)
