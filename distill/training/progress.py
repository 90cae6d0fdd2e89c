"""How far a distillation run has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distill.training.evaluation import Evaluation


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

    def to_dict(self) -> dict[str, Any]:
        """The same as a JSON document, which checkpoints hold.

        Returns:
            Names and plain values.
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingProgress:
        """Read what ``to_dict`` wrote.

        Args:
            values: Names and plain values.

        Returns:
            How far a run had come.
        """
        judged = {name: Evaluation(**values[name]) for name in ("before", "best", "last")}
        return cls(**{**values, **judged})
