"""Verdicts of a judge in both orders, and what they come to.

A preference counts where it does not depend on the order. So the share of pairs about which both
orders agree comes first: a judge that looks at the place alone agrees about none, and one that
draws its letters at random about half. The win rate is over those pairs. Beside it stands that of
the mean log-odds of both orders, which counts every pair: a constant bias for a place cancels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.judging.letters import NO_LETTER, LetterJudge, Letters
from mistill.measures.shares import simple_interval
from mistill.progress import Tracker
from mistill.text.conversation import Conversation

RARE = 0.5
"""Mean probability of both letters below which a judge would mostly say something else."""


@dataclass(frozen=True)
class Verdict:
    """What a judge said of two replies.

    Attributes:
        prompt: Turns up to the replies.
        replies: Of the first model and of the second.
        forward: Its letters where the first model's reply stands first.
        backward: Its letters where the second model's does.
    """

    prompt: Conversation
    replies: tuple[str, str]
    forward: Letters
    backward: Letters

    @property
    def gains(self) -> tuple[float, float]:
        """How much likelier the second model's letter is, in nats, in each order."""
        return -self.forward.log_odds, self.backward.log_odds

    @property
    def winner(self) -> int | None:
        """The model that both orders prefer, 0 or 1; None where they do not agree."""
        one, other = self.gains
        if one > 0 and other > 0:
            return 1
        return 0 if one < 0 and other < 0 else None


@dataclass(frozen=True)
class Verdicts:
    """What a judge said of many pairs.

    Attributes:
        given: A verdict for each pair that was judged.
        same: Pairs whose replies are equal, which are not judged.
        too_long: Pairs that do not fit the judge's context, which are not judged either.
        unclear: Pairs of which a judge behind a server said no letter.
    """

    given: Sequence[Verdict]
    same: int
    too_long: int
    unclear: int = 0


def judge_pairs(
    pairs: Iterable[tuple[Conversation, str, str]], judge: LetterJudge, progress: Tracker
) -> Verdicts:
    """Let a judge read pairs of replies, each in both orders.

    Args:
        pairs: Prompts, each with the reply of the first model and that of the second.
        judge: Prefers one of two.
        progress: Advances by one a pair.

    Returns:
        What it said.
    """
    given: list[Verdict] = []
    same = too_long = unclear = 0
    for prompt, one, other in pairs:
        if one == other:
            same += 1
        else:
            forward, backward = judge(prompt, one, other), judge(prompt, other, one)
            if forward is None or backward is None:
                too_long += 1
            elif forward is NO_LETTER or backward is NO_LETTER:
                unclear += 1
            else:
                given.append(Verdict(prompt, (one, other), forward, backward))
        progress.advance()
    return Verdicts(given, same, too_long, unclear)


def figures_of(verdicts: Verdicts) -> dict[str, Any]:
    """What verdicts come to; shares have Wilson's 95% intervals, pairs taken for independent.

    Args:
        verdicts: Of a judge.

    Returns:
        ``pairs`` that were judged, ``agreeing``, those about which both orders agree, and their
        share ``agreement``; ``wins`` of the second model among those, and its ``win_rate``; the
        ``mean_win_rate``, of all pairs by the mean log-odds of both orders, in which a tie counts
        as half; ``first_place``, the share of all answers for the reply that stood first;
        ``longer_wins``, how often the longer reply won among the agreeing pairs whose lengths in
        characters differ; ``letters``, the mean probability of the two letters, None where they
        were written; and ``letters_are_rare``, whether that is below a half. A share of nothing is
        None. Also the pairs that were not judged, ``same``, ``too_long`` and ``unclear``.
    """
    given = verdicts.given
    winners = [verdict.winner for verdict in given]
    agreeing, wins = sum(one is not None for one in winners), winners.count(1)
    means = [sum(verdict.gains) for verdict in given]
    ahead = sum(mean > 0 for mean in means)
    half = ahead + sum(mean == 0 for mean in means) / 2
    answers = [letters for verdict in given for letters in (verdict.forward, verdict.backward)]
    told = [one.probability for one in answers if not one.written]
    letters = _share(sum(told), len(told))
    longer = [
        (len(verdict.replies[1]) > len(verdict.replies[0])) == (winner == 1)
        for verdict, winner in zip(given, winners, strict=True)
        if winner is not None and len(verdict.replies[0]) != len(verdict.replies[1])
    ]
    return {
        "pairs": len(given),
        "agreeing": agreeing,
        "agreement": _share(agreeing, len(given)),
        "agreement_interval": _interval(agreeing, len(given)),
        "wins": wins,
        "win_rate": _share(wins, agreeing),
        "win_rate_interval": _interval(wins, agreeing),
        "mean_win_rate": _share(half, len(given)),
        "mean_win_rate_interval": _interval(round(half), len(given)),
        "first_place": _share(sum(one.log_odds > 0 for one in answers), len(answers)),
        "longer_wins": _share(sum(longer), len(longer)),
        "letters": letters,
        "letters_are_rare": letters is not None and letters < RARE,
        "same": verdicts.same,
        "too_long": verdicts.too_long,
        "unclear": verdicts.unclear,
    }


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _interval(part: int, whole: int) -> tuple[float, float] | None:
    return simple_interval(part, whole) if whole else None
