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
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from mistill.errors import MistillError, RecipeError, TargetExistsError
from mistill.folders.folder import MANIFEST_FILE
from mistill.folders.lineage import fingerprint
from mistill.folders.publishing import remove_leftovers, write_atomically
from mistill.settings import settings_dict

# A step that the first process makes alone may take hours.
_PATIENCE = timedelta(days=7)

STATE_FILE = ".recipe-state.json"


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """What a table of a recipe can be.

    Attributes:
        name: The word for it, as in the command line.
        settings: Its settings class, or None for a step without settings.
        models: Keys that name a model: an earlier table, or what the command line takes.
        texts: Keys that name text.
        optional: Keys of ``models`` and ``texts`` that may be left out.
        one_of: Keys of ``optional`` of which exactly one is given.
        needs: Keys of ``optional`` that stand only beside another one, and that other one.
        output: ``folder``, or the suffix of the file that is written.
        last_file: The file of the folder without which it is unfinished; None for a folder that
            appears whole.
        together: Whether processes that one launcher has started make it together.
        run: Does the work: inputs by key, settings, the target, and whether to overwrite.
    """

    name: str
    settings: type[Any] | None
    models: tuple[str, ...]
    texts: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    needs: tuple[tuple[str, str], ...] = ()
    output: str = "folder"
    last_file: str | None = None
    together: bool = False
    run: Callable[[Mapping[str, Any], Any, Path, bool], object]


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

    @classmethod
    def read(cls, out: Path) -> _State:
        file = out / STATE_FILE
        remove_leftovers(file)
        if not file.is_file():
            return cls(file)
        try:
            return cls(file, json.loads(file.read_text("utf-8")))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RecipeError(f"{file} is damaged ({error}); remove it to start afresh") from error

    def record(self, name: str, **entry: Any) -> None:
        self.steps[name] = entry
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, json.dumps(self.steps, indent=1))


def step_kinds() -> dict[str, StepKind]:
    """All kinds of step, by name.

    Returns:
        Kinds in the order of the road.
    """
    import benchmarks
    import distill
    import export
    import quantize
    from mistill.sources.source import save_model

    def make_teacher(inputs: Mapping[str, Any], _: Any, target: Path, overwrite: bool) -> object:
        return save_model(inputs["source"], target, overwrite=overwrite)

    def make_texts(inputs: Mapping[str, Any], s: Any, target: Path, overwrite: bool) -> object:
        return distill.generate_conversations(
            inputs["teacher"], inputs["prompts"], target, settings=s, overwrite=overwrite
        )

    def make_student(inputs: Mapping[str, Any], s: Any, target: Path, overwrite: bool) -> object:
        return distill.new_student(
            inputs["teacher"], target, texts=inputs.get("texts"), settings=s, overwrite=overwrite
        )

    def train(inputs: Mapping[str, Any], s: Any, target: Path, overwrite: bool) -> object:
        return distill.train(
            inputs["student"],
            target,
            teacher=inputs.get("teacher"),
            targets=inputs.get("targets"),
            texts=inputs["texts"],
            held_out=inputs.get("held_out"),
            settings=s,
            overwrite=overwrite,
        )

    def bench(inputs: Mapping[str, Any], s: Any, target: Path, overwrite: bool) -> object:
        report = benchmarks.compare(
            inputs["models"],
            texts=inputs["texts"],
            reference=inputs.get("reference"),
            settings=s,
        )
        return report.save(target, overwrite=overwrite)

    source = ("source",)
    calibration = ("texts",)
    quantizers: tuple[tuple[str, type[Any], tuple[str, ...], Callable[..., object]], ...] = (
        ("gptq", quantize.GptqSettings, calibration, quantize.to_gptq),
        ("rounding", quantize.RoundingSettings, (), quantize.to_rounding),
        ("mixed", quantize.MixedSettings, calibration, quantize.to_mixed),
        ("nf4", quantize.Nf4Settings, (), quantize.to_nf4),
    )
    kinds = (
        StepKind(name="teacher", settings=None, models=source, run=make_teacher),
        StepKind(
            name="generate",
            settings=distill.GenerateSettings,
            models=("teacher",),
            texts=("prompts",),
            output=".jsonl",
            run=make_texts,
        ),
        StepKind(
            name="student",
            settings=distill.StudentSettings,
            models=("teacher",),
            texts=("texts",),
            optional=("texts",),
            run=make_student,
        ),
        StepKind(
            name="targets",
            settings=distill.TargetSettings,
            models=("teacher",),
            texts=("texts",),
            last_file=MANIFEST_FILE,
            together=True,
            run=_cache_targets,
        ),
        StepKind(
            name="distill",
            settings=distill.TrainSettings,
            models=("student", "teacher", "targets"),
            texts=("texts", "held_out"),
            optional=("teacher", "targets", "held_out"),
            one_of=("teacher", "targets"),
            together=True,
            run=train,
        ),
        *(
            StepKind(
                name=name,
                settings=settings,
                models=("source", "teacher"),
                texts=(*texts, "held_out"),
                optional=("teacher", "held_out"),
                needs=(("teacher", "held_out"),),
                run=_calling(make),
            )
            for name, settings, texts, make in quantizers
        ),
        StepKind(
            name="rotate",
            settings=quantize.RotationSettings,
            models=source,
            run=_calling(quantize.rotate),
        ),
        StepKind(
            name="tune",
            settings=quantize.TuningSettings,
            models=("source", "teacher"),
            texts=("texts", "held_out"),
            optional=("held_out",),
            run=_calling(quantize.tune),
        ),
        StepKind(
            name="export", settings=export.OnnxSettings, models=source, run=_calling(export.to_onnx)
        ),
        StepKind(
            name="bench",
            settings=benchmarks.BenchSettings,
            models=("models", "reference"),
            texts=("texts",),
            optional=("reference",),
            run=bench,
        ),
    )
    return {kind.name: kind for kind in kinds}


