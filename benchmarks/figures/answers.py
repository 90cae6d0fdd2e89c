"""How many questions of the small offline set a model answers correctly.

A question has several answers, one of which is right. The model's answer is the one with the
largest sum of its tokens' log-probabilities after the question, or the largest sum divided by the
bytes of the answer, which does not favour short answers (``acc`` and ``acc_norm`` of
lm-evaluation-harness).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mistill.measures.shares import simple_interval


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers of one model.

    Attributes:
        fingerprint: SHA-256 of the questions.
        kinds: The kind of each question.
        log_probabilities: Of each answer to each question, in nats.
        answer_bytes: Bytes of each answer, in UTF-8.
        right: Place of the right answer to each question.
    """

    fingerprint: str
    kinds: tuple[str, ...]
    log_probabilities: tuple[tuple[float, ...], ...]
    answer_bytes: tuple[tuple[int, ...], ...]
    right: tuple[int, ...]

    def outcomes(self, normalized: bool = True) -> tuple[bool, ...]:
        """Which questions were answered correctly.

        Args:
            normalized: Whether log-probabilities are divided by the bytes of the answer.

        Returns:
            One for each question.
        """
        outcomes = []
        rows = zip(self.log_probabilities, self.answer_bytes, self.right, strict=True)
        for values, lengths, right in rows:
            scores = np.array(values) / (np.array(lengths) if normalized else 1)
            outcomes.append(int(scores.argmax()) == right)
        return tuple(outcomes)

    @property
    def accuracy(self) -> float:
        """Share of questions answered correctly, by log-probability per byte."""
        return float(np.mean(self.outcomes()))

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the accuracy (Wilson, 1927)."""
        return simple_interval(sum(self.outcomes()), len(self.right))

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Right answers and questions of every kind, by log-probability per byte.

        Returns:
            Kind to the number of right answers and of questions, in the order of the questions.
        """
        counts: dict[str, tuple[int, int]] = {}
        for kind, outcome in zip(self.kinds, self.outcomes(), strict=True):
            right, questions = counts.get(kind, (0, 0))
            counts[kind] = right + outcome, questions + 1
        return counts
