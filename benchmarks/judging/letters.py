"""Which of two replies a model prefers, read from the letter with which it would answer.

A judge that is shown two replies often prefers the one in a certain place, whatever they say
(Zheng et al., 2023, https://arxiv.org/abs/2306.05685, section 3.3). So every pair is shown in both
orders, by ``benchmarks.judging.verdicts``. The judge writes nothing: the probabilities of the two
letters are read where its answer begins, as no letter has to be found in a text that a small model
might write instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mistill.engine.language_model import LanguageModel
from mistill.engine.log_probabilities import token_score
from mistill.engine.opening import open_model
from mistill.errors import TextError
from mistill.preferences.tokens import answer_tokens
from mistill.text.conversation import Conversation, content_of
from mistill.text.vocabulary import Vocabulary, load_vocabulary

LETTERS = ("A", "B")

_TASK = (
    "Below are a question and two replies to it. Judge which reply is better: which one does what "
    "was asked, is right, and says it clearly. Neither its place nor its length matters."
)


@dataclass(frozen=True)
class Letters:
    """With which probabilities a judge answers with a letter.

    Attributes:
        first: log p of the letter of the reply that it reads first, in nats.
        second: log p of the other letter.
        written: Whether the letter was written, and only the sign of their difference is known.
    """

    first: float
    second: float
    written: bool = False

    @property
    def log_odds(self) -> float:
        """How much likelier the first letter is, in nats; above 0 where it is preferred."""
        return self.first - self.second

    @property
    def probability(self) -> float:
        """Of either letter; little of it says that the judge did not understand the question."""
        return math.exp(self.first) + math.exp(self.second)


NO_LETTER = Letters(0.0, 0.0)
"""What a judge says that answered with neither letter."""


class LetterJudge(Protocol):
    """Prefers one of two replies."""

    def __call__(self, prompt: Conversation, first: str, second: str) -> Letters | None:
        """Judge two replies in the order given.

        Args:
            prompt: Turns up to the reply.
            first: The reply that is shown first.
            second: The other one.

        Returns:
            The probabilities of its letters, or ``NO_LETTER`` itself; None where both replies do
            not fit its context.
        """


class ModelJudge:
    """A chat model that says which reply is better."""

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        """Open a folder.

        Args:
            folder: A model folder of any form, with a chat template.
            threads: Threads to compute with; None for one for each processor.
        """
        self.model = open_model(folder, threads=threads)
        self.vocabulary = load_vocabulary(folder)

    def __call__(self, prompt: Conversation, first: str, second: str) -> Letters | None:
        """See ``LetterJudge``."""
        talk = judge_prompt(prompt, first, second)
        ids, letters = letter_tokens(talk, self.vocabulary)
        if len(ids) >= self.model.context_length:
            return None
        logits = _next_logits(self.model, ids)
        first_one, other = (token_score(logits, token).log_probability for token in letters)
        return Letters(first_one, other)


def judge_prompt(prompt: Conversation, first: str, second: str) -> Conversation:
    """The conversation in which a judge is shown two replies.

    Args:
        prompt: Turns up to the reply; of one turn its text is the question, of several each is
            named by its role.
        first: The reply under the letter A.
        second: The one under B.

    Returns:
        One turn of the user.
    """
    turns = prompt.messages
    texts = [str(content_of(turn)) for turn in turns]
    if len(turns) > 1:
        texts = [f"{turn['role']}: {text}" for turn, text in zip(turns, texts, strict=True)]
    question = "\n\n".join(texts)
    words = (
        f"{_TASK}\n\n# Question\n\n{question}\n\n# Reply A\n\n{first}\n\n# Reply B\n\n{second}\n\n"
        "# Which reply is better?\n\nAnswer with one letter, A or B, and nothing else."
    )
    return Conversation(({"role": "user", "content": words},))


def letter_tokens(talk: Conversation, vocabulary: Vocabulary) -> tuple[list[int], tuple[int, int]]:
    """Where the answers A and B part, in the tokens of a conversation that ends in one of them.

    Some tokenizers write a letter with the space before it, and some templates end a prompt with a
    token that the answer melts into. What both answers begin with belongs to the prompt.

    Args:
        talk: From ``judge_prompt``.
        vocabulary: The judge's, with a chat template.

    Returns:
        The tokens before the letter, and the token of each letter.

    Raises:
        TextError: If the template writes both letters alike.
    """
    rows = [
        answer_tokens(
            talk, {"role": "assistant", "content": letter}, vocabulary, "the judge's prompt"
        ).ids
        for letter in LETTERS
    ]
    for place, (one, other) in enumerate(zip(*rows, strict=False)):
        if one != other:
            return list(rows[0][:place]), (one, other)
    raise TextError(
        "the judge's chat template writes the answers A and B alike; take another judge"
    )


def _next_logits(model: LanguageModel, ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits (V,) of the token after some others."""
    logits_of_step: list[NDArray[np.float32]] = []

    def choose(logits: NDArray[np.float32]) -> int:
        logits_of_step.append(np.array(logits, np.float32))
        return int(logits.argmax())

    next(iter(model.stream(ids, choose)))
    return logits_of_step[0]
