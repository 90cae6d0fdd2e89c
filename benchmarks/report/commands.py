"""The commands that make a model again, from its lineage.

Folders are called by their last names, and only settings that differ from the defaults are
written; lineages of before those were noted give all of their settings. What the lineage does not
tell, such as the text that a student learnt from, is written in capitals.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from benchmarks.figures.model_result import ModelResult

#: Step of the lineage to the words of its command.
_WORDS = {
    "teacher": ("teacher",),
    "student": ("student",),
    "distill": ("distill",),
    **{
        step: ("quantize", step)
        for step in ("gptq", "rounding", "nf4", "rotate", "tune", "convert", "dequantize", "merge")
    },
    "export": ("export",),
    "gguf": ("gguf",),
}
#: Which commands cannot do without text.
_NEED_TEXTS = ("student", "distill", "gptq", "tune")
_INPUTS = ("teacher", "targets", "texts", "held_out")


def commands(model: ModelResult) -> list[str]:
    """The commands that make a model, first step first.

    Args:
        model: The result.

    Returns:
        One line per step; none for a folder without a lineage.
    """
    lineage = [entry for entry in model.lineage if entry.get("step") in _WORDS]
    if lineage and lineage[0].get("step") == "gguf" and len(lineage) > 1:
        lineage = lineage[1:]  # the embedded teacher was unpacked on the way
    targets = _targets(lineage, model)
    return [
        _command(entry, targets[place - 1] if place else None, targets[place])
        for place, entry in enumerate(lineage)
    ]


def _targets(lineage: Sequence[Mapping[str, Any]], model: ModelResult) -> list[str]:
    """The name of what each step made: what the next one read, all different."""
    last = model.rival.source if model.rival is not None else model.name
    names = [*(_name(entry.get("source")) for entry in lineage[1:]), _name(last)][: len(lineage)]
    taken: list[str] = []
    for name in names:
        number, free = 2, name
        while free in taken:
            number, free = number + 1, f"{name}-{number}"
        taken.append(free)
    return taken


def _command(entry: Mapping[str, Any], source: str | None, target: str) -> str:
    step = str(entry["step"])
    settings = dict(entry.get("settings") or {})
    changed = entry.get("changed_settings", settings)
    words = ["mistill", *_WORDS[step]]
    if step == "teacher":
        words.append(_name(settings.pop("source", None) or entry.get("source")))
    else:
        words.append(source or _name(entry.get("source") or entry.get("file") or "SOURCE"))
    if step == "merge":
        words.append(_name(settings.pop("adapter", "ADAPTER")))
    words.append(f"{target}.gguf" if step == "gguf" and source else target)
    if step != "teacher":
        words += _inputs(step, entry)
    words += _options({name: value for name, value in settings.items() if name in changed})
    return " ".join(word if word.isupper() else shlex.quote(word) for word in words)


def _inputs(step: str, entry: Mapping[str, Any]) -> list[str]:
    given = {name: entry.get(name) for name in _INPUTS}
    if given["targets"]:
        given["teacher"] = None
    if step in _NEED_TEXTS and not given["texts"]:
        given["texts"] = "TEXTS"
    if step == "gptq":
        given["teacher"] = None  # it only measures
    words = []
    for name, value in given.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if item:
                words += [_flag(name), _name(item)]
    return words


def _options(settings: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(_flag(name) if value else f"--no-{name.replace('_', '-')}")
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            words += [_flag(name), f"{item:g}" if isinstance(item, float) else str(item)]
    return words


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _name(value: Any) -> str:
    """The last part of a path; a Hub id or a name as it is."""
    text = str(value)
    path = PurePath(text)
    return path.name if path.is_absolute() or text.startswith((".", "~")) else text
