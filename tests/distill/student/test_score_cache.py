"""Scores that were measured once are not measured again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import new_student
from distill.student import scores as student
from distill.student.score_cache import keep_scores, read_scores, score_folder
from mistill.folders.lineage import read_lineage
from tests.tiny import tiny_model

MEASURE: dict[str, Any] = {"calibration_tokens": 160, "block_length": 32}


@pytest.fixture
def cache(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where scores are kept in an empty home."""
    monkeypatch.setattr("distill.student.score_cache.score_folder", score_folder)
    return empty_home / ".cache" / "mistill" / "scores"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured from here on."""
    found: list[str] = []
    for name in ("measure_scores", "greedy_drops"):
        original = getattr(student, name)

        def watched(*arguments: Any, name: str = name, original: Any = original) -> Any:
            found.append(name)
            return original(*arguments)

        monkeypatch.setattr(student, name, watched)
    return found


def kept_layers(folder: Path) -> list[int]:
    layers: list[int] = read_lineage(folder)[-1]["kept_layers"]
    return layers


def test_students_of_other_sizes_and_kinds_reuse_one_measurement(
    teacher: Path, chats: Path, tmp_path: Path, cache: Path, measured: list[str]
) -> None:
    first = new_student(teacher, tmp_path / "a", layers=3, texts=chats, **MEASURE)
    second = new_student(teacher, tmp_path / "b", layers=2, texts=chats, **MEASURE)
    new_student(teacher, tmp_path / "c", layers=2, choose="angular", texts=chats, **MEASURE)
    new_student(teacher, tmp_path / "d", hidden_size=48, texts=chats, **MEASURE)

    assert measured == ["measure_scores"]
    assert len(list(cache.iterdir())) == 1
    one, other = read_lineage(first)[-1], read_lineage(second)[-1]
    assert one["influence"] == other["influence"]
    assert (one["scores_reused"], other["scores_reused"]) == (False, True)


def test_what_is_reused_is_what_was_measured(
    teacher: Path, chats: Path, tmp_path: Path, cache: Path
) -> None:
    options: dict[str, Any] = {"hidden_size": 48, "key_value_heads": 1, "layers": 3, **MEASURE}
    new_student(teacher, tmp_path / "a", texts=chats, **options)
    new_student(teacher, tmp_path / "b", texts=chats, **options)

    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert ours == theirs


def test_another_text_block_length_or_teacher_is_measured(
    teacher: Path, model: Path, chats: Path, tmp_path: Path, cache: Path, measured: list[str]
) -> None:
    (tmp_path / "other.txt").write_text("A teacher knows more than its student. " * 40)
    new_student(teacher, tmp_path / "a", layers=2, texts=chats, **MEASURE)
    new_student(teacher, tmp_path / "b", layers=2, texts=tmp_path / "other.txt", **MEASURE)
    longer = {**MEASURE, "block_length": 40}
    new_student(teacher, tmp_path / "c", layers=2, texts=chats, **longer)
    new_student(model, tmp_path / "d", layers=1, texts=chats, **MEASURE)

    assert len(measured) == 4
    assert len(list(cache.iterdir())) == 4


def test_a_greedy_search_is_gone_on_with_and_cut_short(
    chats: Path,
    tmp_path: Path,
    cache: Path,
    measured: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=5)
    options: dict[str, Any] = {"choose": "greedy_kl", "texts": chats, **MEASURE}
    known: list[list[int]] = []
    search = getattr(student, "greedy_drops")  # noqa: B009

    def watched(*arguments: Any) -> Any:
        known.append([drop.layer for drop in arguments[3]])
        return search(*arguments)

    monkeypatch.setattr(student, "greedy_drops", watched)
    four = new_student(teacher, tmp_path / "four", layers=4, **options)
    two = new_student(teacher, tmp_path / "two", layers=2, **options)
    three = new_student(teacher, tmp_path / "three", layers=3, **options)

    assert measured == ["greedy_drops"] * 2
    assert known == [[], read_lineage(four)[-1]["dropped_layers"]]
    assert set(kept_layers(two)) < set(kept_layers(three)) < set(kept_layers(four))
    assert read_lineage(three)[-1]["scores_reused"]
    kls = read_lineage(two)[-1]["kl_without_them"]
    assert read_lineage(three)[-1]["kl_without_them"] == kls[:2]


@pytest.mark.parametrize("damage", ["cut short", "a bit", "another file", "empty"])
def test_a_damaged_file_is_measured_anew(
    teacher: Path,
    chats: Path,
    tmp_path: Path,
    cache: Path,
    measured: list[str],
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    first = new_student(teacher, tmp_path / "a", layers=2, texts=chats, **MEASURE)
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "cut short":
        content = content[:-9]
    elif damage == "a bit":
        content[-3] ^= 4
    elif damage == "another file":
        content = bytearray(b"not a safetensors file at all, nor anything like it")
    else:
        content = bytearray()
    file.write_bytes(content)

    with caplog.at_level(logging.WARNING):
        second = new_student(teacher, tmp_path / "b", layers=2, texts=chats, **MEASURE)

    assert measured == ["measure_scores"] * 2
    assert "damaged" in caplog.text
    assert kept_layers(first) == kept_layers(second)
    assert read_scores(file) is not None


def test_a_cache_that_cannot_be_written_stops_nothing(
    teacher: Path, chats: Path, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("a file where a folder should be")

    with caplog.at_level(logging.WARNING):
        made = new_student(teacher, tmp_path / "a", layers=2, texts=chats, **MEASURE)

    assert len(kept_layers(made)) == 2
    assert "could not be kept for later" in caplog.text


def test_scores_come_back_as_they_were(tmp_path: Path) -> None:
    scores = {"a": torch.rand(3, 4, dtype=torch.float64), "b": torch.arange(5)}
    file = tmp_path / "deep" / "scores.safetensors"

    keep_scores(file, scores)

    found = read_scores(file)
    assert found is not None
    assert all(torch.equal(found[name], scores[name]) for name in scores)
    assert [item.name for item in file.parent.iterdir()] == ["scores.safetensors"]
    assert read_scores(tmp_path / "none") is None
