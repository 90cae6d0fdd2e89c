"""Every example runs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.slow
def test_quickstart_runs_cell_by_cell(teacher, chats, tmp_path, monkeypatch, capsys):
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text("utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = None
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body[-1]
        ends_in_value = isinstance(last, ast.Expr)
        if ends_in_value:
            tree.body.pop()
        exec(compile(tree, "cell", "exec"), names)
        if ends_in_value:
            assert isinstance(last, ast.Expr)
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            shown = value if hasattr(value, "_repr_html_") else shown
        if "parameters" in cell["metadata"].get("tags", ()):
            assert {"TEACHER", "TEXTS", "HELD_OUT", "LAYERS", "TOKENS"} <= names.keys()
            names |= {"TEACHER": str(teacher), "TEXTS": str(chats), "HELD_OUT": str(chats)}
            names |= {"LAYERS": 3, "TOKENS": 2000}
    assert shown is names["report"]
    assert "<pre" in shown._repr_html_()
    assert (tmp_path / "chatbot" / "model.onnx").is_file()
    assert names["answer"] in capsys.readouterr().out
    assert names["reply"].ending in ("end of turn", "max_new_tokens")


def test_every_example_has_a_test():
    source = Path(__file__).read_text("utf-8")
    for file in (*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("*.ipynb")):
        assert f'"{file.name}"' in source
