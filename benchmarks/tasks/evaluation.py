"""Accuracy of a model folder on tasks: the small offline set, or published ones.

Published tasks are run by lm-evaluation-harness (https://github.com/EleutherAI/
lm-evaluation-harness), so that figures can be compared with published ones. Only the model class is
ours: it runs ONNX and quantized folders without converting them to transformers' format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from benchmarks.figures.machine import Machine, describe_machine
from benchmarks.measure.child import Worker
from benchmarks.measure.questions import answer_questions, questions_fingerprint, read_questions
from benchmarks.settings import SMOKE, EvalSettings
from mistill.cost_model.processors import usable_threads
from mistill.errors import SettingsError, TextError, missing_extra
from mistill.folders.folder import open_folder
from mistill.folders.lineage import fingerprint
from mistill.folders.locking import temporary_folder
from mistill.measures.shares import NORMAL, simple_interval
from mistill.progress import track
from mistill.settings import settings_dict, settings_from
from mistill.sources.source import resolve_model
from mistill.text.rows import first_row
from mistill.text.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.options import EvalOptions

SCHEMA = "mistill-evaluation-1"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure of one task.

    Attributes:
        task: Its name; for a kind of question of the small set ``smoke/KIND``.
        measure: The metric, such as ``acc`` or ``acc_norm``.
        value: The figure.
        interval: Its 95% confidence interval; None where it has none. Wilson's for the small set;
            plus and minus 1.96 of lm-evaluation-harness' standard errors for others.
        questions: Number of questions; None where it is not known.
        version: Version of the task, or fingerprint of the questions.
    """

    task: str
    measure: str
    value: float
    interval: tuple[float, float] | None
    questions: int | None
    version: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of one folder on tasks.

    Attributes:
        date: When it was finished, in UTC.
        model: Name of the folder.
        form: ``model``, ``gptq``, ``nf4`` or ``onnx``.
        fingerprint: A short name for the folder's content.
        settings: Tasks and their options.
        machine: The machine it ran on.
        harness: Version of lm-evaluation-harness; None if it was not used.
        scores: The figures.
    """

    date: str
    model: str
    form: str
    fingerprint: str
    settings: EvalSettings
    machine: Machine
    harness: str | None
    scores: tuple[Score, ...]

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as plain values.

        Returns:
            What a JSON document holds.
        """
        return {"schema": SCHEMA, **asdict(self), "settings": settings_dict(self.settings)}

    def table(self) -> Table:
        """The figures as a table for the terminal.

        Returns:
            A table of rich.
        """
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        table.add_column("task")
        for head in ("measure", "value", "95% interval", "questions"):
            table.add_column(head, justify="right")
        for score in self.scores:
            interval = "" if score.interval is None else "{:.3f} to {:.3f}".format(*score.interval)
            questions = "" if score.questions is None else f"{score.questions:,}"
            table.add_row(score.task, score.measure, f"{score.value:.3f}", interval, questions)
        return table


def evaluate(
    folder: str | Path, *, settings: EvalSettings | None = None, **options: Unpack[EvalOptions]
) -> Evaluation:
    """Measure a folder on tasks.

    Args:
        folder: Any model folder.
        settings: Which tasks, and how many of their questions.
        **options: Fields of ``EvalSettings``, instead of ``settings``.

    Returns:
        The figures, each with its confidence interval.

    Raises:
        SettingsError: If there is no such task.
        TextError: If a file with the questions of a task is missing or of another kind.
        MissingExtraError: If a task needs lm-evaluation-harness and it is not installed.
        FolderError: If the folder is missing or broken.
    """
    settings = settings_from(EvalSettings, settings, options)
    info = open_folder(resolve_model(folder))
    _check_files(settings.data_files)
    published = [name for name in settings.tasks if name != SMOKE]
    tasks = _published(published, settings) if published else None
    threads = settings.threads or usable_threads()
    machine = describe_machine(threads)
    scores: list[Score] = []
    if SMOKE in settings.tasks:
        scores += _smoke(info.path, settings.limit, threads)
    if tasks is not None:
        scores += _harness(info.path, tasks, settings, threads)
    return Evaluation(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        model=info.path.name,
        form=info.form,
        fingerprint=fingerprint(info.path),
        settings=settings,
        machine=machine,
        harness=version("lm_eval") if published else None,
        scores=tuple(scores),
    )


# --- the small offline set ----------------------------------------------------------------------


