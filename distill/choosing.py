"""Several replies to one prompt, of which a judge takes the best, or the best and the worst.

Rejection sampling keeps the best of N replies: its KL divergence from the teacher is at most
ln N - (N - 1) / N nats a reply, so that 4 replies move it by 0.64 and 16 by 1.83. The best and the
worst are a pair of preferences, as UltraFeedback's are (Cui et al., 2023,
https://arxiv.org/abs/2310.01377).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.replies import Reply, text_of
from distill.settings import GenerateSettings
from mistill.errors import FolderError
from mistill.folders.folder import open_folder
from mistill.judging.judge import Judge, judge_of
from mistill.preferences.reading import PromptRow
from mistill.preferences.tokens import Answer
from mistill.settings import require
from mistill.text.vocabulary import Vocabulary

Score = Callable[[Sequence[PromptRow], Sequence[Sequence[int]], Sequence[Reply]], list[float]]
"""Scores replies: prompts, their tokens and the replies, as many of each."""

LIKELIHOOD = "log_p"


def scorer(
    settings: GenerateSettings, reward: str | Path | None, folder: Path, vocabulary: Vocabulary
) -> tuple[Callable[[PromptRow], None], Score]:
    """What chooses among the replies, checked now and loaded when it is called.

    Args:
        settings: Say by what replies are chosen.
        reward: The folder of a reward model.
        folder: The teacher.
        vocabulary: Of the teacher.

    Returns:
        What refuses a prompt that it cannot judge, and what scores replies; higher is better.

    Raises:
        SettingsError: If not exactly one judge is asked for, or it is none.
        FolderError: If log_p is asked of a teacher that PyTorch does not run.
    """
    if settings.by == LIKELIHOOD:
        require(reward is None, "give either a reward model or by, not both")
        if open_folder(folder).form == "onnx":
            raise FolderError(
                f"{folder} is an ONNX folder, which tells no log_p of a reply; choose by a reward "
                "model or a check, or give the model folder that it was exported from"
            )

        def by_likelihood(
            rows: Sequence[PromptRow], ids: Sequence[Sequence[int]], replies: Sequence[Reply]
        ) -> list[float]:
            return likelihoods(folder, vocabulary, ids, replies)

        return lambda row: None, by_likelihood
    check: Any = settings.by
    opened = judge_of(
        reward=reward,
        check=check,
        schema=settings.schema,
        pattern=settings.pattern,
        function=None,
    )
    loaded: list[Judge] = []

    def judge() -> Judge:
        if not loaded:
            loaded.append(opened())
        return loaded[0]

    def require_judged(row: PromptRow) -> None:
        if reward is None:  # a reward model takes every prompt
            judge().check(row)

    def by_judge(
        rows: Sequence[PromptRow], ids: Sequence[Sequence[int]], replies: Sequence[Reply]
    ) -> list[float]:
        return judge()(rows, [text_of(reply, vocabulary) for reply in replies])

    return require_judged, by_judge


def likelihoods(
    folder: Path, vocabulary: Vocabulary, ids: Sequence[Sequence[int]], replies: Sequence[Reply]
) -> list[float]:
    """Mean log p of a token of each reply, under the model that wrote it, in nats.

    The sum would favour short replies.

    Args:
        folder: The model.
        vocabulary: Its vocabulary.
        ids: Tokens of the prompts.
        replies: As many replies; the token that ended one counts.

    Returns:
        A number for each; minus infinity for a reply without a token.
    """
    import torch

    from mistill.judging.likelihood import answer_log_probabilities
    from mistill.pytorch.loading import load_pytorch

    model: Any = load_pytorch(folder, torch.float32)
    if torch.cuda.is_available():
        model.to("cuda")
    answers = [
        Answer(
            (*prompt, *reply.ids, *(vocabulary.end_ids[:1] if reply.finished else ())), len(prompt)
        )
        for prompt, reply in zip(ids, replies, strict=True)
    ]
    not_empty = [answer for answer in answers if answer.length]
    sums = iter(answer_log_probabilities(model, not_empty))
    return [float(next(sums)) / answer.length if answer.length else -np.inf for answer in answers]


def best_and_worst(
    scores: Sequence[float], good: Sequence[bool], samples: int
) -> list[tuple[int, int] | None]:
    """The best and the worst reply to each prompt.

    Args:
        scores: Of all replies, those to one prompt beside one another.
        good: Which of them may be chosen.
        samples: Replies to one prompt.

    Returns:
        For each prompt the numbers of two replies, equal where all tie; None where none may be
        chosen. Of replies that tie the first is taken.
    """
    places: list[tuple[int, int] | None] = []
    for start in range(0, len(scores), samples):
        group = [place for place in range(start, start + samples) if good[place]]
        if not group:
            places.append(None)
            continue
        best = max(group, key=lambda place: (scores[place], -place))
        worst = min(group, key=lambda place: (scores[place], place))
        places.append((best, worst if scores[worst] < scores[best] else best))
    return places
