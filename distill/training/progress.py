"""The state of a run on disk: whole or not there, and all that the next bits depend on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.training.evaluation import Evaluation
from mistill.folders.publishing import write_atomically

if TYPE_CHECKING:
    pass

_END_FILE = "end.json"
_PROGRESS_FILE = "progress.json"


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """How far a run has come.

    Attributes:
        step: Optimizer steps done.
        tokens: Text tokens trained on, padding not counted.
        positions: Kept positions among them, which the loss is a mean over.
        seconds: Time spent, evaluations and checkpoints included, interruptions not.
        before: The student as it came.
        best: The best student so far; as it came, if none was better.
        best_step: The step after which it was; 0 if none was better.
        last: The student when it was last judged.
    """

    step: int
    tokens: int
    positions: int
    seconds: float
    before: Evaluation
    best: Evaluation
    best_step: int
    last: Evaluation


def record_end(work: Path, progress: TrainingProgress) -> None:
    """Note that a run has come to its end, so that it is not run again.

    Args:
        work: The folder of the run.
        progress: Its end.
    """
    write_atomically(work / _END_FILE, json.dumps(asdict(progress)))


def recorded_end(work: Path) -> TrainingProgress | None:
    """The end of a run that came to it before an interruption.

    Args:
        work: The folder of the run.

    Returns:
        Its end, or None if it has not come to it.
    """
    file = work / _END_FILE
    return _read_progress(file) if file.exists() else None


def _read_progress(file: Path) -> TrainingProgress:
    values: dict[str, Any] = json.loads(file.read_text("utf-8"))
    for name in ("before", "best", "last"):
        values[name] = Evaluation(**values[name])
    return TrainingProgress(**values)
