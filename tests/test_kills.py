"""Long steps killed at random moments and run again: the same bits, and nothing left behind."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest

from tests.forked import run_forked
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here"),
    pytest.mark.slow,
]

RECORDS = (
    *("lineage.json", "manifest.json", "metrics.jsonl", "fidelity.json"),
    *("quantize_report.json", "quantize_report.csv", "README.md"),
)

KILLS = 20

# The command of each step.
STEPS = {
    "distill": "distill model out --teacher teacher --texts rows.jsonl --tokens 3000 "
    "--block-length 64 --evaluate-every 4 --checkpoint-every 2 --learning-rate 1e-3 "
    "--held-out-tokens 200",
    "supervised": "tune supervised model out --texts rows.jsonl --epochs 1 --block-length 128 "
    "--batch-size 2 --lora-rank 4 --base nf4 --neftune 5 --learning-rate 5e-3 --evaluate-every 4 "
    "--checkpoint-every 2 --reply-tokens 8",
    "targets": "targets teacher out --texts rows.jsonl --block-length 64",
    "student": "student teacher out --layers 2 --texts rows.jsonl --calibration-tokens 300",
    "heal": "heal pruned out --teacher teacher --texts rows.jsonl --tokens 600 --block-length 64",
    "gptq": "quantize gptq model out --texts rows.jsonl --group-size 32 --block-length 64 "
    "--samples 4",
    "mixed": "quantize mixed model out --texts rows.jsonl --bits-per-weight 6 --block-length 64 "
    "--samples 4 --sensitivity-samples 2",
    "rotate": "quantize rotate model out",
    "nf4": "quantize nf4 model out",
    "tune": "quantize tune gptq out --teacher teacher --texts rows.jsonl --block-length 64",
    "export": "export model out",
    "gguf": "gguf model out.gguf",
    "compress": "compress model out --texts rows.jsonl --held-out rows.jsonl --samples 4 "
    "--block-length 64 --tuning-steps 2 --bits-per-weight 14",
    "generate": "generate model prompts.txt out.jsonl --max-new-tokens 6 --batch-size 2 "
    "--keep-unfinished",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> Path:
    """A folder to stand in; what a step makes in it is removed again."""
    here = tmp_path_factory.mktemp("kills")
    tiny_model(here / "model", seed=2)
    tiny_model(here / "teacher", num_hidden_layers=4, seed=1)
    shutil.copyfile(chats, here / "rows.jsonl")
    (here / "prompts.txt").write_text("".join(f"Question {n}?\n" for n in range(12)))
    ran = run_forked(["quantize", "rounding", "model", "gptq", "--group-size", "32"], cwd=here)
    assert ran.code == 0
    ran = run_forked(
        ["student", "teacher", "pruned", "--layers", "2", "--choose", "even"], cwd=here
    )
    assert ran.code == 0
    return here


def content_of(target: Path) -> dict[str, str]:
    """Checksums of all files but those that hold dates, durations and speeds."""
    files = target.rglob("*") if target.is_dir() else [target]
    # A GGUF file holds its lineage, with a date.
    date = re.compile(rb'"date": "[^"]*"')
    return {
        file.name: hashlib.sha256(date.sub(b"", file.read_bytes())).hexdigest()
        for file in files
        if file.is_file() and file.name not in RECORDS
    }


def is_finished(step: str, target: Path) -> bool:
    """Whether a target is whole; targets grow where they lie, and their manifest comes last."""
    return (target / "manifest.json" if step == "targets" else target).exists()


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_is_killed_and_run_again_gives_the_same_bits(place: Path, step: str):
    words = STEPS[step].split()
    target = place / next(word for word in words if word.startswith("out"))
    inputs = {item.name for item in place.iterdir()}
    started = time.monotonic()
    ran = run_forked(words, cwd=place, seconds=600)
    duration = time.monotonic() - started
    assert ran.code == 0, ran.err
    assert {item.name for item in place.iterdir()} == inputs | {target.name}
    expected = content_of(target)
    dice = random.Random(step)
    for _ in range(KILLS):
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        run_forked(words, cwd=place, seconds=dice.uniform(0.02, duration))
        # What is finished is refused, or found whole; what a kill left beside it goes then.
        codes = (0, 2) if is_finished(step, target) else (0,)
        ran = run_forked(words, cwd=place, seconds=600)
        assert ran.code in codes, ran.err
        assert content_of(target) == expected
        assert {item.name for item in place.iterdir()} == inputs | {target.name}
    shutil.rmtree(target) if target.is_dir() else target.unlink()
