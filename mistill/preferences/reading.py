"""Preference data from files, as pairs or as labelled answers, and divided by prompt.

Rows are read by the one reader of text in the project, refused by file and line, or passed over and
counted where that is asked for. Rankings become pairs of a better and a worse answer; answers that
tie give none. The held-out share is chosen by the prompt, so that no prompt stands on both sides.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from mistill.errors import TextError
from mistill.preferences.shapes import Labelled, Pair, Ranking, judgement_of_row
from mistill.text.conversation import Conversation, prompt_share
from mistill.text.row_content import prompt_of_row
from mistill.text.row_counts import RowCounts
from mistill.text.rows import Row, Texts, find_file, first_row, read_lines, sources_of, suffix_of

PairsOfRanking = Literal["best_worst", "best_random", "all"]
"""Which pairs a ranking gives: its best and its worst answer; its best and a lower one drawn at
random, as Zephyr takes them (Tunstall et al., 2023, https://arxiv.org/abs/2310.16944, section 3);
or every two answers, as InstructGPT does (Ouyang et al., 2022, https://arxiv.org/abs/2203.02155)."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptRow:
    """A prompt to answer, and the other columns of its row.

    Attributes:
        prompt: Turns up to the answer.
        columns: The row's own columns, for functions that judge the answer.
        origin: File and line, for messages.
    """

    prompt: Conversation
    columns: dict[str, Any]
    origin: str


ItemT = TypeVar("ItemT", Pair, Labelled, PromptRow)


def read_pairs(
    texts: Texts,
    *,
    ranking: PairsOfRanking = "best_worst",
    seed: int = 0,
    skip_bad_rows: bool = False,
) -> list[Pair]:
    """Read pairs of a better and a worse answer.

    Args:
        texts: Files or Hub datasets with pairs or rankings, in any of the shapes of docs/data.md.
        ranking: Which pairs a ranking gives.
        seed: Decides which of the lower answers ``best_random`` takes.
        skip_bad_rows: Whether a row that cannot be read is passed over and counted.

    Returns:
        The pairs, in their order.

    Raises:
        TextError: If there are none, or a row cannot be read or holds labels of single answers.
    """
    pairs: list[Pair] = []
    counts = RowCounts(sources_of(texts))
    for row in _records(texts, counts, skip_bad_rows):
        with counts.passing_over(row, skip=skip_bad_rows):
            judgement = judgement_of_row(row)
            says = judgement.says
            if isinstance(says, Labelled):
                raise TextError(
                    f"{row.origin} has a label for one answer, and pairs of two answers are "
                    "needed; give chosen and rejected, or learn labels by the loss kto"
                )
            new = [says] if isinstance(says, Pair) else pairs_of(says, ranking, seed)
            if not new:
                counts.pass_over(row, "all answers of the row tie")
            pairs += new
            counts.unread.update(judgement.unread)
    return _require_any(pairs, "pairs", counts)


def read_labelled(
    texts: Texts,
    *,
    ranking: PairsOfRanking = "best_worst",
    seed: int = 0,
    skip_bad_rows: bool = False,
) -> list[Labelled]:
    """Read answers with a label that says whether each is good; a pair gives one of each.

    Args:
        texts: Files or Hub datasets with labels, pairs or rankings.
        ranking: Which pairs a ranking gives.
        seed: Decides which of the lower answers ``best_random`` takes.
        skip_bad_rows: Whether a row that cannot be read is passed over and counted.

    Returns:
        The answers, in their order.

    Raises:
        TextError: If there are none, or a row cannot be read.
    """
    labelled: list[Labelled] = []
    counts = RowCounts(sources_of(texts))
    for row in _records(texts, counts, skip_bad_rows):
        with counts.passing_over(row, skip=skip_bad_rows):
            judgement = judgement_of_row(row)
            says = judgement.says
            counts.unread.update(judgement.unread)
            if isinstance(says, Labelled):
                labelled.append(says)
                continue
            pairs = [says] if isinstance(says, Pair) else pairs_of(says, ranking, seed)
            if not pairs:
                counts.pass_over(row, "all answers of the row tie")
            for pair in pairs:
                labelled.append(Labelled(pair.prompt, pair.chosen, True, pair.origin))
                labelled.append(Labelled(pair.prompt, pair.rejected, False, pair.origin))
    return _require_any(labelled, "labelled answers", counts)


def read_prompt_rows(texts: Texts, *, skip_bad_rows: bool = False) -> list[PromptRow]:
    """Read prompts that a model is to answer, with the other columns of their rows.

    Args:
        texts: A .txt file with a prompt on each line, or rows of prompts.
        skip_bad_rows: Whether a row that cannot be read is passed over and counted.

    Returns:
        The prompts, in their order.

    Raises:
        TextError: If there are none, or a row cannot be read.
    """
    prompts: list[PromptRow] = []
    counts = RowCounts(sources_of(texts))
    for source in sources_of(texts):
        path = find_file(source)
        if path is not None and suffix_of(path) == ".txt":
            for number, line in enumerate(read_lines(path), 1):
                if line.strip():
                    counts.rows += 1
                    turn = {"role": "user", "content": line.strip()}
                    prompts.append(PromptRow(Conversation((turn,)), {}, f"{path}, line {number}"))
            continue
        for row in _records(source, counts, skip_bad_rows):
            with counts.passing_over(row, skip=skip_bad_rows):
                says = prompt_of_row(row).says
                assert isinstance(says, Conversation), "a prompt is a conversation"
                prompts.append(PromptRow(says.joined(), dict(row.value), row.origin))
    return _require_any(prompts, "prompts", counts)


def pairs_of(ranking: Ranking, kind: PairsOfRanking, seed: int = 0) -> list[Pair]:
    """The pairs that a ranking gives.

    Args:
        ranking: Several answers with numbers, of which a higher one is better.
        kind: Which of them.
        seed: With the prompt it decides what ``best_random`` draws.

    Returns:
        At most one pair, or N (N - 1) / 2 of N answers; answers that tie give none.
    """
    order = sorted(range(len(ranking.values)), key=lambda place: -ranking.values[place])
    best = ranking.values[order[0]]
    lower = [place for place in order if ranking.values[place] < best]
    if not lower:
        return []
    if kind == "best_worst":
        places = [(order[0], lower[-1])]
    elif kind == "best_random":
        text = repr((seed, [dict(turn) for turn in ranking.prompt.messages]))
        digest = hashlib.sha256(text.encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        places = [(order[0], lower[int(generator.integers(len(lower)))])]
    else:
        places = [
            (one, other)
            for one, other in itertools.combinations(order, 2)
            if ranking.values[one] > ranking.values[other]
        ]
    return [
        Pair(
            ranking.prompt,
            ranking.answers[better],
            ranking.answers[worse],
            ranking.values[better] - ranking.values[worse] if ranking.scored else None,
            ranking.origin,
        )
        for better, worse in places
    ]


def divided(
    items: Sequence[ItemT], held_out: Sequence[ItemT] | None, share: float
) -> tuple[list[ItemT], list[ItemT]]:
    """Items to learn from and items to evaluate on, with no prompt on both sides.

    Args:
        items: What was read to learn from.
        held_out: What was given to evaluate on; None takes a share of the items.
        share: Share of the prompts, between 0 and 1; the prompts whose hashes are lowest.

    Returns:
        Both lists, neither empty.

    Raises:
        TextError: If too few prompts are left to learn from.
    """
    shares = [prompt_share(item.prompt.messages) for item in items]
    if held_out is None:
        places = sorted(set(shares))
        if len(places) < 2:
            raise TextError(
                f"there {'is 1 prompt' if places else 'are no prompts'}, and one to learn from and "
                "one to evaluate on are needed; give more, or held-out data of their own"
            )
        count = min(max(1, round(share * len(places))), len(places) - 1)
        kept_out = set(places[:count])
        held_out_items = [
            item for item, place in zip(items, shares, strict=True) if place in kept_out
        ]
    else:
        held_out_items = list(held_out)
        kept_out = {prompt_share(item.prompt.messages) for item in held_out_items}
    rest = [item for item, place in zip(items, shares, strict=True) if place not in kept_out]
    if held_out is not None and len(rest) < len(items):
        _log.warning(
            "%d of %d rows are left out of training, because their prompts are held out too",
            len(items) - len(rest),
            len(items),
        )
    if not rest:
        raise TextError("every prompt to learn from is held out too; give other held-out data")
    return rest, held_out_items


def _records(texts: Texts, counts: RowCounts, skip: bool) -> Iterator[Row]:
    rows = itertools.chain.from_iterable(first_row(source) for source in sources_of(texts))
    return counts.records(rows, skip=skip)


def _require_any(items: list[ItemT], kind: str, counts: RowCounts) -> list[ItemT]:
    if not items:
        raise counts.nothing_read(f"there are no {kind}")
    counts.tell("")
    return items
