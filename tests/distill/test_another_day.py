"""A template that writes the date gives a run that resumes on another day the same text."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import distill
from distill import conversations
from distill.targets import targets_folder
from distill.training import step, trainer
from mistill.errors import SettingsError
from mistill.folders import publishing
from mistill.folders.location import location_of
from mistill.folders.targets_folder import read_manifest
from tests.distill.training.test_trained_folder import QUICK, Killed, kill_when, weights
from tests.tiny import CHATML

DATED = "Today: {{ strftime_now('%d %B %Y') }}\n" + CHATML


@pytest.fixture
def dated(tmp_path: Path, teacher: Path, model: Path) -> tuple[Path, Path]:
    """A teacher and a student whose template writes the date."""
    for name, folder in (("teacher", teacher), ("student", model)):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(DATED)
    return tmp_path / "teacher", tmp_path / "student"


def set_day(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    class Day:
        fromisoformat = dt.date.fromisoformat

        @staticmethod
        def today() -> dt.date:
            return dt.date(2026, 1, day)

    monkeypatch.setattr(publishing, "date", Day)


def test_training_resumes_on_the_next_day(
    dated: tuple[Path, Path], chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    teacher, student = dated
    set_day(monkeypatch, 1)
    whole = distill.train(student, tmp_path / "whole", teacher=teacher, texts=chats, **QUICK)
    steps: list[int] = []
    with monkeypatch.context() as patch:
        kill_when(patch, trainer, "accumulate_gradients", 5, after=True)
        with pytest.raises(Killed):
            distill.train(student, tmp_path / "out", teacher=teacher, texts=chats, **QUICK)
    set_day(monkeypatch, 2)
    key = json.loads((tmp_path / ".out.working" / "key.json").read_text())
    assert key["date"] == "2026-01-01"
    original = step.accumulate_gradients

    def counting(*args: Any) -> Any:
        steps.append(1)
        return original(*args)

    monkeypatch.setattr(trainer, "accumulate_gradients", counting)
    resumed = distill.train(student, tmp_path / "out", teacher=teacher, texts=chats, **QUICK)
    ours, theirs = weights(resumed), weights(whole)
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    assert 0 < len(steps) < len((whole / "metrics.jsonl").read_text().splitlines())


def test_targets_are_learned_from_on_a_later_day(
    dated: tuple[Path, Path], chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    teacher, student = dated
    set_day(monkeypatch, 1)
    options: dict[str, Any] = {
        "texts": chats,
        "block_length": QUICK["block_length"],
        "shard_tokens": 512,
    }
    with monkeypatch.context() as patch:
        kill_when(patch, targets_folder, "_encode", 2, after=True)
        with pytest.raises(Killed):
            distill.cache_targets(teacher, tmp_path / "targets", **options)
    set_day(monkeypatch, 2)
    targets = distill.cache_targets(teacher, tmp_path / "targets", **options)
    assert read_manifest(location_of(targets))["date"] == "2026-01-01"
    set_day(monkeypatch, 3)
    distill.train(student, tmp_path / "out", targets=targets, texts=chats, **QUICK)


def test_conversations_go_on_on_the_next_day(
    dated: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    teacher, _ = dated
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Say {number}.\n" for number in range(9)))
    options: dict[str, Any] = {"max_new_tokens": 4, "keep_unfinished": True, "batch_size": 3}
    set_day(monkeypatch, 1)
    whole = distill.generate_conversations(teacher, prompts, tmp_path / "whole.jsonl", **options)
    with monkeypatch.context() as patch:
        kill_when(patch, conversations, "_record", 2, after=True)
        with pytest.raises(Killed):
            distill.generate_conversations(teacher, prompts, tmp_path / "out.jsonl", **options)
    set_day(monkeypatch, 2)
    out = distill.generate_conversations(teacher, prompts, tmp_path / "out.jsonl", **options)
    assert out.read_text() == whole.read_text()


def test_a_template_without_a_date_names_none(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say it.\n")
    with monkeypatch.context() as patch:
        kill_when(patch, conversations, "_record", 1, after=False)
        with pytest.raises(Killed):
            distill.generate_conversations(teacher, prompts, tmp_path / "out.jsonl")
    assert "date" not in json.loads((tmp_path / ".out.jsonl.working" / "key.json").read_text())
    with pytest.raises(SettingsError, match="seed is 1 and was 0"):
        distill.generate_conversations(teacher, prompts, tmp_path / "out.jsonl", seed=1)
