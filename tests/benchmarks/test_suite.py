"""The programs that measure mistill against rivals: they run, and count what they should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
