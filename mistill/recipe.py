"""A recipe: a TOML file that says a whole road, run or resumed.

``out`` names the folder for all outputs. Every table is a step: its name is the name of its
output, ``step`` its kind (the table's own name if not given), the other keys are the step's inputs
and the fields of its settings class. Where a model is wanted, the name of an earlier table may
stand, or anything that the command line takes.

    out = "road"

    [teacher]
    source = "@smollm2"

    [pruned]
    step = "student"
    teacher = "teacher"
    texts = "@demo-train"
    layers = 22

What was done is remembered in ``.recipe-state.json`` beside the outputs: for each step its
settings, the fingerprints of what it read and of what it wrote. A step whose record still holds is
skipped; any other is redone, and the reason is said. A step that is interrupted resumes where it
can, and a killed one leaves either its whole output or none.

It is one file because a recipe, its record and the rules by which a step is redone go together.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from mistill.errors import MistillError, RecipeError, TargetExistsError
from mistill.folders.lineage import fingerprint
from mistill.folders.publishing import write_json
from mistill.folders.renaming import remove_leftovers
from mistill.settings import environment_number, settings_dict, typed_options
from mistill.shown import visible
from mistill.step_kind import StepKind

# Packages whose module recipe_steps says what steps they make.
_HOMES = ("mistill.sources", "tune", "distill", "quantize", "export", "benchmarks")

# A step that the first process makes alone may take hours.
_PATIENCE = timedelta(days=7)

STATE_FILE = ".recipe-state.json"

_LONGEST_NAME = 100


@dataclass(frozen=True, kw_only=True)
class Step:
    """One table of a recipe, checked.

    Attributes:
        name: Name of the table and of the output.
        kind: What it does.
        settings: An object of the kind's settings class, or None.
        inputs: Models and texts by key, as written in the recipe.
        target: Where its output appears.
    """

    name: str
    kind: StepKind
    settings: Any
    inputs: Mapping[str, Any]
    target: Path


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked recipe.

    Attributes:
        source: The TOML file.
        out: The folder for all outputs.
        steps: The steps in the order of the file.
    """

    source: Path
    out: Path
    steps: tuple[Step, ...]


@dataclass
class _State:
    """What is remembered of the steps that were started and finished."""

    file: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    # Whether nothing is to be written.
    look_only: bool = False

    @classmethod
    def read(cls, out: Path, *, look_only: bool = False) -> _State:
        file = out / STATE_FILE
        if look_only and not file.is_file():
            return cls(file, look_only=True)
        if not look_only:
            remove_leftovers(file)
        if not file.is_file():
            return cls(file)
        try:
            return cls(file, _checked_state(json.loads(file.read_text("utf-8"))), look_only)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{file} is damaged ({error}); remove it to start afresh") from error

    def record(self, name: str, **entry: Any) -> None:
        if self.look_only:
            return
        self.steps[name] = entry
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.steps, indent=1)


def _checked_state(document: Any) -> dict[str, dict[str, Any]]:
    """A state from a file that anybody may have written; a ValueError says why it is none."""
    if not isinstance(document, dict):
        raise ValueError("it should be an object with an entry for each step")
    for name, entry in document.items():
        if not isinstance(entry, dict) or not entry.keys() <= {
            *("started", "key", "output", "seconds")
        }:
            raise ValueError(f"the entry of {name!r:.40} is not that of a step")
        if type(entry.get("seconds", 0.0)) not in (int, float):
            raise ValueError(f"the entry of {name!r:.40} has no number of seconds")
        for note in ("started", "key"):
            key = entry.get(note)
            if key is not None and not (
                isinstance(key, dict)
                and isinstance(key.get("step"), str)
                and (note == "started" or isinstance(key.get("settings"), dict))
                and (note == "started" or isinstance(key.get("inputs"), dict))
            ):
                raise ValueError(f"the entry of {name!r:.40} does not say what was made")
        if "key" in entry and not isinstance(entry.get("output"), str):
            raise ValueError(f"the entry of {name!r:.40} has no fingerprint of its output")
    return document


def step_kinds() -> dict[str, StepKind]:
    """All kinds of step, by name.

    Returns:
        Kinds in the order in which a recipe usually has them.
    """
    modules = [importlib.import_module(f"{home}.recipe_steps") for home in _HOMES]
    return {kind.name: kind for module in modules for kind in module.KINDS}


