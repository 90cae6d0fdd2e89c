"""Every step that reads rows passes bad ones over where that is asked for, and says so."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import benchmarks
import distill
import quantize
from mistill.errors import TextError
from tests.distill.training.test_trained_folder import QUICK

Step = Callable[..., Any]


@pytest.fixture
def rows(chats: Path, tmp_path: Path) -> Path:
    """Conversations with two bad rows in front."""
    file = tmp_path / "rows.jsonl"
    bad = '{"messages": []}\n{"messages": [{"role": "user", "content": "Hi"}]}\n'
    file.write_text(bad + chats.read_text("utf-8"), "utf-8")
    return file


STEPS: dict[str, Step] = {
    "distill": lambda teacher, student, rows, target, **options: distill.train(
        student, target, teacher=teacher, texts=rows, **QUICK, **options
    ),
    "targets": lambda teacher, student, rows, target, **options: distill.cache_targets(
        teacher, target, texts=rows, block_length=64, **options
    ),
    "student": lambda teacher, student, rows, target, **options: distill.new_student(
        teacher, target, layers=1, texts=rows, **options
    ),
    "gptq": lambda teacher, student, rows, target, **options: quantize.to_gptq(
        student, target, texts=rows, samples=2, block_length=32, group_size=32, **options
    ),
    "rounding": lambda teacher, student, rows, target, **options: quantize.to_rounding(
        student, target, held_out=rows, group_size=32, **options
    ),
    "tune": lambda teacher, student, rows, target, **options: quantize.tune(
        quantize.to_rounding(student, target.with_name("rough"), group_size=32, overwrite=True),
        target,
        teacher=teacher,
        texts=rows,
        steps=2,
        batch_size=1,
        block_length=32,
        held_out_blocks=2,
        **options,
    ),
    "bench": lambda teacher, student, rows, target, **options: benchmarks.compare(
        [student], texts=rows, rounds=1, new_tokens=8, transformers_generate=False, **options
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_passes_bad_rows_over_or_refuses_the_first(
    name: str,
    teacher: Path,
    model: Path,
    rows: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    step = STEPS[name]
    with pytest.raises(TextError, match=r"rows\.jsonl, line 1 should be a list of turns"):
        step(teacher, model, rows, tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        step(teacher, model, rows, tmp_path / "out", skip_bad_rows=True)
    assert "2 passed over: the conversation of the row should be a list of turns" in caplog.text
    assert "(line 1); the conversation of the row ends with the user's turn" in caplog.text


def test_the_command_line_says_how_many_rows_were_read(teacher: Path, rows: Path, tmp_path: Path):
    command = ["targets", str(teacher), str(tmp_path / "out"), "--texts", str(rows)]
    for options, code, message in (
        ([], 2, "line 1 should be a list of turns"),
        (["--skip-bad-rows"], 0, f"{rows}: 42 rows read, 0 cut, 2 passed over: the conversation"),
    ):
        ran = subprocess.run(
            [sys.executable, "-m", "mistill", *command, *options],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (ran.returncode, message in ran.stderr) == (code, True), ran.stderr


def test_prompts_with_bad_rows_are_answered(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    prompts = tmp_path / "prompts.jsonl"
    tool = {"type": "function", "function": {"name": "tide"}}
    good = {"system_prompt": "Be brief.", "question": "Where?", "tools": [tool]}
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in ({"prompt": None}, good)))
    options: dict[str, Any] = {"max_new_tokens": 4, "keep_unfinished": True}
    with pytest.raises(TextError, match=r"prompt of .*line 1 is null"):
        distill.generate_conversations(teacher, prompts, tmp_path / "out.jsonl", **options)
    file = distill.generate_conversations(
        teacher, prompts, tmp_path / "out.jsonl", skip_bad_rows=True, **options
    )
    assert "1 passed over" in caplog.text
    [row] = [json.loads(line) for line in file.read_text().splitlines()]
    assert row["tools"] == [tool]
    assert row["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
