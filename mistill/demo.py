"""The demo: all steps on the embedded teacher, from distillation to a chatbot and a report.

The demo is a recipe, one of three that differ in how much they train. It resumes like any recipe.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

from rich.console import Console

from mistill.recipe import read_recipe, run_recipe

Size = Literal["quick", "normal", "full"]

_RECIPES: dict[Size, tuple[str, str]] = {
    "quick": ("demo-quick.toml", "under 4 minutes"),
    "normal": ("demo.toml", "under 12 minutes"),
    "full": ("demo-full.toml", "about an hour"),
}


def run_demo(size: Size, out: str | Path | None, console: Console) -> Path:
    """Run all steps of the demo, and print where the report and the chatbot are.

    Args:
        size: Name of one of the three recipes.
        out: The folder for all outputs; the recipe's own if None.
        console: Console for progress and results.

    Returns:
        The folder of the report.
    """
    name, duration = _RECIPES[size]
    started = time.monotonic()
    with as_file(files("mistill") / "data" / name) as file:
        recipe = read_recipe(file, out=out)
        console.print(
            f"The demo distils SmolLM2-135M-Instruct and takes {duration} on two processors; the "
            f"same command resumes it. Recipe: {file}"
        )
        outputs = run_recipe(recipe, console)
    report = outputs["report"]
    minutes = (time.monotonic() - started) / 60
    samples = json.loads((report / "report.json").read_text("utf-8")).get("samples") or {}
    for prompt, replies in samples.items():
        console.rule(prompt, align="left")
        for model, reply in replies.items():
            console.print(f"[bold]{model}[/bold]: ", end="")
            console.print(reply, markup=False, highlight=False)
    console.print((report / "report.md").read_text("utf-8"), markup=False, highlight=False)
    console.rule()
    console.print(f"Done in {minutes:.1f} minutes.", highlight=False)
    console.print(f"report:  {_short(report / 'report.html')}", highlight=False, soft_wrap=True)
    command = f"{_our_command()} chat {_short(outputs['chatbot'])}"
    console.print(f"chat:    {command}", highlight=False, soft_wrap=True)
    return report


def _our_command() -> str:
    """The command of mistill: its name, or its path if the shell does not find it."""
    script = Path(sys.executable).with_name("mistill")
    on_path = shutil.which("mistill")
    return "mistill" if on_path or not script.exists() else str(_short(script))


def _short(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
