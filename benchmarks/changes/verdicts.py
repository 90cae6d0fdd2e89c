"""Verdicts on the figures of two reports.

A figure has changed where it differs significantly by more than the tolerance, all figures tested
together. Testing for any difference at all would be wrong: a machine is a little faster on one day
than on another, so no two measurements are of exactly the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np

from benchmarks.figures.column import Column, Nature, Passages, Rounds
from benchmarks.figures.frontier import SAME_NATS
from benchmarks.figures.model_result import ModelResult
from mistill.measures.significance import Shift, between, holm, of_mean, of_tail
from mistill.measures.uncertainty import mean_of

Verdict = Literal["better", "worse", "same", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of one model in both reports.

    Attributes:
        model: Name of the model in the new report.
        column: The figure.
        old: What it was; None where it was not measured.
        new: What it is; None where it was not measured.
        relative: New divided by old, minus 1; None where there is no such ratio.
        interval: Confidence interval of the relative change, for this figure alone; None without
            samples.
        p_value: Probability of a change this far beyond the tolerance if there is none; None
            without samples.
        verdict: ``better``, ``worse``, ``same`` or ``unknown``.
        reason: Why it is the same or unknown.
    """

    model: str
    column: Column
    old: float | None
    new: float | None
    relative: float | None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    verdict: Verdict = "unknown"
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The change as plain values.

        Returns:
            What a JSON document holds; ``measure`` is the name of the figure, with its unit, as
            in the summary of a report.
        """
        values = {name: value for name, value in vars(self).items() if name != "column"}
        return {"model": self.model, "measure": self.column.key, **values}


@dataclass(frozen=True)
class FigurePair:
    """A figure in both reports, before all of them are tested together.

    Attributes:
        change: Without a verdict, or unknown with a reason.
        shift: Difference of its samples; None without samples.
        base: The old figure in the samples' unit, of which tolerances are a share; None where the
            samples are logarithms.
    """

    change: Change
    shift: Shift | None = None
    base: float | None = None

    def reach(self, share: float) -> float:
        """Difference of the samples that changes the figure by a share.

        Args:
            share: Such as 0.05.

        Returns:
            A difference in the unit of the samples.
        """
        if self.base is None:
            return math.log1p(share)
        floor = SAME_NATS if self.change.column.unit == "nats" else 0.0
        return max(share * self.base, floor)

    def share(self, difference: float) -> float | None:
        """The share by which a difference of the samples changes the figure.

        Args:
            difference: In the unit of the samples.

        Returns:
            The share; None where the figure was 0.
        """
        if self.base is None:
            return math.expm1(difference)
        return difference / self.base if self.base > 0 else None


def pair_figures(column: Column, old: ModelResult, new: ModelResult, obstacle: str) -> FigurePair:
    """One figure of one model in both reports.

    Args:
        column: The figure.
        old: The model in the old report.
        new: The model in the new one.
        obstacle: Why figures of this nature cannot be compared; empty where they can.

    Returns:
        Both values, and the difference of their samples where they can be compared.
    """
    before, after = column.figure(old), column.figure(new)
    change = Change(
        model=new.name,
        column=column,
        old=before,
        new=after,
        relative=after / before - 1 if before and after is not None else None,
    )
    if before is None or after is None:
        side = "old" if before is None else "new"
        return FigurePair(replace(change, reason=f"not in the {side} report"))
    fingerprints = column.text_fingerprint(old), column.text_fingerprint(new)
    if fingerprints[0] is not None:  # a text of its own, whatever text the reports are about
        same_text = fingerprints[0] == fingerprints[1]
        obstacle = "" if same_text else "it is not compared: it was measured on another text"
    if obstacle:
        return FigurePair(replace(change, reason=obstacle.partition(": ")[2]))
    if column.nature in ("bytes", "memory"):
        return FigurePair(change)
    shift, reason = _shift(column, old, new)
    base = None
    if column.nature != "clock" and not column.logarithmic and shift is not None:
        values = cast(Passages, column.samples(old))
        base = float(np.quantile(np.concatenate(values), 0.99)) if column.tail else mean_of(values)
    return FigurePair(replace(change, reason=reason), shift, base)


def _shift(column: Column, old: ModelResult, new: ModelResult) -> tuple[Shift | None, str]:
    """Difference of the samples, or why it is not known."""
    before, after = column.samples(old), column.samples(new)
    if before is None or after is None:
        return None, "no samples"
    if column.nature == "clock":
        rounds = [np.log(cast(Rounds, values)).tolist() for values in (before, after)]
        shift = between(*rounds)
        return shift, "" if shift else "a single round has no spread"
    passages = cast(Passages, before), cast(Passages, after)
    if list(map(len, passages[0])) != list(map(len, passages[1])):
        return None, "other passages of the text"
    shift = of_tail(*passages) if column.tail else of_mean(*passages)
    return shift, "" if shift else "a single passage has no spread"


def give_verdicts(
    pairs: Sequence[FigurePair], tolerances: Mapping[Nature, float], confidence: float
) -> tuple[Change, ...]:
    """Decide for every figure whether it has changed, all tested together.

    Args:
        pairs: The figures.
        tolerances: By nature, the share of a figure up to which a difference is no change.
        confidence: Probability that no change is reported where nothing has changed.

    Returns:
        The changes, in the same order.
    """
    p_values = [
        None
        if pair.shift is None
        else pair.shift.p_value(pair.reach(tolerances[pair.change.column.nature]))
        for pair in pairs
    ]
    tested = [p_value for p_value in p_values if p_value is not None]
    significant = iter(holm(tested, 1 - confidence))
    return tuple(
        _verdict(
            pair,
            p_value,
            next(significant) if p_value is not None else True,
            tolerances[pair.change.column.nature],
            confidence,
        )
        for pair, p_value in zip(pairs, p_values, strict=True)
    )


def _verdict(
    pair: FigurePair,
    p_value: float | None,
    is_significant: bool,
    tolerance: float,
    confidence: float,
) -> Change:
    change = pair.change
    if change.reason:
        return change
    old, new = change.old, change.new
    assert old is not None
    assert new is not None
    if pair.shift is not None:
        ends = tuple(pair.share(end) for end in pair.shift.interval(confidence))
        interval = None if None in ends else cast(tuple[float, float], ends)
        change = replace(change, interval=interval, p_value=p_value)
    distance = abs(new - old)
    if distance == 0:
        return replace(change, verdict="same", reason="equal")
    small = distance <= tolerance * abs(old)
    if small or (change.column.unit == "nats" and distance <= SAME_NATS):
        return replace(change, verdict="same", reason=f"less than {tolerance * 100:.3g}%")
    if not is_significant:
        return replace(change, verdict="same", reason="within the noise")
    better = (new > old) == (change.column.better == "higher")
    return replace(change, verdict="better" if better else "worse")
