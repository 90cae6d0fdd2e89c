"""Every command of docs/tuning.md runs, on a tiny model and with smaller numbers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mistill.cli.app import main

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

PAGE = (Path(__file__).parent.parent.parent / "docs" / "tuning.md").read_text("utf-8")
BLOCKS = "".join(re.findall(r"```(?:text|sh)\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
COMMANDS = re.findall(r"^(?:\$ )?mistill (.*)$", BLOCKS, re.MULTILINE)
NUMBERS = {"--block-length": "128", "--tokens": "3000", "--held-out-tokens": "1000"}
MORE = {"supervised": ["--learning-rate", "5e-3", "--lora-rank", "4", "--reply-tokens", "4"]}


def smaller(command: str, files: dict[str, Path]) -> list[str]:
    """The words of a command with smaller numbers and tiny files."""
    words = [str(files.get(word, word)) for word in shlex.split(command)]
    for place, word in enumerate(words[:-1]):
        if word in NUMBERS:
            words[place + 1] = NUMBERS[word]
    return [*words, *MORE.get(words[1], [])]


def form_of(line: str) -> str:
    """A printed line without its numbers, and without which way of merging was the better one."""
    return re.sub(r"[\d.,+-]+", "0", re.sub(r"into the \w+ weights", "into the weights", line))


def test_the_first_command_prints_what_the_page_shows(model, chats, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = chats.read_text("utf-8").splitlines(keepends=True)
    Path("held-out.jsonl").write_text("".join(lines[30:]), "utf-8")
    Path("learned.jsonl").write_text("".join(lines[:30]), "utf-8")
    files = {
        "@smollm2": model,
        "@demo-train": Path("learned.jsonl"),
        "@demo-held-out": Path("held-out.jsonl"),
    }
    tuning, merging = COMMANDS
    assert main(smaller(tuning, files)) == 0
    shown = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert shown is not None
    printed = capsys.readouterr().out.strip().splitlines()
    expected = shown[1].replace("\\\n", " ").strip().splitlines()[1:]
    assert len(printed) == len(expected)
    for mine, line in zip(printed, expected, strict=True):
        assert form_of(mine.replace(f"{tmp_path}/", "")) == form_of(line)
    # An adapter from elsewhere, and the base in 4 bits that it was trained over.
    shutil.copytree(model, "model")
    assert main(["quantize", "nf4", "model", "nf4-base"]) == 0
    shutil.copytree("tuned/adapter", "adapter")
    assert main(smaller(merging, files)) == 0
    facts = json.loads(Path("merged/lineage.json").read_text())[-1]
    assert facts["step"] == "merge"


def test_the_remedy_for_bitsandbytes_reaches_every_layer() -> None:
    class Linear4bit(nn.Linear):
        support_avx512bf16_for_cpu = True

    model = nn.Sequential(Linear4bit(2, 2), nn.Sequential(Linear4bit(2, 2), nn.Linear(2, 2)))
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(program, "tuning.md", "exec"), {"model": model})
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False, False]
