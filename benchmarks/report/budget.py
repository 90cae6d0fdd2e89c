"""Limits on what a model may cost, for a build that fails when a model has become too large.

The limits do not apply to the reference and to other engines, with which the models are compared,
unless the budget names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Unpack

from benchmarks.figures.column import MEGABYTE, significant
from benchmarks.figures.comparison import Comparison
from benchmarks.figures.model_result import ModelResult
from benchmarks.settings import Budget
from mistill.errors import SettingsError
from mistill.settings import settings_from

if TYPE_CHECKING:
    from benchmarks.options import BudgetOptions


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A limit that a model does not meet.

    Attributes:
        model: Name of the model.
        limit: Name of the limit in ``Budget``.
        allowed: The limit.
        found: The measured figure.
    """

    model: str
    limit: str
    allowed: float
    found: float

    def __str__(self) -> str:
        """One line with the figure, the limit and the difference."""
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
    """Enough digits to show a narrow miss."""
    return f"{value:,.1f}" if value >= 100 else significant(value)


def limited_figures(model: ModelResult) -> dict[str, float]:
    """The figures of one model that a budget can limit.

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
    """The models that a budget applies to.

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


def find_names(requested: Sequence[str], known_names: Sequence[str]) -> list[str]:
    """Find models by name.

    Args:
        requested: Names as in the report, or paths that end with one.
        known_names: The names in the report.

    Returns:
        Names in the report.

    Raises:
        SettingsError: If a model is not known.
    """
    names = []
    for name in requested:
        parts = PurePath(name).parts
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        match = next((end for end in [name, *ends] if end in known_names), None)
        if match is None:
            raise SettingsError(
                f"budget_for names {name}, which is not compared; the models are "
                f"{', '.join(known_names)}"
            )
        names.append(match)
    return names


def misses(
    report: Comparison | str | Path, budget: Budget | None = None, **options: Unpack[BudgetOptions]
) -> tuple[Miss, ...]:
    """Every limit that a model does not meet.

    A figure equal to its limit meets it. The figure is the mean or median in the report, without
    its uncertainty.

    Args:
        report: A comparison, the folder of its report, or its ``report.json``.
        budget: The limits.
        **options: Fields of ``Budget``, instead of ``budget``.

    Returns:
        The limits not met, model by model; none if the budget is met.

    Raises:
        SettingsError: If it names a model that was not measured.
        FolderError: If the report is missing or broken.
    """
    budget = settings_from(Budget, budget, options)
    comparison = report if isinstance(report, Comparison) else Comparison.from_file(report)
    missed = []
    for model in bound_models(comparison, budget):
        for limit, value in limited_figures(model).items():
            allowed = getattr(budget, limit)
            if allowed is None:
                continue
            if value < allowed if limit.startswith("min") else value > allowed:
                missed.append(Miss(model=model.name, limit=limit, allowed=allowed, found=value))
    return tuple(missed)
