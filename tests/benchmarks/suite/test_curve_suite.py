"""The programs that show what training and few bits make of a student."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite import few_bits, scale_tuning, training_curve
from benchmarks.suite.tables import FORMS
from benchmarks.suite.training_curve import arguments, learning_rate, work_as_child
from mistill.errors import SettingsError
from mistill.folders.lineage import read_lineage
from tests.tiny import tiny_model


def test_the_rate_rises_and_falls_with_the_budget():
    assert learning_rate(0.05, 3e-4) == pytest.approx(1.5e-4)
    assert learning_rate(0.1, 3e-4) == pytest.approx(3e-4)
    assert learning_rate(0.55, 3e-4) == pytest.approx(1.5e-4)
    assert learning_rate(1.0, 3e-4) == pytest.approx(0)
    assert learning_rate(0.0, 3e-4) > 0
    assert learning_rate(1.2, 3e-4) == pytest.approx(0)


def words_for(teacher: Path, chats: Path, work: Path) -> list[str]:
    return [
        *(str(teacher), "--layers", "2", "--choose", "even", "--texts", str(chats)),
        *("--heal-texts", str(chats), "--held-out", str(chats), "--heal-tokens", "512"),
        *("--tokens", "256", "512", "--seeds", "2", "--more-seeds", "256", "--threads", "1"),
        *("--scored-tokens", "128", "--block-length", "32", "--work", str(work)),
    ]


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "deep", num_hidden_layers=5, scale=0.15)


def test_starts_and_runs_are_judged_on_the_same_text_and_kept(
    deep: Path,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    made: list[str] = []

    def here(python: str, words: Sequence[str]) -> dict[str, Any]:
        assert python == sys.executable
        given = arguments(words)
        made.append(Path(given.target).name)
        return work_as_child(given)

    monkeypatch.setattr(training_curve, "run_child", here)
    words = [*words_for(deep, chats, tmp_path / "work"), "--unhealed", "2"]
    training_curve.main(words)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])

    order = [(run["start"], run["tokens"], run["seed"]) for run in found["runs"]]
    assert order == [
        *(("cut", 0, 0), ("healed", 0, 0)),
        *(("healed", 256, 0), ("healed", 256, 1), ("healed", 512, 0)),
        *(("cut", 512, 0), ("cut", 512, 1)),
    ]
    assert made[:3] == ["cut", "healed", "healed-512-0"]
    kls = [run["held_out"][chats.name]["kl"] for run in found["runs"]]
    assert kls[1] < kls[0]  # healed on the same text
    assert len(set(kls)) == len(kls)
    entry = read_lineage(tmp_path / "work" / "healed-256-1")[-1]
    assert (entry["settings"]["tokens"], entry["settings"]["seed"]) == (256, 1)
    assert all(run["processor_seconds"] > 0 for run in found["runs"])
    assert any("mistill, 256 tokens" in line for line in FORMS["training_curve"](found))

    made.clear()
    training_curve.main(words)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["runs"] == found["runs"]
    assert made == []

    with pytest.raises(SettingsError, match=r"cut.json was made from other inputs"):
        training_curve.main([*words, "--heal-tokens", "256"])
    assert made == []


@pytest.mark.slow
def test_trl_learns_from_the_cut_for_as_long(deep: Path, chats: Path, tmp_path: Path):
    pytest.importorskip("trl")
    words = [*words_for(deep, chats, tmp_path / "work"), "--tokens", "256", "--block-length", "128"]
    given = arguments([*words, "--rivals-python", sys.executable])
    found = training_curve.run(given)
    (rival,) = [run for run in found["runs"] if "trainer" in run]
    assert rival["start"] == "cut"
    assert rival["processor_seconds"] >= found["rival_processor_seconds"]
    assert rival["tokens"] > 0
    assert rival["held_out"][chats.name]["kl"] != found["runs"][0]["held_out"][chats.name]["kl"]


def test_ways_of_few_bits_differ_by_method_and_text(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tmp_path / "plain.txt"
    other.write_text("The mistral is a strong, cold wind that blows from the north. " * 40)
    ways = ["gptq, symmetric, one text", "gptq, symmetric", "gptaq, asymmetric"]
    few_bits.main(
        [
            *(str(model), "--texts", str(chats), str(other), "--held-out", str(chats)),
            *("--ways", *ways, "--samples", "4", "--block-length", "32", "--threads", "1"),
            *("--scored-tokens", "128"),
        ]
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [way["way"] for way in found["ways"]] == ways
    assert [way["texts"] for way in found["ways"]] == [
        [chats.name],
        *([[chats.name, other.name]] * 2),
    ]
    kls = [way["held_out"][chats.name]["kl"] for way in found["ways"]]
    assert len(set(kls)) == 3
    assert all(kl > 0.01 for kl in kls)
    sizes = [way["bytes"] for way in found["ways"]]
    assert sizes[0] == sizes[1] <= sizes[2]
    assert FORMS["few_bits"](found)


def test_tuning_of_scales_is_measured_on_the_same_text_before_and_after(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tmp_path / "plain.txt"
    other.write_text("The mistral is a strong, cold wind that blows from the north. " * 40)
    scale_tuning.main(
        [
            *(str(model), "--texts", str(other), "--tuning-texts", str(chats)),
            *("--held-out", str(chats), "--bits", "3", "--seeds", "0", "1", "--samples", "4"),
            *("--block-length", "32", "--threads", "1", "--scored-tokens", "128"),
            *("--learning-rate", "1e-2", "--steps", "12"),
        ]
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(run["bits"], run["seed"]) for run in found["runs"]] == [(3, 0), (3, 1)]
    for run in found["runs"]:
        before, after = (run["held_out"][name][chats.name]["kl"] for name in ("quantized", "tuned"))
        assert 0 < after < before
    assert found["tuning_tokens"] == 12 * 32
    rows = FORMS["scale_tuning"](found)
    assert "3 bits, groups of 32, tuned" in rows[3]
    assert "taken off" in rows[3]