def _cache_targets(inputs: Mapping[str, Any], s: Any, target: Path, overwrite: bool) -> object:
    import distill

    return distill.cache_targets(
        inputs["teacher"], target, texts=inputs["texts"], settings=s, overwrite=overwrite
    )


def _calling(make: Callable[..., object]) -> Callable[[Mapping[str, Any], Any, Path, bool], object]:
    """Run a step whose inputs are arguments of the same names, and whose source comes first."""

    def run(inputs: Mapping[str, Any], s: Any, target: Path, overwrite: bool) -> object:
        others = {name: value for name, value in inputs.items() if name != "source"}
        return make(inputs["source"], target, **others, settings=s, overwrite=overwrite)

    return run


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
    except (IsADirectoryError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{file} is not a TOML file: {error}") from error
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    for key in document:
        if key not in tables and key != "out":
            raise RecipeError(f"{file}: {key} is not known here; only out may stand above tables")
    folder = Path(out if out is not None else document.get("out", path.stem)).absolute()
    if not tables:
        raise RecipeError(f"{file} has no steps; add a table, such as [teacher]")
    kinds = step_kinds()
    steps: list[Step] = []
    for name, table in tables.items():
        try:
            steps.append(_read_step(name, table, kinds, steps, folder, path.parent))
        except MistillError as error:
            raise RecipeError(f"{file}, [{name}]: {error}") from error
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
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and os.environ.get("RANK", "0") != "0":
        return _help(recipe)
    state = _State.read(recipe.out)
    targets = {step.name: step.target for step in recipe.steps}
    width = max(len(name) for name in targets)
    for step in recipe.steps:
        key = _key(step, targets)
        reason = _reason_to_run(step, key, state)
        ours = step.name in state.steps
        overwrite = ours and step.target.exists()
        if reason is None:
            _tell(console, f"[dim]{step.name:<{width}}  done before[/dim]")
        else:
            why = f" [dim]({escape(reason)})[/dim]" if reason else ""
            _tell(console, f"[bold]{step.name:<{width}}[/bold]  {step.kind.name}{why}")
            if step.target.exists() and not ours:
                raise TargetExistsError(
                    f"{step.target} exists and was not made by this recipe; move it away or give "
                    "another out"
                )
        if launched and step.kind.together:
            _agree((reason is not None, overwrite))
        if reason is None:
            continue
        started = dict(state.steps.get(step.name, {}), started=key)
        state.record(step.name, **started)
        step.kind.run(_inputs(step, targets), step.settings, step.target, overwrite)
        state.record(step.name, key=key, output=fingerprint(step.target))
    return targets


# --- many processes -----------------------------------------------------------------------------


def _help(recipe: Recipe) -> dict[str, Path]:
    """What all processes but the first do: join the steps that are made together.

    The first one decides what is to be done, and makes all other steps by itself.
    """
    targets = {step.name: step.target for step in recipe.steps}
    for step in recipe.steps:
        if step.kind.together:
            wanted, overwrite = _agree(None)
            if wanted:
                step.kind.run(_inputs(step, targets), step.settings, step.target, overwrite)
    return targets


def _agree(decision: tuple[bool, bool] | None) -> tuple[bool, bool]:
    """Hear the first process's decision, however long it works on something else before."""
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


def _read_step(
    name: str,
    table: Mapping[str, Any],
    kinds: Mapping[str, StepKind],
    earlier: Sequence[Step],
    out: Path,
    beside: Path,
) -> Step:
    word = table.get("step", name)
    if word not in kinds:
        raise RecipeError(f"step {word!r} is not known; known are {', '.join(kinds)}")
    kind = kinds[word]
    own = [item.name for item in fields(kind.settings)] if kind.settings else []
    for key in table:
        if key not in (*own, *kind.models, *kind.texts, "step"):
            close = difflib.get_close_matches(key, [*own, *kind.models, *kind.texts], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise RecipeError(f"{kind.name} has no {key}{hint}")
    for key in (*kind.models, *kind.texts):
        if key not in table and key not in kind.optional:
            raise RecipeError(f"{key} is missing")
    given = [key for key in kind.one_of if key in table]
    if kind.one_of and len(given) != 1:
        found = "neither is" if not given else "both are"
        raise RecipeError(f"give either {' or '.join(kind.one_of)}; {found} given")
    for key, other in kind.needs:
        if key in table and other not in table:
            raise RecipeError(f"{key} needs {other} beside it; give both or neither")
    names = [step.name for step in earlier]
    inputs = {key: _read_model(key, table[key], names) for key in kind.models if key in table}
    inputs |= {key: _read_text(table[key], names, beside) for key in kind.texts if key in table}
    options = {key: _as_tuple(table[key]) for key in own if key in table}
    suffix = "" if kind.output == "folder" else kind.output
    return Step(
        name=name,
        kind=kind,
        settings=kind.settings(**options) if kind.settings else None,
        inputs=inputs,
        target=out / f"{name}{suffix}",
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
    known = f"earlier tables are {', '.join(earlier)}" if earlier else "no table stands before"
    raise RecipeError(f"{key} = {value!r} is neither an earlier table nor a model; {known}")


def _read_text(value: Any, earlier: Sequence[str], beside: Path) -> Any:
    """Texts as strings; a relative file is looked up beside the recipe when it is not here."""
    if isinstance(value, list):
        return [_read_text(item, earlier, beside) for item in value]
    if not isinstance(value, str):
        raise RecipeError(f"text should be a name or a file, got {value!r}")
    if value in earlier or value.startswith("@") or Path(value).exists():
        return value
    return str(beside / value) if (beside / value).exists() else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


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
    if entry.get("started") == key and _made_it(step, entry):
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


def _made_it(step: Step, entry: Mapping[str, Any]) -> bool:
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


def _tell(console: Console | None, words: str) -> None:
    if console is not None:
        console.print(words)
