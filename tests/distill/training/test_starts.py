"""How fast a student is taught, by where it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distill
from distill import TrainSettings
from distill.training.starts import with_learning_rate
from mistill.folders.lineage import add_lineage, read_lineage
from tests.tiny import tiny_model


def test_a_healed_student_learns_slowly_and_others_as_before(tmp_path: Path, chats: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=3)
    options: dict[str, Any] = {"layers": 2, "choose": "even", "block_length": 64}
    cut = distill.new_student(teacher, tmp_path / "cut", **options)
    healed = distill.new_student(teacher, tmp_path / "healed", texts=chats, **options)
    later = distill.heal(
        cut, tmp_path / "later", teacher=teacher, texts=chats, tokens=200, block_length=64
    )

    rates = [
        with_learning_rate(TrainSettings(), folder).learning_rate
        for folder in (teacher, cut, healed, later)
    ]
    assert rates == [3e-4, 3e-4, 1e-4, 1e-4]
    named = with_learning_rate(TrainSettings(learning_rate=2e-3), healed)
    assert named.learning_rate == 2e-3

    # One that was trained since is not where healing left it.
    add_lineage(healed, step="distill", settings=TrainSettings(), source=healed)
    assert with_learning_rate(TrainSettings(), healed).learning_rate == 3e-4


def test_the_rate_that_was_taken_is_on_record(tmp_path: Path, chats: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=3)
    student = distill.new_student(teacher, tmp_path / "student", layers=2, choose="even")
    trained = distill.train(
        student,
        tmp_path / "trained",
        teacher=teacher,
        texts=chats,
        tokens=600,
        block_length=64,
        evaluate_every=0,
    )
    assert read_lineage(trained)[-1]["settings"]["learning_rate"] == 3e-4
