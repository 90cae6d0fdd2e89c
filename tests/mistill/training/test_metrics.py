"""Metrics in the trackers that are asked for by name."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import distill
from mistill.training.metrics import PROJECT
from tests.distill.training.test_trained_folder import QUICK

SHORT: dict[str, Any] = {**QUICK, "tokens": 600}


def need(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("default")
def test_tensorboard_holds_every_step_and_every_judgement(
    tmp_path: Path, teacher: Path, model: Path, chats: Path
) -> None:
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {**SHORT, "trackers": ("tensorboard",)}
    made = distill.train(model, tmp_path / "out", teacher=teacher, texts=chats, **options)
    read = EventAccumulator(str(made / "tensorboard" / PROJECT))
    read.Reload()
    losses = {event.step: event.value for event in read.Scalars("train/loss")}
    judged = {event.step: event.value for event in read.Scalars("held_out/kl")}
    for line in lines(made):
        if "loss" in line:
            assert losses.pop(line["step"]) == pytest.approx(line["loss"])
        else:
            assert judged.pop(line["step"]) == pytest.approx(line["held_out"]["kl"])
    assert not losses
    assert not judged


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_are_told_without_a_network(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    teacher: Path,
    model: Path,
    chats: Path,
    name: str,
) -> None:
    need(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    options = {**SHORT, "trackers": (name,)}
    distill.train(model, tmp_path / "out", teacher=teacher, texts=chats, **options)
    found = {path.suffix for path in tmp_path.rglob("*")}
    assert found & ({".wandb"} if name == "wandb" else {".db", ".parquet"})
    assert name in sys.modules