def read_recipe(file: str | Path, out: str | Path | None = None) -> Recipe:
    """Read and check a whole recipe, before any step runs.

    Args:
        file: The TOML file.
        out: The folder for all outputs; the recipe's own ``out``, relative to where the command
            runs, if None.

    Returns:
        The recipe.

    Raises:
        RecipeError: If a table or a key is not known, a setting is out of range, or an input is
            missing.
    """
    path = Path(file).expanduser()
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{file} is missing; give a TOML file with a table per step") from error
    except RecursionError as error:
        raise RecipeError(f"{file} is not a TOML file: it is nested too deeply") from error
    except (IsADirectoryError, ValueError) as error:
        raise RecipeError(f"{file} is not a TOML file: {error}") from error
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    for key in document:
        if key not in tables and key != "out":
            raise RecipeError(f"{file}: {key} is not known here; only out may stand above tables")
    own_out = document.get("out", path.stem)
    if not isinstance(own_out, str) or not own_out.isprintable():
        raise RecipeError(f"{file}: out should be the path of a folder, got {own_out!r:.80}")
    folder = Path(out if out is not None else own_out).absolute()
    if not tables:
        raise RecipeError(f"{file} has no steps; add a table, such as [teacher]")
    kinds = step_kinds()
    steps: list[Step] = []
    for name, table in tables.items():
        try:
            steps.append(_read_step(name, table, kinds, steps, folder, path.parent))
        except MistillError as error:
            printable = name if name.isprintable() else repr(name)
            raise RecipeError(f"{file}, [{printable:.80}]: {error}") from error
    return Recipe(source=path, out=folder, steps=tuple(steps))


def run_recipe(recipe: Recipe, console: Console | None = None) -> dict[str, Path]:
    """Run a recipe: skip what is done, redo what changed and what depends on it.

    Under ``accelerate launch`` or torchrun all processes run the same recipe: they distil and cache
    targets together, and the first one makes the other steps.

    Args:
        recipe: A checked recipe.
        console: Where to say what is done; silent if None.

    Returns:
        Outputs by the name of their step.

    Raises:
        TargetExistsError: If an output exists that no run of this recipe has made.
    """
    launched = environment_number("WORLD_SIZE", 1, 1) > 1
    if launched and os.environ.get("RANK", "0") != "0":
        return _join_shared_steps(recipe)
    state = _State.read(recipe.out)
    targets = {step.name: step.target for step in recipe.steps}
    width = max(len(name) for name in targets)
    for step in recipe.steps:
        key = _key(step, targets)
        reason = _reason_to_run(step, key, state)
        ours = step.name in state.steps
        overwrite = ours
        if reason is None:
            _print(console, f"[dim]{escape(step.name):<{width}}  done before[/dim]")
        else:
            why = f" [dim]({escape(reason)})[/dim]" if reason else ""
            _print(console, f"[bold]{escape(step.name):<{width}}[/bold]  {step.kind.name}{why}")
            if step.target.exists() and not ours:
                raise TargetExistsError(
                    f"{step.target} exists and was not made by this recipe; move it away or give "
                    "another out"
                )
        if launched and step.kind.together:
            _share_decision((reason is not None, overwrite))
        if reason is None:
            continue
        started = dict(state.steps.get(step.name, {}), started=key)
        state.record(step.name, **started)
        began = time.monotonic()
        step.kind.run(_inputs(step, targets), step.settings, step.target, overwrite)
        seconds = round(time.monotonic() - began, 1)
        state.record(step.name, key=key, output=fingerprint(step.target), seconds=seconds)
    return targets


