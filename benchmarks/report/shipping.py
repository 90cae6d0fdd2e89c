"""Which model to ship: the closest to the reference that fits.

Of the models that fit into the memory and write fast enough, the closest to the reference is
chosen; of those that are equally close, the one with the least memory. The script of the page uses
the same rule.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from benchmarks.figures.column import MEGABYTE, significant
from benchmarks.figures.comparison import Comparison
from benchmarks.figures.frontier import SAME_NATS, SAME_RATIO
from benchmarks.figures.model_result import ModelResult
from benchmarks.settings import ShipSettings
from mistill.settings import settings_from

if TYPE_CHECKING:
    from benchmarks.options import ShipOptions


def best_to_ship(
    report: Comparison | str | Path,
    question: ShipSettings | None = None,
    **options: Unpack[ShipOptions],
) -> ModelResult | None:
    """The closest model that fits.

    Args:
        report: A comparison, the folder of its report, or its ``report.json``.
        question: Memory and speed that the model must meet.
        **options: Fields of ``ShipSettings``, instead of ``question``.

    Returns:
        The model; None if none fits.

    Raises:
        FolderError: If the report is missing or broken.
    """
    question = settings_from(ShipSettings, question, options)
    comparison = report if isinstance(report, Comparison) else Comparison.from_file(report)
    fitting = [
        model
        for model in comparison.models
        if (question.ship_mb is None or memory_mb(model) <= question.ship_mb)
        and (question.ship_tps is None or speed(model) >= question.ship_tps)
    ]
    if not fitting:
        return None
    closest = min(model.mean_kl for model in fitting)
    reach = closest + max(SAME_NATS, SAME_RATIO * closest)
    equal = [model for model in fitting if model.mean_kl <= reach]
    return min(equal, key=lambda model: (memory_mb(model), -speed(model)))


def memory_mb(model: ModelResult) -> float:
    """Peak memory of a model in megabytes.

    Args:
        model: The result.

    Returns:
        Megabytes.
    """
    return model.footprint.peak_memory_bytes / MEGABYTE


def speed(model: ModelResult) -> float:
    """How fast a model writes, in tokens per second.

    Args:
        model: The result.

    Returns:
        Tokens per second.
    """
    return model.latency.decode_tokens_per_second


def by_memory(comparison: Comparison, tps: float | None = None) -> list[tuple[float, ModelResult]]:
    """The answer for every amount of memory.

    Args:
        comparison: The result.
        tps: Tokens per second that the model must write.

    Returns:
        Smallest memory in megabytes for which a model is chosen, and the model; least memory first.
    """
    answers: list[tuple[float, ModelResult]] = []
    for amount in sorted(memory_mb(model) for model in comparison.models):
        best = best_to_ship(comparison, ShipSettings(ship_mb=amount, ship_tps=tps))
        if best is not None and (not answers or answers[-1][1] is not best):
            answers.append((amount, best))
    return answers


def ship_line(comparison: Comparison, question: ShipSettings) -> str:
    """Which model to ship, in one line.

    Args:
        comparison: The result.
        question: Memory and speed that the model must meet.

    Returns:
        The closest model that fits, with its figures; the answers for every amount of memory if
        the question gives none.
    """
    if question.ship_mb is None:
        answers = by_memory(comparison, question.ship_tps)
        if not answers:
            return f"Ship none: {_nothing(comparison, question)}"
        listed = "; ".join(
            f"{model.name} from {_megabytes(amount)} of memory" for amount, model in answers
        )
        return f"Ship{_at(question)} {listed}"
    best = best_to_ship(comparison, question)
    if best is None:
        return f"Ship none: {_nothing(comparison, question)}"
    return (
        f"Ship {best.name}: the closest to {comparison.reference} within "
        f"{_megabytes(question.ship_mb)} of memory{_at(question)} (KL {significant(best.mean_kl)} "
        f"nats, {significant(speed(best))} tokens/s, {_megabytes(memory_mb(best))})"
    )


def _at(question: ShipSettings) -> str:
    return "" if not question.ship_tps else f" at {question.ship_tps:g} tokens/s or more"


def _nothing(comparison: Comparison, question: ShipSettings) -> str:
    """Why no model fits: the fastest model, or the one with the least memory."""
    fast = [m for m in comparison.models if not question.ship_tps or speed(m) >= question.ship_tps]
    if not fast:
        fastest = max(comparison.models, key=speed)
        return f"the fastest is {fastest.name} with {significant(speed(fastest))} tokens/s"
    least = min(fast, key=memory_mb)
    return f"the least memory{_at(question)} takes {least.name} with {_megabytes(memory_mb(least))}"


def _megabytes(value: float) -> str:
    return f"{value:,.0f} MB"
