"""Every example runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_laptop_chatbot(teacher, chats, tmp_path):
    said = run("laptop_chatbot.py", teacher, chats, tmp_path, "--layers", 3, "--tokens", 2000)
    assert said.strip()
    assert (tmp_path / "chatbot" / "model.onnx").is_file()


def test_compare_tradeoffs(model, chats, tmp_path):
    said = run("compare_tradeoffs.py", model, chats, chats, tmp_path, "--scored-tokens", 200)
    assert said.strip().endswith("report.html")
    assert (tmp_path / "report" / "report.html").is_file()


def test_every_example_has_a_test():
    source = Path(__file__).read_text("utf-8")
    for file in (ROOT / "examples").glob("*.py"):
        assert f'"{file.name}"' in source
