"""How far a training run has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

EvaluationT = TypeVar("EvaluationT")


@dataclass(frozen=True, kw_only=True)
class TrainingProgress(Generic[EvaluationT]):
    """How far a run has come; an evaluation is a dataclass of plain values.

    Attributes:
        step: Optimizer steps done.
        tokens: Text tokens trained on, padding not counted.
        positions: Kept positions among them, which the loss is a mean over.
        seconds: Time spent, evaluations and checkpoints included, interruptions not.
        before: The model as it came.
        best: The best model so far; as it came, if none was better.
        best_step: The step after which it was; 0 if none was better.
        last: The model when it was last judged.
    """

    step: int
    tokens: int
    positions: int
    seconds: float
    before: EvaluationT
    best: EvaluationT
    best_step: int
    last: EvaluationT

    def to_dict(self) -> dict[str, Any]:
        """The same as a JSON document, which checkpoints hold.

        Returns:
            Names and plain values.
        """
        return asdict(self)

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], evaluation: type[EvaluationT]
    ) -> TrainingProgress[EvaluationT]:
        """Read what ``to_dict`` wrote.

        Args:
            values: Names and plain values.
            evaluation: The dataclass of an evaluation.

        Returns:
            How far a run had come.
        """
        judged = {name: evaluation(**values[name]) for name in ("before", "best", "last")}
        return cls(**{**values, **judged})
