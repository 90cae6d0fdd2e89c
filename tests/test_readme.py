"""Every command and every program in the README runs, on tiny models."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from mistill.cli.app import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BIG = "mistralai/Mistral-7B-Instruct-v0.1"
ROAD = """
[teacher]
source = "mistral"

[small]
step = "rounding"
source = "teacher"
group_size = 32
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def tiny(text: str) -> str:
    """The same words about a model of four layers and a few thousand tokens."""
    text = text.replace(BIG, "mistral").replace("layers=16", "layers=3")
    text = text.replace("--layers 16", "--layers 3").replace("tokens=20_000_000", "tokens=3000")
    return text.replace("--tokens 20000000", "--tokens 3000")


@pytest.fixture
def place(tmp_path, teacher, chats, monkeypatch):
    shutil.copytree(teacher, tmp_path / "mistral")
    shutil.copyfile(chats, tmp_path / "chats.jsonl")
    shutil.copyfile(chats, tmp_path / "held-out.jsonl")
    (tmp_path / "prompts.txt").write_text("What is a mistral?\nCount to three.\n")
    (tmp_path / "road.toml").write_text(ROAD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is a mistral?\n"))
    return tmp_path


def test_every_command_runs(place):
    commands = [line for block in blocks("sh") for line in block.splitlines() if line]
    assert len(commands) >= 11
    for command in commands:
        words = shlex.split(tiny(command))
        assert words[0] == "mistill"
        if words[1] == "generate":
            # A model with random weights seldom ends a reply, and only ended ones are kept.
            words += ["--max-new-tokens", "8", "--keep-unfinished"]
        assert main(words[1:]) == 0, command


def test_the_program_runs(place, capsys):
    (program,) = blocks("python")
    exec(compile(tiny(program), "README.md", "exec"), {})
    assert capsys.readouterr().out
    assert (place / "report" / "report.html").is_file()


def test_every_make_target_exists():
    for target in set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", README, re.MULTILINE)):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_every_file_that_is_linked_exists():
    for name in re.findall(r"\]\(([^)#]+)\)", README):
        assert name.startswith("http") or (ROOT / name).exists(), name
