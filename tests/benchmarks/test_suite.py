"""The programs that measure mistill against rivals: they run, and count what they should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import distill
from benchmarks.suite.turns import paired_ratio, summary, take_turns

ROOT = Path(__file__).parents[2]


def run(name: str, *options: str) -> Any:
    command = [sys.executable, "-m", f"benchmarks.suite.{name}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_turns_are_interleaved_and_counted_without_the_warm_up() -> None:
    code = (
        "from benchmarks.suite.turns import serve; import time\n"
        "kept = []\n"
        "def work():\n"
        "    kept.append(bytearray(64 << 20)) if len(kept) == {grow} else kept.append(None)\n"
        "    return {{'at': time.monotonic()}}\n"
        "serve(work)"
    )
    commands = {
        name: [sys.executable, "-c", code.format(grow=grow)] for name, grow in (("a", 2), ("b", 9))
    }
    samples = take_turns(commands, rounds=3, warm_up=1)
    times = [turn["at"] for pair in zip(samples["a"], samples["b"], strict=True) for turn in pair]
    assert len(times) == 6
    assert times == sorted(times)
    # Only the turn that allocates has a peak, and what it keeps does not count again.
    peaks = [turn["peak_mib"] for turn in samples["a"]]
    assert peaks[1] == pytest.approx(64, abs=4)
    assert peaks[0] < 4
    assert peaks[2] < 4


def test_a_child_that_fails_is_named() -> None:
    with pytest.raises(RuntimeError, match="broken ended with 3"):
        take_turns({"broken": [sys.executable, "-c", "raise SystemExit(3)"]}, rounds=1)


def test_ratios_are_of_the_same_turn() -> None:
    ours, theirs = [{"s": 1.0}, {"s": 4.0}, {"s": 2.0}], [{"s": 2.0}, {"s": 2.0}, {"s": 2.0}]
    assert paired_ratio(ours, theirs, "s") == {"median": 1.0, "lowest": 0.5, "highest": 2.0}
    assert summary(ours, "s") == {"median": 2.0, "lowest": 1.0, "highest": 4.0}


def test_the_loss_head_is_compared_with_full_logits() -> None:
    found = run("loss_head", "--shape", "small", "--rounds", "1", "--threads", "1")
    for kept in ("kept 1", "kept 0.5"):
        ours, full = found[kept]["ours"], found[kept]["full logits"]
        assert ours["loss"] == pytest.approx(full["loss"], rel=1e-6)
        assert full["ours_seconds_ratio"]["median"] > 0
    assert found["exactness"]["loss_relative_error"] < 1e-6
    assert found["exactness"]["head_gradient_cosine"] > 0.99999
    assert 0 <= found["exactness"]["loss_of_a_model_with_itself"] < 1e-6


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A student with half of the teacher's layers."""
    folder = tmp_path_factory.mktemp("suite") / "cut"
    return distill.new_student(teacher, folder, layers=1, choose="even")


def test_live_and_cached_steps_take_turns(teacher: Path, cut: Path, chats: Path) -> None:
    found = run(
        "training_step", str(teacher), str(cut), "--texts", str(chats), "--rounds", "2",
        "--blocks", "1", "--block-length", "64", "--threads", "1",
    )  # fmt: skip
    live, cached = (found["methods"][name]["losses"] for name in ("live", "cached"))
    # Fifty draws of the teacher give nearly its own loss on the same blocks.
    assert cached == pytest.approx(live, rel=0.2)
    assert found["cached_over_live"]["median"] > 0
    assert 0 <= found["waited_for_cached_targets"]["median"] < 1


def test_cached_and_live_students_are_judged_alike(teacher: Path, cut: Path, chats: Path) -> None:
    found = run(
        "cached_quality", str(teacher), str(cut), "--texts", str(chats), "--held-out", str(chats),
        "--tokens", "600", "--seeds", "3", "--block-length", "64", "--held-out-tokens", "256",
        "--methods", "live", "systematic", "top-5", "--threads", "1",
    )  # fmt: skip
    assert found["kl_over_live"]["live"] == [1.0]
    assert found["kl_over_live"]["systematic"][0] == pytest.approx(1, abs=0.1)
    assert found["runs"]["systematic"][0]["agreement"] is not None  # judged by the whole teacher
    assert found["mean_kl"]["live"] < found["before"]["kl"]
    assert found["bytes_a_position"]["systematic"] > 10


def test_recovery_says_what_a_start_was_worth(teacher: Path, chats: Path) -> None:
    found = run(
        "recovery", str(teacher), "--texts", str(chats), "--held-out", str(chats), "--layers", "1",
        "--tokens", "600", "--random-tokens", "300", "--evaluate-every", "1", "--block-length",
        "64", "--held-out-tokens", "256", "--threads", "1",
    )  # fmt: skip
    assert found["after"]["kl"] < found["before"]["kl"]
    assert found["history"][0]["tokens"] == 0
    assert found["history"][-1]["kl"] >= found["after"]["kl"]
    assert found["random_start"]["after"]["kl"] < found["random_start"]["before"]["kl"]


def test_the_program_for_a_gpu_runs_without_one_when_it_is_told_to() -> None:
    found = run(
        "gpu_scale", "--device", "cpu", "--tiny", "--rounds", "1", "--block-length", "16",
        "--most-blocks", "2",
    )  # fmt: skip
    assert set(found["loss_heads"]) == {"ours", "full logits"}
    for kind in ("bfloat16", "nf4", "targets"):
        assert found["training"][kind]["largest_micro_batch"] == 2
        assert found["training"][kind]["2 blocks"]["tokens_per_second"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_program_for_a_gpu_asks_for_one() -> None:
    command = [sys.executable, "-m", "benchmarks.suite.gpu_scale"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "there is no CUDA device" in done.stderr
