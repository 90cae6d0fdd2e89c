"""What a model says of held-out answers, before and after it learned from others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistill.measures.shares import simple_interval
from mistill.preferences.tokens import LabelledTokens, PairTokens
from tune.pairwise.losses import label_losses, odds_losses, pair_losses
from tune.settings import PreferenceSettings

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a model says of held-out answers.

    Attributes:
        loss: The mean loss.
        margin_accuracy: Share of the pairs in which the better answer gained more log-probability
            over the start than the other one; of labelled answers, the share that moved the right
            way. A tie counts as half, so that the start has 0.5.
        likelier: Share of the pairs in which the better answer is the likelier one; None for
            labelled answers.
        chosen: Mean log-probability of a better or good answer, in nats.
        rejected: Mean log-probability of another one, in nats.
        margin: Mean of what the better answer gained less what the other one did, in nats.
    """

    loss: float
    margin_accuracy: float
    likelier: float | None
    chosen: float
    rejected: float
    margin: float

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


def figures_of(
    items: Sequence[PairTokens] | Sequence[LabelledTokens],
    now: Array,
    reference: Array,
    settings: PreferenceSettings,
) -> Figures:
    """Figures of a model from the log-probabilities of answers.

    Args:
        items: N pairs, or N labelled answers.
        now: Log-probabilities of their answers, shape (2 N,) or (N,): of each pair the better one
            first.
        reference: The same of the model that it started from.
        settings: The loss.

    Returns:
        Its figures.
    """
    ratios = now - reference
    if isinstance(items[0], LabelledTokens):
        good = np.array([item.good for item in items if isinstance(item, LabelledTokens)])
        losses = label_losses(
            ratios,
            good,
            beta=settings.beta,
            good_weight=settings.good_weight,
            bad_weight=settings.bad_weight,
        )
        return Figures(
            loss=float(losses.mean()),
            margin_accuracy=_share_above_zero(np.where(good, ratios, -ratios)),
            likelier=None,
            chosen=_mean(now[good]),
            rejected=_mean(now[~good]),
            margin=_mean(ratios[good]) - _mean(ratios[~good]),
        )
    lengths = np.array([answer.length for item in items for answer in item.answers], float)
    sides = (lengths[0::2], lengths[1::2])
    if settings.loss == "orpo":
        losses = odds_losses(now[0::2], now[1::2], *sides, beta=settings.beta)
    else:
        losses = pair_losses(
            settings.loss,
            ratios[0::2],
            ratios[1::2],
            *sides,
            beta=settings.beta,
            smoothing=settings.smoothing,
        )
    return Figures(
        loss=float(losses.mean()),
        margin_accuracy=_share_above_zero(ratios[0::2] - ratios[1::2]),
        likelier=_share_above_zero(now[0::2] - now[1::2]),
        chosen=_mean(now[0::2]),
        rejected=_mean(now[1::2]),
        margin=float((ratios[0::2] - ratios[1::2]).mean()),
    )


def _share_above_zero(values: Array) -> float:
    return float(((np.sign(values) + 1) / 2).mean())


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else 0.0


def interval_of(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of pairs, taken to be independent.

    Args:
        share: Share that is right.
        count: Number of pairs.

    Returns:
        Lowest and highest share.
    """
    return simple_interval(round(share * count), count)


def length_figures(
    items: Sequence[PairTokens] | Sequence[LabelledTokens],
) -> dict[str, float | None]:
    """How long the answers are, and how often the longer one of a pair is the better one.

    A judge that knows nothing but the length is right as often as ``longer_wins`` says.

    Args:
        items: Pairs, or labelled answers.

    Returns:
        Mean tokens of ``chosen`` (or good) and ``rejected`` answers, and ``longer_wins``, in which
        a tie counts as half; None where there are no pairs.
    """
    if isinstance(items[0], LabelledTokens):
        labelled = [item for item in items if isinstance(item, LabelledTokens)]
        good = np.array([item.answer.length for item in labelled if item.good], float)
        bad = np.array([item.answer.length for item in labelled if not item.good], float)
        return {"chosen": _mean(good), "rejected": _mean(bad), "longer_wins": None}
    lengths = np.array([answer.length for item in items for answer in item.answers], float)
    chosen, rejected = lengths[0::2], lengths[1::2]
    return {
        "chosen": _mean(chosen),
        "rejected": _mean(rejected),
        "longer_wins": _share_above_zero(chosen - rejected),
    }