def steps_to_run(recipe: Recipe) -> Iterator[tuple[Step, str | None, float | None]]:
    """Which steps a run would make, without making any.

    Args:
        recipe: A checked recipe.

    Yields:
        Each step, why it would run (empty if it never did, None if it would not), and how many
        seconds it took the last time, if that is known.

    Raises:
        RecipeError: If the record of earlier runs is damaged.
    """
    state = _State.read(recipe.out, look_only=True)
    targets = {step.name: step.target for step in recipe.steps}
    remade: set[str] = set()
    for step in recipe.steps:
        inputs = [
            name
            for value in step.inputs.values()
            for name in (value if isinstance(value, list) else [value])
        ]
        changed = [name for name in inputs if name in remade]
        if changed and step.name in state.steps:
            reason: str | None = f"{', '.join(changed)} will be another"
        elif changed:
            reason = ""
        else:
            reason = _reason_to_run(step, _key(step, targets), state)
        if reason is not None:
            remade.add(step.name)
        seconds = state.steps.get(step.name, {}).get("seconds")
        yield step, reason, seconds


# --- many processes -----------------------------------------------------------------------------


def _join_shared_steps(recipe: Recipe) -> dict[str, Path]:
    """What every process but the first does: take part in the steps that are made together.

    The first process decides which steps are to be made, and makes all others by itself.
    """
    targets = {step.name: step.target for step in recipe.steps}
    for step in recipe.steps:
        if step.kind.together:
            is_due, overwrite = _share_decision(None)
            if is_due:
                step.kind.run(_inputs(step, targets), step.settings, step.target, overwrite)
    return targets


def _share_decision(decision: tuple[bool, bool] | None) -> tuple[bool, bool]:
    """The first process's decision, in all processes; they wait for it for up to a week."""
    from accelerate.utils import broadcast_object_list

    from mistill.training.processes import this_process

    this_process(_PATIENCE)
    box = [decision]
    broadcast_object_list(box, from_process=0)
    assert box[0] is not None
    return box[0]


def _inputs(step: Step, targets: Mapping[str, Path]) -> dict[str, Any]:
    return {name: _resolve(value, targets) for name, value in step.inputs.items()}


# --- reading ------------------------------------------------------------------------------------


