"""Verdicts on the figures of two reports.

A figure has changed where its samples say that it surely moved by more than the tolerance, all
figures judged together. To ask whether it moved at all would be the wrong question: a machine is a
little faster one day than another, and no two measurements of it are of the same thing.
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
        relative: New by old, less 1; None where there is no such ratio.
        interval: Where the relative change lies, taken by itself; None where no samples tell.
        p_value: How often chance alone moves it so far beyond the tolerance; None where no
            samples tell.
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
class Look:
    """A figure in both reports, before all of them are judged together.

    Attributes:
        change: Without a verdict, or unknown with a reason.
        shift: How far its samples moved; None where none tell.
        base: What a share of the old figure is a share of, in the samples' unit; None where the
            samples are logarithms.
    """

    change: Change
    shift: Shift | None = None
    base: float | None = None

    def reach(self, share: float) -> float:
        """How far the samples move when the figure moves by a share.

        Args:
            share: Such as 0.05.

        Returns:
            A distance in the unit of the samples.
        """
        if self.base is None:
            return math.log1p(share)
        floor = SAME_NATS if self.change.column.unit == "nats" else 0.0
        return max(share * self.base, floor)

    def share(self, moved: float) -> float | None:
        """The share by which the figure moves when its samples move so far.

        Args:
            moved: A distance in the unit of the samples.

        Returns:
            The share; None where the figure was 0.
        """
        if self.base is None:
            return math.expm1(moved)
        return moved / self.base if self.base > 0 else None


def look(column: Column, old: ModelResult, new: ModelResult, obstacle: str) -> Look:
    """Look at one figure of one model in both reports.

    Args:
        column: The figure.
        old: The model in the old report.
        new: The model in the new one.
        obstacle: Why figures of this nature cannot be compared; empty where they can.

    Returns:
        What is to be judged.
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
        return Look(replace(change, reason=f"not in the {side} report"))
    asked = column.asked(old), column.asked(new)
    if asked[0] is not None:  # something of its own, whatever text the reports are about
        obstacle = "" if asked[0] == asked[1] else "it is not compared: it was asked of other text"
    if obstacle:
        return Look(replace(change, reason=obstacle.partition(": ")[2]))
    if column.nature in ("bytes", "memory"):
        return Look(change)
    shift, reason = _shift(column, old, new)
    base = None
    if column.nature != "clock" and not column.logarithmic and shift is not None:
        values = cast(Passages, column.samples(old))
        base = float(np.quantile(np.concatenate(values), 0.99)) if column.tail else mean_of(values)
    return Look(replace(change, reason=reason), shift, base)


def _shift(column: Column, old: ModelResult, new: ModelResult) -> tuple[Shift | None, str]:
    """How far the samples have moved, or why that is not known."""
    before, after = column.samples(old), column.samples(new)
    if before is None or after is None:
        return None, "no samples"
    if column.nature == "clock":
        rounds = [np.log(cast(Rounds, values)).tolist() for values in (before, after)]
        moved = between(*rounds)
        return moved, "" if moved else "a single round has no spread"
    passages = cast(Passages, before), cast(Passages, after)
    if list(map(len, passages[0])) != list(map(len, passages[1])):
        return None, "other passages of the text"
    moved = of_tail(*passages) if column.tail else of_mean(*passages)
    return moved, "" if moved else "a single passage has no spread"


def judge(
    looks: Sequence[Look], tolerances: Mapping[Nature, float], confidence: float
) -> tuple[Change, ...]:
    """Say of every figure whether it has changed, all judged together.

    Args:
        looks: The figures.
        tolerances: By nature, the share of a figure below which no change is called.
        confidence: Chance that nothing is called where nothing has changed.

    Returns:
        The changes, in the same order.
    """
    chances = [
        None
        if look.shift is None
        else look.shift.p_value(look.reach(tolerances[look.change.column.nature]))
        for look in looks
    ]
    asked = [chance for chance in chances if chance is not None]
    real = iter(holm(asked, 1 - confidence))
    return tuple(
        _called(
            look,
            chance,
            next(real) if chance is not None else True,
            tolerances[look.change.column.nature],
            confidence,
        )
        for look, chance in zip(looks, chances, strict=True)
    )


def _called(
    look: Look, chance: float | None, is_sure: bool, tolerance: float, confidence: float
) -> Change:
    change = look.change
    if change.reason:
        return change
    old, new = change.old, change.new
    assert old is not None
    assert new is not None
    if look.shift is not None:
        ends = tuple(look.share(end) for end in look.shift.interval(confidence))
        interval = None if None in ends else cast(tuple[float, float], ends)
        change = replace(change, interval=interval, p_value=chance)
    moved = abs(new - old)
    if moved == 0:
        return replace(change, verdict="same", reason="equal")
    small = moved <= tolerance * abs(old)
    if small or (change.column.unit == "nats" and moved <= SAME_NATS):
        return replace(change, verdict="same", reason=f"less than {tolerance * 100:.3g}%")
    if not is_sure:
        return replace(change, verdict="same", reason="within the noise")
    better = (new > old) == (change.column.better == "higher")
    return replace(change, verdict="better" if better else "worse")
