"""The commands that make a model again, from its lineage.

Folders are named by the last part of their path, and only settings that differ from the defaults
are written. Lineages of earlier versions do not say which those are; they are then compared with
defaults that the caller hands in, or all written. Placeholders in capitals, such as TEXTS, stand
for what the lineage does not record.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from benchmarks.figures.model_result import ModelResult

#: Name of a step to the defaults of its settings; None for a step without settings.
StepDefaults = Callable[[str], Mapping[str, Any] | None]

#: Step of the lineage to the words of its command.
_WORDS = {
    "teacher": ("teacher",),
    "student": ("student",),
    "heal": ("heal",),
    "distill": ("distill",),
    **{
        step: ("quantize", step)
        for step in ("gptq", "rounding", "nf4", "rotate", "tune", "convert", "dequantize", "merge")
    },
    **{step: ("tune", step) for step in ("supervised", "preferences", "reward", "reinforce")},
    "export": ("export",),
    "gguf": ("gguf",),
}
#: What text a command needs.
_NEEDS = {
    **dict.fromkeys(("student", "heal", "distill", "gptq", "tune", "supervised"), "texts"),
    **dict.fromkeys(("preferences", "reward"), "pairs"),
    "reinforce": "prompts",
}
_INPUTS = ("teacher", "targets", "texts", "pairs", "prompts", "reward", "held_out", "other_texts")
#: Words that stand for what a lineage does not say.
_PLACEHOLDERS = ("ADAPTER", "PAIRS", "PROMPTS", "SOURCE", "TEXTS")


def commands(model: ModelResult, step_defaults: StepDefaults | None = None) -> list[str]:
    """The commands that make a model, first step first.

    Args:
        model: The result.
        step_defaults: Gives the defaults of a step, for lineages of earlier versions.

    Returns:
        One line per step; none for a folder without a lineage.
    """
    lineage = [entry for entry in model.lineage if entry.get("step") in _WORDS]
    if lineage and lineage[0].get("step") == "gguf" and len(lineage) > 1:
        lineage = lineage[1:]  # the embedded teacher was unpacked from it
    targets = _targets(lineage, model)
    return [
        _command(entry, targets[index - 1] if index else None, targets[index], step_defaults)
        for index, entry in enumerate(lineage)
    ]


def _targets(lineage: Sequence[Mapping[str, Any]], model: ModelResult) -> list[str]:
    """Names of the folders that the steps made, all different."""
    last = model.rival.source if model.rival is not None else model.name
    names = [*(_name(entry.get("source")) for entry in lineage[1:]), _name(last)][: len(lineage)]
    targets: list[str] = []
    for name in names:
        number, free = 2, name
        while free in targets:
            number, free = number + 1, f"{name}-{number}"
        targets.append(free)
    return targets


def _command(
    entry: Mapping[str, Any],
    source: str | None,
    target: str,
    step_defaults: StepDefaults | None,
) -> str:
    step = str(entry["step"])
    settings = dict(entry.get("settings") or {})
    changed = entry.get("changed_settings")
    if changed is None:
        changed = _changed(settings, step_defaults(step) if step_defaults else None)
    command = ["mistill", *_WORDS[step]]
    if step == "teacher":
        command.append(_name(settings.pop("source", None) or entry.get("source")))
    else:
        first = entry.get("hub") or entry.get("source") or entry.get("file") or "SOURCE"
        command.append(source or _name(first))
    if step == "merge":
        command.append(_name(settings.pop("adapter", "ADAPTER")))
    command.append(f"{target}.gguf" if step == "gguf" and source else target)
    if step != "teacher":
        command += _inputs(step, entry)
    command += _options({name: value for name, value in settings.items() if name in changed})
    return " ".join(map(_quoted, command))


def _inputs(step: str, entry: Mapping[str, Any]) -> list[str]:
    inputs = {name: entry.get(name) for name in _INPUTS}
    if inputs["targets"]:
        inputs["teacher"] = None
    needed = _NEEDS.get(step)
    if needed is not None and not inputs[needed]:
        inputs[needed] = needed.upper()
    if step == "gptq":
        inputs["teacher"] = None  # it only measures
    arguments = []
    for name, value in inputs.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if item:
                arguments += [_flag(name), _name(item)]
    return arguments


def _changed(settings: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> list[str]:
    """Names of the settings that differ from the defaults; all where those are not known."""
    if defaults is None:
        return list(settings)
    return [
        name for name, value in settings.items() if name in defaults and value != defaults[name]
    ]


def _options(settings: Mapping[str, Any]) -> list[str]:
    options: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, bool):
            options.append(_flag(name) if value else f"--no-{name.replace('_', '-')}")
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            options += [_flag(name), f"{item:g}" if isinstance(item, float) else str(item)]
    return options


def _quoted(word: str) -> str:
    """A word as bash reads it back, on one line, whatever is in it.

    Lineages come from anybody: no word of theirs may end a quotation, a line or a block of
    Markdown.
    """
    if word in _PLACEHOLDERS:
        return word
    if word.isprintable() and not set(word) & set("`<&"):
        return shlex.quote(word)
    letters = (
        letter if letter.isprintable() and letter not in "'\\`<&" else f"\\U{ord(letter):08x}"
        for letter in word
    )
    return f"$'{''.join(letters)}'"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _name(value: Any) -> str:
    """The last part of a path; a Hub id or a name as it is."""
    text = str(value)
    path = PurePath(text)
    name = path.name if path.is_absolute() or text.startswith((".", "~")) else text
    return f"./{name}" if name.startswith("-") else name