def _check_keys(kind: StepKind, setting_names: Sequence[str], table: Mapping[str, Any]) -> None:
    """Refuse a table with a key that is not known or may not stand there, or without one."""
    for key in table:
        if key not in (*setting_names, *kind.models, *kind.texts, "step"):
            close = difflib.get_close_matches(key, [*setting_names, *kind.models, *kind.texts], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise RecipeError(f"{kind.name} has no {key}{hint}")
    for key in kind.by_hand:
        if key in table:
            raise RecipeError(
                f"{key} names code to import, and a recipe does not decide what runs; give it to "
                f"the command or the Python function of {kind.name} yourself"
            )
    for key in (*kind.models, *kind.texts):
        if key not in table and key not in kind.optional:
            raise RecipeError(f"{key} is missing")
    present = [key for key in kind.one_of if key in table]
    if kind.one_of and len(present) != 1:
        count = "neither is" if not present else "both are"
        raise RecipeError(f"give either {' or '.join(kind.one_of)}; {count} given")
    for key, other in kind.needs:
        if key in table and other not in table:
            raise RecipeError(f"{key} needs {other} beside it; give both or neither")


def _read_step(
    name: str,
    table: Mapping[str, Any],
    kinds: Mapping[str, StepKind],
    earlier: Sequence[Step],
    out: Path,
    beside: Path,
) -> Step:
    _check_name(name)
    kind_name = table.get("step", name)
    if not isinstance(kind_name, str):
        raise RecipeError(f"step should be a name, got {kind_name!r:.80}")
    if kind_name not in kinds:
        raise RecipeError(f"step {kind_name!r} is not known; known are {', '.join(kinds)}")
    kind = kinds[kind_name]
    setting_names = [item.name for item in fields(kind.settings)] if kind.settings else []
    _check_keys(kind, setting_names, table)
    names = [step.name for step in earlier]
    inputs = {key: _read_model(key, table[key], names) for key in kind.models if key in table}
    inputs |= {key: _read_text(table[key], names, beside) for key in kind.texts if key in table}
    options = {key: table[key] for key in setting_names if key in table}
    suffix = "" if kind.output == "folder" else kind.output
    return Step(
        name=name,
        kind=kind,
        settings=kind.settings(**typed_options(kind.settings, options)) if kind.settings else None,
        inputs=inputs,
        target=out / f"{name}{suffix}",
    )


def _check_name(name: str) -> None:
    """Refuse a table whose name is not the plain name of a file in the recipe's folder."""
    plain = 0 < len(name) <= _LONGEST_NAME and name.isprintable() and not name.startswith(".")
    if not plain or set(name) & set("/\\:"):
        raise RecipeError(
            f"the name of a table is that of its output: 1 to {_LONGEST_NAME} printable characters "
            f"without / \\ and :, and no dot at the start; got {name[:80]!r}"
        )


def _read_model(key: str, value: Any, earlier: Sequence[str]) -> Any:
    """Check a model that a step names; a plain word must be an earlier table or a path."""
    if isinstance(value, list):
        if key != "models" or not value:
            raise RecipeError(f"{key} should be one name, got {value!r}")
        return [_read_model(key, item, earlier) for item in value]
    if not isinstance(value, str):
        raise RecipeError(f"{key} should be a name, got {value!r}")
    if value in earlier or value.startswith("@") or "/" in value or Path(value).exists():
        return value
    hint = f"earlier tables are {', '.join(earlier)}" if earlier else "no table stands before"
    raise RecipeError(f"{key} = {value!r} is neither an earlier table nor a model; {hint}")


def _read_text(value: Any, earlier: Sequence[str], beside: Path) -> Any:
    """Texts as strings; a relative file is looked up beside the recipe when it is not here."""
    if isinstance(value, list):
        for item in value:
            if not isinstance(item, str):
                raise RecipeError(f"text should be a name or a file, got a {type(item).__name__}")
        return [_read_text(item, earlier, beside) for item in value]
    if not isinstance(value, str):
        raise RecipeError(f"text should be a name or a file, got {value!r:.80}")
    if value in earlier or value.startswith("@") or Path(value).exists():
        return value
    return str(beside / value) if (beside / value).exists() else value


def _resolve(value: Any, targets: Mapping[str, Path]) -> Any:
    if isinstance(value, list):
        return [_resolve(item, targets) for item in value]
    return targets.get(value, value)


def _key(step: Step, targets: Mapping[str, Path]) -> dict[str, Any]:
    """What a step's output depends on: its settings, and what its inputs hold."""

    def content(value: Any) -> Any:
        if isinstance(value, list):
            return [content(item) for item in value]
        path = Path(_resolve(value, targets))
        return fingerprint(path) if path.exists() else str(value)

    return {
        "step": step.kind.name,
        "settings": {} if step.settings is None else settings_dict(step.settings),
        "inputs": {name: content(value) for name, value in step.inputs.items()},
    }


def _reason_to_run(step: Step, key: Mapping[str, Any], state: _State) -> str | None:
    """Why a step must run, in words; empty if it never did, None if its output still holds."""
    entry = state.steps.get(step.name)
    if entry is None:
        return ""
    if not step.target.exists():
        return "" if "key" not in entry else "its output is gone"
    if step.kind.last_file is not None and not (step.target / step.kind.last_file).exists():
        return "it was interrupted"
    if entry.get("started") == key and _had_finished(step, entry):
        # Killed between the renaming of the output and the note that it was finished.
        state.record(step.name, key=dict(key), output=fingerprint(step.target))
        return None
    recorded = entry.get("key")
    if recorded is None:
        return "it was interrupted"
    changes = _changes(recorded, key)
    if changes:
        return changes
    if entry["output"] != fingerprint(step.target):
        return "its output was changed"
    return None


def _had_finished(step: Step, entry: Mapping[str, Any]) -> bool:
    """Whether a run that was killed had finished its output, which appears whole or not at all.

    Before the first run nothing stood there; before a later one, the output on record did.
    """
    return "output" not in entry or entry["output"] != fingerprint(step.target)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if old["step"] != new["step"]:
        return f"step changed from {old['step']} to {new['step']}"
    words = [
        f"{name} changed from {old['settings'].get(name)!r} to {value!r}"
        for name, value in new["settings"].items()
        if old["settings"].get(name) != value
    ]
    words += [
        f"its {name} changed"
        for name, value in new["inputs"].items()
        if old["inputs"].get(name) != value
    ]
    words += [f"its {name} is no longer given" for name in old["inputs"].keys() - new["inputs"]]
    return ", ".join(words)


def _print(console: Console | None, words: str) -> None:
    if console is not None:
        console.print(visible(words))
