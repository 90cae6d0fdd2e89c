"""What a recipe would do, about how long that would take, and what it would leave on the disk.

Nothing is loaded or written. Times are those of an earlier run of the same recipe, or follow from
the arithmetic of a step and from how fast this machine multiplies matrices: they tell minutes from
hours, no more, and a busy machine counts as a slow one. Sizes follow from the number of parameters,
which a folder or a name such as Mistral-7B tells.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mistill.errors import MistillError
from mistill.folders.folder import open_folder
from mistill.progress import duration
from mistill.recipe import Recipe, Step, steps_to_run

_SIZE_IN_NAME = re.compile(r"(\d+(?:\.\d+)?)([bBmM])(?![a-zA-Z])")
_EMBEDDED = {"@smollm2": 134_515_008}
# Share of the speed of a large product that a whole step reaches, as measured in the demo.
_EFFICIENCY = 0.4
_DISK_BYTES_PER_SECOND = 100e6
# Steps whose time is not that of writing their output.
_LONG = ("bench", "generate", "supervised", "preferences", "reward", "reinforce")
_BITS = {"nf4": 4.6, "mixed": 4.9, "teacher": 32}


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """What a run would do with a step.

    Attributes:
        name: Name of the step.
        kind: What it does.
        reason: Why it runs, empty for one that never did; None if it is done and stays.
        seconds: About how long it takes; None if that is not known.
        measured: Whether that is how long it took before.
        size_bytes: About what it leaves on the disk; None if that is not known.
    """

    name: str
    kind: str
    reason: str | None
    seconds: float | None
    measured: bool
    size_bytes: float | None


def plan_recipe(recipe: Recipe, flops: float | None = None) -> list[PlannedStep]:
    """Say what a run of a recipe would do.

    Args:
        recipe: A checked recipe.
        flops: Operations a second of this machine; None measures them.

    Returns:
        Its steps in order.

    Raises:
        RecipeError: If the record of earlier runs is damaged.
    """
    planned: list[PlannedStep] = []
    parameters: dict[str, float | None] = {}
    bits: dict[str, float] = {}
    speed = flops or _flops()
    for step, reason, before in steps_to_run(recipe):
        source = _first_model(step)
        inherited = _parameters(source, parameters)
        parameters[step.name] = _own_parameters(step, inherited)
        bits[step.name] = _bits(step, bits.get(source, 32))
        size = _size(step, parameters[step.name], bits[step.name])
        work = _operations(step, parameters, inherited)
        seconds = None if work is None else work / (speed * _EFFICIENCY)
        if size is not None and seconds is None and step.kind.name not in _LONG:
            seconds = size / _DISK_BYTES_PER_SECOND
        if step.target.exists() and reason is None:
            size = 0.0
        planned.append(
            PlannedStep(
                name=step.name,
                kind=step.kind.name,
                reason=reason,
                seconds=0.0 if reason is None else before if before is not None else seconds,
                measured=before is not None,
                size_bytes=size,
            )
        )
    return planned


def describe_plan(recipe: Recipe, planned: list[PlannedStep]) -> str:
    """A plan in words.

    Args:
        recipe: The recipe.
        planned: What ``plan_recipe`` returned.

    Returns:
        A line for each step, and one for all.
    """
    width = max(len(step.name) for step in planned)
    lines = []
    for step in planned:
        if step.reason is None:
            lines.append(f"{step.name:<{width}}  done before")
            continue
        why = f" ({step.reason})" if step.reason else ""
        about = "as before " if step.measured else "about "
        estimates = [
            *([] if step.seconds is None else [f"{about}{duration(step.seconds)}"]),
            *([] if step.size_bytes is None else [_megabytes(step.size_bytes)]),
        ]
        cost = ", ".join(estimates) or "not estimated"
        lines.append(f"{step.name:<{width}}  {step.kind}{why}: {cost}")
    todo = [step for step in planned if step.reason is not None]
    seconds = sum(step.seconds or 0 for step in todo)
    size = sum(step.size_bytes or 0 for step in todo)
    unknown = [step.name for step in todo if step.seconds is None]
    place = next(place for place in (recipe.out, *recipe.out.parents) if place.exists())
    lines.append(
        f"{len(todo)} of {len(planned)} steps to run, about {duration(seconds)} on this processor"
        + (f", {', '.join(unknown)} not counted" if unknown else "")
        + f"; {_megabytes(size)} in {recipe.out}, where {_megabytes(shutil.disk_usage(place).free)}"
        " are free"
    )
    return "\n".join(lines)


def _first_model(step: Step) -> str:
    for key in ("student", "source", "model", "teacher", "models"):
        value = step.inputs.get(key)
        if isinstance(value, str):
            return value
    return str(getattr(step.settings, "source", "") or step.inputs.get("teacher", ""))


def _parameters(model: str, by_model: Mapping[str, float | None]) -> float | None:
    """Parameters of a model: of an earlier step, of a folder, or as its name says."""
    if model in by_model:
        return by_model[model]
    if model in _EMBEDDED:
        return _EMBEDDED[model]
    if Path(model).is_dir():
        try:
            return open_folder(model).parameters
        except MistillError:
            return None
    match = _SIZE_IN_NAME.search(Path(model).name)
    return None if match is None else float(match[1]) * (1e9 if match[2] in "bB" else 1e6)


def _own_parameters(step: Step, inherited: float | None) -> float | None:
    """Those of the step's output; a student of unknown size counts as its teacher."""
    count = getattr(step.settings, "parameters", None)
    return float(count) if isinstance(count, int | float) and count else inherited


def _bits(step: Step, before: float) -> float:
    name = step.kind.name
    if name in ("gptq", "rounding"):
        # A float16 scale and a zero for every group, and an embedding in more bits.
        return float(step.settings.bits) * 1.15 + 0.5
    return _BITS.get(name, before)


def _size(step: Step, parameters: float | None, bits: float) -> float | None:
    if step.kind.output != "folder" or step.kind.name in ("bench", "targets", "generate"):
        return None
    return None if parameters is None else parameters * bits / 8


def _operations(
    step: Step, parameters: Mapping[str, float | None], inherited: float | None
) -> float | None:
    """Operations of a step: two for each parameter and token read, six for each that is learned."""
    own, name, settings = parameters[step.name], step.kind.name, step.settings
    if own is None or inherited is None:
        return None
    if name == "distill":
        teacher = _parameters(str(step.inputs.get("teacher", "")), parameters) or 0.0
        return float(settings.tokens) * (6 * own + 2 * teacher)
    if name == "supervised" and settings.tokens is not None:
        return 6.0 * own * float(settings.tokens)
    if name == "tune":
        tokens = settings.steps * settings.batch_size * settings.block_length
        return 8.0 * own * float(tokens)
    if name in ("gptq", "mixed"):
        return 6.0 * own * float(settings.samples * settings.block_length)
    if name in ("student", "heal"):
        tokens = float(settings.heal_tokens if name == "student" else settings.tokens)
        return 6.0 * inherited * tokens
    return None


def _flops() -> float:
    """Operations a second of a product of matrices on this machine."""
    a = np.ones((1024, 1024), np.float32)
    a @ a
    samples = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        samples.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(samples)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
