"""What a model may cost, checked: for a build that fails when a model has become too large.

The reference and the engines of others are what the models are held against, so a budget is not
theirs unless it names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from benchmarks.figures.column import MEGABYTE, significant
from benchmarks.figures.comparison import Comparison
from benchmarks.figures.model_result import ModelResult
from benchmarks.settings import Budget
from mistill.errors import SettingsError
from mistill.settings import settings_from


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A limit that a model does not keep.

    Attributes:
        model: Its name.
        limit: Which one, by its name in ``Budget``.
        allowed: The limit.
        found: What was measured.
    """

    model: str
    limit: str
    allowed: float
    found: float

    def __str__(self) -> str:
        """One line that says who missed what by how much."""
        what, unit = _WORDS[self.limit]
        side = "below" if self.found < self.allowed else "above"
        return (
            f"{self.model} {what} {_number(self.found)} {unit}: "
            f"{_number(abs(self.found - self.allowed))} {side} {self.limit} {self.allowed:g}"
        )


_WORDS = {
    "max_kl": ("has a KL of", "nats"),
    "min_tps": ("writes", "tokens/s"),
    "max_mb": ("takes", "MB on disk"),
    "max_memory_mb": ("takes", "MB of memory"),
}


def _number(value: float) -> str:
    """Enough digits to tell a narrow miss from none."""
    return f"{value:,.1f}" if value >= 100 else significant(value)


def measured(model: ModelResult) -> dict[str, float]:
    """What a budget can limit, of one model.

    Args:
        model: The result.

    Returns:
        Figures by the name of their limit.
    """
    return {
        "max_kl": model.mean_kl,
        "min_tps": model.latency.decode_tokens_per_second,
        "max_mb": model.footprint.weight_bytes / MEGABYTE,
        "max_memory_mb": model.footprint.peak_memory_bytes / MEGABYTE,
    }


def bound_models(comparison: Comparison, budget: Budget) -> tuple[ModelResult, ...]:
    """The models that must keep to a budget.

    Args:
        comparison: The result.
        budget: The budget.

    Returns:
        Those that it names; else all but the reference and other engines, or all if no other was
        measured.

    Raises:
        SettingsError: If it names a model that was not measured.
    """
    if budget.budget_for:
        names = find_names(budget.budget_for, [model.name for model in comparison.models])
        return tuple(comparison[name] for name in names)
    ours = [model for model in comparison.models if model.rival is None]
    others = [model for model in ours if model.name != comparison.reference]
    return tuple(others or ours or comparison.models)


def find_names(asked: Sequence[str], known: Sequence[str]) -> list[str]:
    """The models that are meant.

    Args:
        asked: Names as in the report, or paths that end with one.
        known: The names in the report.

    Returns:
        Names in the report.

    Raises:
        SettingsError: If a model is not known.
    """
    found = []
    for name in asked:
        parts = PurePath(name).parts
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        match = next((end for end in [name, *ends] if end in known), None)
        if match is None:
            raise SettingsError(
                f"budget_for names {name}, which is not compared; compared are {', '.join(known)}"
            )
        found.append(match)
    return found


def misses(
    report: Comparison | str | Path, budget: Budget | None = None, **options: Any
) -> tuple[Miss, ...]:
    """Every limit that a model does not keep.

    A limit itself is allowed. What is held against it is the figure of the report, a mean or a
    median, without its spread.

    Args:
        report: A comparison, the folder of its report, or its ``report.json``.
        budget: What every model must keep to.
        **options: Fields of ``Budget``, instead of ``budget``.

    Returns:
        The misses, model by model; none if the budget is met.

    Raises:
        SettingsError: If it names a model that was not measured.
        FolderError: If the report is missing or broken.
    """
    budget = settings_from(Budget, budget, options)
    comparison = report if isinstance(report, Comparison) else Comparison.from_file(report)
    found = []
    for model in bound_models(comparison, budget):
        for limit, value in measured(model).items():
            allowed = getattr(budget, limit)
            if allowed is None:
                continue
            if value < allowed if limit.startswith("min") else value > allowed:
                found.append(Miss(model=model.name, limit=limit, allowed=allowed, found=value))
    return tuple(found)
