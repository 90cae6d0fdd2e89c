"""Speculative decoding: guess the next tokens cheaply, and let the model read them all at once.

Each guess is held against what the model itself chooses there, so that the text is the model's own:
with tokens that are looked up or taken greedily, the very tokens that it would have written; with a
draft model that samples, a draw from the very same distribution (Leviathan et al., 2023,
https://arxiv.org/abs/2211.17192). Guessing stops by itself where it does not pay.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mistill.engine.language_model import LOOK_UP, Choose, LanguageModel, greedy
from mistill.engine.onnx_model import OnnxModel
from mistill.engine.pace import LONGEST, Pace
from mistill.engine.sampling import Candidates, Sampler, SamplingSettings, candidates, draw
from mistill.errors import VocabularyError
from mistill.settings import require
from mistill.text.vocabulary import load_vocabulary, same_vocabulary

SAME = 1e-3
"""How far apart the logits of one position may be, read alone or among others, to count as same."""

_logger = logging.getLogger(__name__)


class Guess(NamedTuple):
    """A token that may come next.

    Attributes:
        token: Its id.
        among: What it was drawn from; None if it was not drawn.
    """

    token: int
    among: Candidates | None


class Draft(Protocol):
    """Where guesses come from."""

    def begin(self, ids: Sequence[int]) -> None:
        """Take up another text."""

    def seconds_behind(self, ids: Sequence[int]) -> float:
        """What it would take to read what has been written since the last guess."""

    def guess(
        self, ids: Sequence[int], count: int, sampling: SamplingSettings | None
    ) -> list[Guess]:
        """Guess what follows a text.

        Args:
            ids: The text that was begun, and what was written after it.
            count: Most tokens to guess.
            sampling: How the model draws its own; None if guesses are not to be drawn.

        Returns:
            Any number of tokens up to that.
        """


class LookUp:
    """Guesses that what followed the last words when they occurred before follows them again.

    Prompt look-up (Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding): free, and
    good where a reply repeats its prompt, as in summaries, corrections and code.
    """

    def __init__(self, longest: int = 3, shortest: int = 2) -> None:
        """Make an empty index.

        Args:
            longest: Most tokens that have to be the same.
            shortest: Fewest.
        """
        self._lengths = range(longest, shortest - 1, -1)
        self._indexed = 0
        # What came after each run of tokens, where it occurred last.
        self._after: dict[tuple[int, ...], int] = {}

    def begin(self, ids: Sequence[int]) -> None:
        """Forget the text before.

        Args:
            ids: The new one.
        """
        self._after = {}
        self._indexed = 0
        self._index(ids)

    def seconds_behind(self, ids: Sequence[int]) -> float:
        """Nothing: looking up takes microseconds.

        Args:
            ids: The text.

        Returns:
            0.
        """
        return 0.0

    def guess(
        self, ids: Sequence[int], count: int, sampling: SamplingSettings | None
    ) -> list[Guess]:
        """Look up what followed the last tokens.

        Args:
            ids: The text.
            count: Most tokens to guess.
            sampling: Makes no difference.

        Returns:
            Guesses; none if the last tokens are new.
        """
        self._index(ids)
        for length in self._lengths:
            place = self._after.get(tuple(ids[-length:])) if len(ids) >= length else None
            if place is not None:
                return [Guess(token, None) for token in ids[place : place + count]]
        return []

    def _index(self, ids: Sequence[int]) -> None:
        for end in range(self._indexed + 1, len(ids)):
            for length in self._lengths:
                if end >= length:
                    self._after[tuple(ids[end - length : end])] = end
        self._indexed = max(self._indexed, len(ids) - 1)


class DraftModel:
    """Guesses what a smaller model with the same tokens would write.

    It reads the end of the text only: that is enough to guess words, and a draft that turns out
    useless has then cost little.
    """

    def __init__(
        self,
        model: OnnxModel,
        *,
        window: int = 128,
        generator: np.random.Generator | None = None,
    ) -> None:
        """Take a small model.

        Args:
            model: The small model.
            window: How much of a text it reads when it comes to it, or comes back.
            generator: Where its randomness comes from.
        """
        self._model = model
        self._window = min(window, model.context_length // 2)
        self._generator = np.random.default_rng() if generator is None else generator
        self._start = 0
        self._known = 0
        began = time.perf_counter()
        ids = [token % model.vocabulary_size for token in range(3, 3 + self._window)]
        model.read(ids)
        self._seconds_per_token = (time.perf_counter() - began) / self._window

    @classmethod
    def open(cls, folder: str | Path, model: OnnxModel, threads: int | None = None) -> DraftModel:
        """Open a draft for a model.

        Args:
            folder: The ONNX folder of the small model.
            model: The model to guess for, opened with ``alone=False``: the two take turns.
            threads: Threads of the small model; as many as the other has if not given.

        Returns:
            The draft.

        Raises:
            VocabularyError: If a token does not mean the same in both.
        """
        if model.alone:
            _logger.warning(
                "%s was opened to compute alone, and its threads will take time from its draft; "
                "open it with alone=False",
                model.folder,
            )
        draft = OnnxModel(folder, threads=threads or model.threads, alone=False)
        differences = same_vocabulary(load_vocabulary(folder), load_vocabulary(model.folder))
        if differences:
            raise VocabularyError(
                f"{folder} cannot guess for {model.folder}: their vocabularies differ: "
                f"{differences[0]}; take a draft that was distilled from the same teacher"
            )
        return cls(draft)

    def begin(self, ids: Sequence[int]) -> None:
        """Take up another text.

        Args:
            ids: The text.
        """
        self._start = max(0, len(ids) - self._window)
        self._known = self._start

    def seconds_behind(self, ids: Sequence[int]) -> float:
        """What it would take to read what it has not read.

        Args:
            ids: The text.

        Returns:
            Seconds, by the speed that was measured when it was opened.
        """
        return self._seconds_per_token * min(self._window, max(0, len(ids) - self._known - LONGEST))

    def guess(
        self, ids: Sequence[int], count: int, sampling: SamplingSettings | None
    ) -> list[Guess]:
        """Write on.

        Args:
            ids: The text.
            count: How many tokens to guess.
            sampling: How to draw them; None takes the most probable.

        Returns:
            That many guesses.
        """
        room = self._model.context_length - count
        if len(ids) - self._known > self._window or len(ids) - self._start > room:
            self._start = max(0, len(ids) - self._window)
        text = list(ids[self._start :])
        guesses = []
        for _ in range(count):
            logits = self._model.read(text)[0]
            if sampling is None or sampling.temperature == 0:
                guesses.append(Guess(greedy(logits), None))
            else:
                among = candidates(logits, sampling)
                guesses.append(Guess(draw(among, self._generator), among))
            text.append(guesses[-1].token)
        self._known = len(ids)
        return guesses


class SpeculativeModel:
    """A model that writes faster where its next tokens can be guessed; meets ``LanguageModel``.

    A model that multiplies in 8-bit integers rounds its inputs, and the last bit of a sum, which
    depends on how many positions are read at once, then moves its logits. Its text with guesses is
    as much its own as without, but need not be the same. So with ``exact`` such a model is
    measured, and does not guess.

    Attributes:
        model: The model itself.
        pace: What guessing has cost and won.
        rounding: How far logits of one position were apart, read alone or with others.
        guesses: Whether it guesses at all.
    """

    model: OnnxModel
    pace: Pace
    rounding: float
    guesses: bool

    def __init__(self, model: OnnxModel, draft: Draft, *, exact: bool = True) -> None:
        """Let a model guess.

        Args:
            model: The model.
            draft: Where guesses come from.
            exact: Whether greedy text must be what the model writes without guesses, token for
                token.
        """
        self.model = model
        self.rounding = rounding_of(model)
        self.guesses = not exact or self.rounding <= SAME
        self.pace = Pace(cost_of_a_guess(model, draft)) if self.guesses else Pace()
        self._draft = draft
        if not self.guesses:
            _logger.warning(
                "%s does not guess ahead: its logits differ by %.2g when several positions are "
                "read at once, so that its text would not stay the same to the token; "
                "exact=False allows that, and an export with an int8 cache and blocks of 32 may "
                "do without",
                model.folder.name,
                self.rounding,
            )

    @property
    def vocabulary_size(self) -> int:
        """Number of logits per position, V."""
        return self.model.vocabulary_size

    @property
    def context_length(self) -> int:
        """Most positions that the model can hold at once."""
        return self.model.context_length

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of every next token at every position.

        Args:
            ids: Shape (B, T), without padding.

        Returns:
            Shape (B, T, V).
        """
        return self.model.logits(ids)

    def stream(self, ids: Sequence[int], choose: Choose = greedy) -> Iterator[int]:
        """Write tokens after the ids given, one at a time, until the context is full.

        Args:
            ids: The prompt, at least one token.
            choose: Picks a token from the logits (V,) of the last position.

        Returns:
            An iterator over token ids.

        Raises:
            ValueError: If the prompt is empty or holds an id that is not in the vocabulary.
            ContextError: If it exceeds the context.
        """
        if not self.guesses:
            return self.model.stream(ids, choose)
        return self._write(self.model.checked(ids), choose)

    def _write(self, tokens: list[int], choose: Choose) -> Iterator[int]:
        reader = object()
        sampler = choose if isinstance(choose, Sampler) else None
        sampling = None if sampler is None else sampler.settings
        self._draft.begin(tokens)
        reading_prompt = True
        while len(tokens) < self.context_length:
            began = time.perf_counter()
            guesses: list[Guess] = []
            if not reading_prompt:
                count = self.pace.length(self._draft.seconds_behind(tokens))
                count = min(count, self.context_length - len(tokens) - 1)
                guesses = self._draft.guess(tokens, count, sampling) if count > 0 else []
            text = tokens + [guess.token for guess in guesses] if guesses else tokens
            scores = self.model.follow(reader, text, len(guesses) + 1)
            seconds = time.perf_counter() - began
            right = 0
            for place, logits in enumerate(scores):
                guess = guesses[place] if place < len(guesses) else None
                if guess is not None and guess.among is not None and sampler is not None:
                    token = sampler.judge(logits, guess.token, guess.among)
                else:
                    token = choose(logits)
                tokens.append(token)
                yield token
                if guess is None or token != guess.token:
                    break
                right += 1
            if not reading_prompt:
                self.pace.note(len(guesses), right, seconds)
            reading_prompt = False


