"""Two processes learn preferences and rewards as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tune
from mistill.errors import SettingsError
from mistill.folders.lineage import read_lineage
from tests.tune.trainers.test_four_bits import QUICK, entries_of, report_of
from tune.trainers.shares import filled, in_shares, order_of_run

PROGRAM = """
import json, sys
import torch
torch.set_num_threads(1)
import tune
step, model, target, pairs, options = sys.argv[1:]
getattr(tune, step)(model, target, pairs=pairs, **json.loads(options))
"""


def launched(words: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path,
    )  # fmt: skip


def figures(folder: Path) -> list[float]:
    """What each step and each evaluation found, but for means of the means of micro-batches."""
    return [
        value
        for entry in entries_of(folder)
        for name, value in sorted({**entry, **entry.pop("held_out", {})}.items())
        if name in ("loss", "grad_norm", "step", "chosen", "rejected", "margin", "accuracy")
    ]


def options_of(**more: Any) -> dict[str, Any]:
    return {**QUICK, "batch_size": 8, "steps": 6, "keep": "last", **more}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "options", "alone"),
    [
        ("preferences", {}, {}),
        ("preferences", {"base": "nf4"}, {}),
        ("preferences", {"loss": "orpo"}, {}),
        ("preferences", {"loss": "kto"}, {"micro_batch_size": 4}),
        ("preferences", {"lora_rank": 0, "learning_rate": 1e-3}, {}),
        ("reward", {}, {}),
        ("reward", {"base": "nf4", "gradient_checkpointing": True}, {}),
    ],
    ids=["dpo", "dpo-nf4", "orpo", "kto", "dpo-whole", "reward", "reward-nf4"],
)
def test_two_processes_learn_as_one_does(
    step: str,
    options: dict[str, Any],
    alone: dict[str, Any],
    model: Path,
    pairs: Path,
    tmp_path: Path,
) -> None:
    given = options_of(**options)
    one = getattr(tune, step)(model, tmp_path / "one", pairs=pairs, **{**given, **alone})
    two = tmp_path / "two"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = launched(
        [str(program), step, str(model), str(two), str(pairs), json.dumps(given)], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert figures(two) == pytest.approx(figures(one), rel=1e-4, abs=1e-5)
    steps = [
        [entry["loss"] for entry in entries_of(folder) if "loss" in entry] for folder in (one, two)
    ]
    assert steps[1] == pytest.approx(steps[0], rel=1e-5)
    assert report_of(two)["after"]["loss"] == pytest.approx(
        report_of(one)["after"]["loss"], rel=1e-5
    )
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (two, one))
    for name, tensor in ours.items():
        # Adam turns the last bits of a tiny gradient into a step of the learning rate's size.
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    assert report_of(two)["processes"] == read_lineage(two)[-1]["processes"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "program.py", "two"]


def test_what_several_processes_cannot_share_is_refused(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match=r"2 processes .* batch_size of 6; make it a multiple"):
        tune.reward(model, tmp_path / "out", pairs=pairs, batch_size=6, micro_batch_size=2)
    with pytest.raises(SettingsError, match=r"draws its answers in one process.* has started 2"):
        tune.reinforce(model, tmp_path / "out", prompts=pairs, check="code")
    for name in ("FSDP", "DEEPSPEED"):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
        with pytest.raises(SettingsError, match=f"asks for {name}, and here every process holds"):
            tune.preferences(model, tmp_path / "out", pairs=pairs)
        monkeypatch.delenv(f"ACCELERATE_USE_{name}")
    assert list(tmp_path.iterdir()) == []


def test_every_row_is_learned_from_once_before_one_is_learned_from_twice() -> None:
    order = order_of_run(5, 13, seed=3)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert len(order) == 13
    assert len(set(order[10:])) == 3
    assert order == order_of_run(5, 13, seed=3)
    assert order != order_of_run(5, 13, seed=4)
    assert order[:5] != order[5:10]


def test_the_last_micro_batch_is_filled_with_the_first_rows() -> None:
    assert filled([4, 2, 7], 2) == [4, 2, 7, 4]
    assert filled([4, 2, 7, 1], 2) == [4, 2, 7, 1]
    assert filled([4, 2], 6) == [4, 2, 4, 2, 4, 2]


def test_numbers_of_rows_are_worked_out_part_by_part_and_stay_in_order() -> None:
    import numpy as np

    asked: list[list[int]] = []

    def square(rows: Any) -> Any:
        asked.append(list(rows))
        return np.array(rows, float) ** 2

    assert in_shares(list(range(7)), square, 3).tolist() == [0, 1, 4, 9, 16, 25, 36]
    assert asked == [[0, 1, 2], [3, 4, 5], [6]]
    assert in_shares([], square, 3).tolist() == []
