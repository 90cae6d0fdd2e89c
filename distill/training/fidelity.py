"""The fidelity card: how faithful a student is, and what its teacher was good for.

A student that was trained has also seen more text. So its card sets beside it a twin that began
with the same weights and learnt from the text alone, by plain cross-entropy: once for as many
tokens, and once for as much time, since a training step without a teacher is quicker. Only what
the student is better than both at is the teacher's doing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distill.training.evaluation import Evaluation
from mistill.folders.folder import FIDELITY_FILE
from mistill.folders.publishing import write_json

if TYPE_CHECKING:
    from distill.settings import TrainSettings
    from mistill.training.progress import TrainingProgress


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A student after a training run.

    Attributes:
        tokens: Text tokens it was trained on.
        seconds: Time that took.
        held_out: What it is worth.
    """

    tokens: int
    seconds: float
    held_out: Evaluation


@dataclass(frozen=True, kw_only=True)
class FidelityCard:
    """How faithful a student is to its teacher, on held-out text.

    Attributes:
        teacher: Name of the teacher.
        before: The student as it came.
        student: The student as it is.
        twin_of_equal_tokens: One that learnt from the text alone for as many tokens; None where
            it was not asked for.
        twin_of_equal_time: One that did for as much time.
    """

    teacher: str
    before: Evaluation
    student: Trained
    twin_of_equal_tokens: Trained | None = None
    twin_of_equal_time: Trained | None = None

    def save(self, folder: Path) -> None:
        """Write the card into the folder of a student.

        Args:
            folder: The folder.
        """
        write_json(folder / FIDELITY_FILE, asdict(self), indent=1)


def trained(progress: TrainingProgress[Evaluation]) -> Trained:
    """What a training run came to.

    Args:
        progress: Its end.

    Returns:
        The best student that it found.
    """
    return Trained(
        tokens=progress.tokens, seconds=round(progress.seconds, 3), held_out=progress.best
    )


def twin_settings(
    settings: TrainSettings,
    student: TrainingProgress[Evaluation],
    equal_tokens: TrainingProgress[Evaluation] | None,
) -> TrainSettings:
    """How a twin is trained.

    Args:
        settings: How the student was.
        student: How its training ended.
        equal_tokens: How the training of the twin of equal tokens ended; None to get that one's
            settings, the twin of equal time else: its schedule is as much longer as its steps
            were quicker.

    Returns:
        The same settings with nothing but the text to learn from.
    """
    alone = replace(
        settings, cross_entropy=1.0, on_policy=0.0, divergence="forward_kl", trackers=(), twin=False
    )
    if equal_tokens is None:
        return alone
    quicker = student.seconds / max(equal_tokens.seconds, 1e-9)
    return replace(alone, tokens=max(1, round(settings.tokens * quicker)))