def with_guesses(
    model: LanguageModel, draft: str | Path, *, exact: bool = True, threads: int | None = None
) -> SpeculativeModel:
    """Let a chatbot guess ahead.

    Args:
        model: An open ONNX folder; if a smaller model is to guess, opened with ``alone=False``.
        draft: ``lookup``, or the ONNX folder of a smaller model with the same tokens.
        exact: Whether greedy text must be what the model writes without guesses.
        threads: Threads of the smaller model; as many as the other has if not given.

    Returns:
        The model with guesses.

    Raises:
        SettingsError: If the model does not run in ONNX Runtime.
        VocabularyError: If the draft has other tokens.
    """
    require(
        isinstance(model, OnnxModel),
        "only ONNX folders guess ahead; export the model, or leave out the draft",
    )
    assert isinstance(model, OnnxModel)
    source = LookUp() if str(draft) == LOOK_UP else DraftModel.open(draft, model, threads)
    return SpeculativeModel(model, source, exact=exact)


def rounding_of(model: OnnxModel) -> float:
    """How far logits of one position are apart, read alone or together with others.

    Args:
        model: Any model; what it has read is forgotten.

    Returns:
        The largest difference over a few positions.
    """
    step = model.vocabulary_size // 24
    ids = [step * place for place in range(1, 13)]
    model.read([ids[0]])
    together = model.read(ids, 8)
    model.read([ids[0], ids[0]])
    alone = np.concatenate([model.read(ids[: end + 1]) for end in range(4, 12)])
    return float(np.abs(together - alone).max())


def cost_of_a_guess(model: OnnxModel, draft: Draft) -> float:
    """What a guess adds to a step of a model, measured on a few positions.

    Args:
        model: The model; what it has read is forgotten.
        draft: Where guesses come from; it takes up another text.

    Returns:
        A share of the time of a plain step.
    """
    ids = [place % model.vocabulary_size for place in range(3, 15)]

    def seconds(positions: int) -> float:
        took = []
        for _ in range(3):
            model.read(ids[:-positions])
            began = time.perf_counter()
            model.read(ids, positions)
            took.append(time.perf_counter() - began)
        return min(took)

    step = seconds(1)
    draft.begin(ids)
    draft.guess(ids, 1, None)
    began = time.perf_counter()
    draft.guess(ids, 1, None)
    guess = time.perf_counter() - began
    # Two positions may take another kernel than one, and eight another than two.
    reading = max(seconds(1 + guesses) / guesses - step / guesses for guesses in (1, LONGEST))
    return (reading + guess) / step
