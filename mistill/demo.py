"""The demo: all steps on the embedded teacher, from distillation to a chatbot and a report.

The demo is a recipe, one of three that differ in how much they train. It resumes like any recipe.
How long the first steps take says how fast the machine is; the student learns from as many tokens
as that leaves time for.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

from rich.console import Console

from mistill.errors import FolderError
from mistill.folders.folder import read_json
from mistill.folders.publishing import write_json
from mistill.recipe import Recipe, read_recipe, run_recipe

Size = Literal["quick", "normal", "full"]


@dataclass(frozen=True)
class _Plan:
    """A recipe of the demo, and what it took on two cores of an AMD EPYC (Zen 5).

    Attributes:
        file: Name of the recipe.
        minutes: How long the demo may take.
        first_seconds: What the steps before the training took there.
        tokens_per_second: Speed of the training there.
        last_seconds: What the steps behind the training took there.
    """

    file: str
    minutes: int
    first_seconds: float
    tokens_per_second: float
    last_seconds: float

    def tokens(self, first_seconds: float) -> int:
        """How many tokens a student can learn from in the time that is left.

        Args:
            first_seconds: What the steps before the training took on this machine.

        Returns:
            A whole number of blocks; at least a few, and no more than the text holds.
        """
        slower = first_seconds / self.first_seconds
        seconds = 60 * self.minutes * _SHARE_OF_TIME - first_seconds - slower * self.last_seconds
        tokens = int(seconds * self.tokens_per_second / slower)
        return min(max(tokens, _LEAST_TOKENS), _MOST_TOKENS) // _BLOCK * _BLOCK


_PLANS: dict[Size, _Plan] = {
    "quick": _Plan("demo-quick.toml", 4, 28, 240, 165),
    "normal": _Plan("demo.toml", 12, 129, 250, 350),
    "full": _Plan("demo-full.toml", 60, 320, 250, 550),
}
_TRAINING = "distilled"
_BUDGET_FILE = ".demo-budget.json"

# Some time is left over, because a machine is not equally fast all the time.
_SHARE_OF_TIME = 0.94
_BLOCK = 512
_LEAST_TOKENS = 4 * _BLOCK
_MOST_TOKENS = 400_000


def run_demo(size: Size, out: str | Path | None, console: Console) -> Path:
    """Run all steps of the demo, and print where the report and the chatbot are.

    Args:
        size: Name of one of the three recipes.
        out: The folder for all outputs; the recipe's own if None.
        console: Console for progress and results.

    Returns:
        The folder of the report.
    """
    plan = _PLANS[size]
    started = time.monotonic()
    with as_file(files("mistill") / "data" / plan.file) as file:
        recipe = read_recipe(file, out=out)
        console.print(
            f"The demo distils SmolLM2-135M-Instruct and takes about {plan.minutes} minutes; the "
            f"same command resumes it. Recipe: {file}"
        )
        tokens = _training_tokens(recipe, plan, console)
        outputs = run_recipe(_with_tokens(recipe, tokens), console)
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


def _training_tokens(recipe: Recipe, plan: _Plan, console: Console) -> int:
    """How many tokens the student learns from: as the first run of this demo settled it."""
    file = recipe.out / _BUDGET_FILE
    recorded = _recorded_tokens(file)
    if recorded is not None:
        return recorded
    names = [step.name for step in recipe.steps]
    begun = (recipe.out / recipe.steps[0].name).exists()
    started = time.monotonic()
    first = recipe.steps[: names.index(_TRAINING)]
    run_recipe(replace(recipe, steps=first), console)
    if begun:
        # Some of the first steps were there, so that their time says nothing.
        tokens = plan.tokens(plan.first_seconds)
    else:
        seconds = time.monotonic() - started
        tokens = plan.tokens(seconds)
        console.print(
            f"The first steps took {seconds:.0f} s, so the student learns from {tokens:,} tokens.",
            highlight=False,
        )
    write_json(file, {"tokens": tokens})
    return tokens


def _recorded_tokens(file: Path) -> int | None:
    """What an earlier run settled; None if there is none, or its record is damaged."""
    if not file.is_file():
        return None
    try:
        tokens = read_json(file).get("tokens")
    except FolderError:
        return None
    return tokens if isinstance(tokens, int) and 1 <= tokens <= _MOST_TOKENS else None


def _with_tokens(recipe: Recipe, tokens: int) -> Recipe:
    """The recipe, with another number of tokens to learn from."""
    steps = [
        replace(step, settings=replace(step.settings, tokens=tokens))
        if step.name == _TRAINING
        else step
        for step in recipe.steps
    ]
    return replace(recipe, steps=tuple(steps))


def _our_command() -> str:
    """The command of mistill: its name, or its path if the shell does not find it."""
    script = Path(sys.executable).with_name("mistill")
    on_path = shutil.which("mistill")
    return "mistill" if on_path or not script.exists() else str(_short(script))


def _short(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