def _smoke(folder: Path, limit: int | None, threads: int) -> list[Score]:
    all_questions = read_questions()
    count = min(limit or len(all_questions), len(all_questions))
    questions = [
        all_questions[index * len(all_questions) // count] for index in range(count)
    ]  # evenly spaced, of every kind
    worker = Worker(folder, threads)
    worker.open()
    with track("asking", count, "questions") as tracker:
        answers = answer_questions(
            worker, questions, load_vocabulary(folder), lambda: tracker.advance()
        )
    name = questions_fingerprint(questions)[:16]
    shares = [
        (SMOKE, "acc_norm", sum(answers.outcomes()), len(questions)),
        (SMOKE, "acc", sum(answers.outcomes(normalized=False)), len(questions)),
        *(
            (f"{SMOKE}/{kind}", "acc_norm", right, total)
            for kind, (right, total) in answers.by_kind().items()
        ),
    ]
    return [
        Score(
            task=task,
            measure=measure,
            value=right / total,
            interval=simple_interval(right, total),
            questions=total,
            version=name,
        )
        for task, measure, right, total in shares
    ]


# --- lm-evaluation-harness ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Tasks:
    """Tasks of lm-evaluation-harness, found by name."""

    names: Sequence[str]
    manager: Any


def _check_files(files: Mapping[str, Path]) -> None:
    """Refuse files of questions that are missing, or no JSON by their names."""
    for task, file in files.items():
        if file.suffix not in (".json", ".jsonl"):
            raise TextError(f"{file}, for the task {task}, should end in .jsonl or .json")
        next(first_row(str(file)))


def _published(names: Sequence[str], settings: EvalSettings) -> _Tasks:
    """Find tasks by name or pattern, before anything large is loaded."""
    if find_spec("lm_eval") is None:
        raise missing_extra("lm-evaluation-harness", "eval")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=settings.include_path)
    for name in names:
        if not manager.match_tasks([name]):
            raise SettingsError(
                f"lm-evaluation-harness has no task {name}; lm_eval ls tasks lists them, and "
                f"include_path names a folder with others; {SMOKE} needs neither"
            )
    for name in settings.data_files:
        if name not in manager.all_subtasks or manager.task_index[name].yaml_path is None:
            raise SettingsError(
                f"{name} is no single task that a file describes, so that its questions cannot be "
                "read from another place; name one task in task_data"
            )
    return _Tasks(manager.match_tasks(list(names)), manager)


def _harness(folder: Path, tasks: _Tasks, settings: EvalSettings, threads: int) -> list[Score]:
    from lm_eval import simple_evaluate

    from benchmarks.harness_model import MistillLM

    with temporary_folder() as scratch:
        moved = {
            name: _with_data(tasks.manager.task_index[name].yaml_path, file, scratch / name)
            for name, file in settings.data_files.items()
        }
        results = simple_evaluate(
            model=MistillLM(folder, threads, settings.seed),
            tasks=[str(moved.get(name, name)) for name in tasks.names],
            task_manager=tasks.manager,
            limit=settings.limit,
            num_fewshot=settings.few_shot,
            apply_chat_template=settings.chat_template,
            log_samples=False,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    return [
        score
        for task, figures in results["results"].items()
        for score in _scores(task, figures, results)
    ]


def _with_data(task: Path, file: Path, folder: Path) -> Path:
    """A task that reads a local file whichever split it asks for, and is otherwise another one."""
    folder.mkdir()
    described = {
        "include": str(task),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": dict.fromkeys(("train", "validation", "test"), str(file.absolute()))
        },
    }
    # JSON is YAML.
    task_file = folder / task.name
    task_file.write_text(json.dumps(described), "utf-8")
    return task_file


def _scores(task: str, figures: Mapping[str, Any], results: Mapping[str, Any]) -> list[Score]:
    """The figures of a task, each with its standard error as interval."""
    scores = []
    questions = results.get("n-samples", {}).get(task, {}).get("effective")
    for name, value in figures.items():
        measure, _, way = name.partition(",")
        if not way or measure.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = figures.get(f"{measure}_stderr,{way}")
        interval = None
        if isinstance(error, int | float) and math.isfinite(error):
            interval = value - NORMAL * error, value + NORMAL * error
        scores.append(
            Score(
                task=task,
                measure=measure if way == "none" else f"{measure} ({way})",
                value=float(value),
                interval=interval,
                questions=questions,
                version=str(results.get("versions", {}).get(task, "")),
            )
        )
    return scores
