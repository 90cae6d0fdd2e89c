"""Two processes learn preferences and rewards as one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tune
from mistill.errors import SettingsError
from mistill.folders.lineage import read_lineage
from tests.launching import launched
from tests.tiny import SENTENCES
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

# Draws of the n-th answer to a prompt come from the n-th of a few numbers, so that one process and
# two draw alike.
REINFORCE = """
import json, sys
import torch
import trl
torch.set_num_threads(1)

def drawn(probabilities, num_samples):
    rows = torch.arange(len(probabilities), device=probabilities.device)
    numbers = (0.1 + 0.618 * (rows % 4))[:, None] % 1
    return (probabilities.cumsum(-1) < numbers).sum(-1, keepdim=True).clamp(max=383)

def taught(self):
    self.mask_truncated_completions = False  # a tiny model seldom ends its own
    begin(self)

def small_letters(messages, answer, **columns):
    return sum(letter.islower() for letter in answer) / (1 + len(answer))

if __name__ == "__main__":
    begin, trl.GRPOConfig.__post_init__ = trl.GRPOConfig.__post_init__, taught
    model, target, prompts, draw, options = sys.argv[1:]
    if draw == "alike":
        torch.multinomial = drawn
    import tune
    tune.reinforce(
        model, target, prompts=prompts, reward=small_letters, **json.loads(options)
    )
"""


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


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [4, 0], ids=["adapters", "whole"])
def test_two_processes_learn_from_the_same_answers_as_one_does(
    lora_rank: int, model: Path, tmp_path: Path
) -> None:
    done = {}
    for processes in (1, 2):
        rate = 2e-2 if lora_rank else 1e-3
        options = {**REINFORCED, "lora_rank": lora_rank, "learning_rate": rate}
        done[processes] = reinforced(model, tmp_path, processes, "alike", options)
    one, two = done[1], done[2]
    steps = [
        [entry for entry in entries_of(folder) if "kl_from_start" in entry] for folder in (one, two)
    ]
    assert len(steps[0]) == len(steps[1]) == 4
    assert steps[0][-1]["reward"] != steps[0][0]["reward"]
    for ours, theirs in zip(*steps, strict=True):
        for name in ("loss", "grad_norm", "reward", "kl_from_start", "frac_reward_zero_std"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    reports = [report_of(folder) for folder in (one, two)]
    assert reports[0]["after"] == pytest.approx(reports[1]["after"], rel=1e-4)
    assert reports[1]["processes"] == read_lineage(two)[-1]["processes"] == 2
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (two, one))
    for name, tensor in ours.items():
        # Adam turns the last bits of a tiny gradient into a step of the learning rate's size.
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.slow
def test_two_processes_learn_from_answers_of_their_own(model: Path, tmp_path: Path) -> None:
    options = {**REINFORCED, "steps": 24, "max_kl": 5.0, "seed": 1}
    two = reinforced(model, tmp_path, 2, "freely", options)
    report = report_of(two)
    assert report["after"]["reward"] > report["before"]["reward"] + 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "from-2", "program.py", "prompts.txt"
    ]  # fmt: skip


REINFORCED = {**QUICK, "batch_size": 8, "micro_batch_size": 4, "samples": 4, "max_length": 100,
              "max_new_tokens": 4, "learning_rate": 2e-2, "steps": 4, "keep": "last"}  # fmt: skip


def reinforced(
    model: Path, tmp_path: Path, processes: int, draw: str, options: dict[str, Any]
) -> Path:
    """The folder of a model that learnt from its answers in so many processes."""
    program, prompts = tmp_path / "program.py", tmp_path / "prompts.txt"
    program.write_text(REINFORCE)
    prompts.write_text("".join(f"{text} {n}\n" for n in range(4) for text in SENTENCES), "utf-8")
    target = tmp_path / f"from-{processes}"
    done = launched(
        [str(program), str(model), str(target), str(prompts), draw, json.dumps(options)],
        tmp_path,
        processes,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_what_several_processes_cannot_share_is_refused(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match=r"2 processes .* batch_size of 6; make it a multiple"):
        tune.reward(model, tmp_path / "out", pairs=pairs, batch_size=6, micro_batch_size=2)
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
