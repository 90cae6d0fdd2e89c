"""Where the draft tokens of speculative decoding come from: the text itself, or a draft model."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from mistill.engine.language_model import greedy
from mistill.engine.onnx_model import OnnxModel
from mistill.engine.pace import LONGEST
from mistill.engine.sampling import Candidates, SamplingSettings, candidates, draw
from mistill.errors import VocabularyError
from mistill.text.vocabulary import load_vocabulary, same_vocabulary

_logger = logging.getLogger(__name__)


class DraftToken(NamedTuple):
    """A proposed next token.

    Attributes:
        token: Id of the token.
        distribution: The distribution that it was drawn from; None if it was not drawn.
    """

    token: int
    distribution: Candidates | None


class Draft(Protocol):
    """A source of draft tokens."""

    def begin(self, ids: Sequence[int]) -> None:
        """Start with another text.

        Args:
            ids: The tokens of the text, the prompt.
        """

    def seconds_behind(self, ids: Sequence[int]) -> float:
        """Time to read the tokens that were written since the last proposal.

        Args:
            ids: The tokens of the text, prompt and reply.

        Returns:
            Seconds.
        """

    def propose(
        self, ids: Sequence[int], count: int, sampling: SamplingSettings | None
    ) -> list[DraftToken]:
        """Propose the tokens that follow a text.

        Args:
            ids: The tokens of the text, prompt and reply.
            count: The most draft tokens.
            sampling: How the model samples its own tokens; None for greedy draft tokens.

        Returns:
            At most ``count`` draft tokens.
        """


class PromptLookup:
    """Prompt lookup decoding: proposes what followed the last tokens when they occurred before.

    It costs nothing and helps where a reply repeats its prompt, as in summaries, corrections and
    code (Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding).
    """

    def __init__(self, longest: int = 3, shortest: int = 2) -> None:
        """Make an empty index.

        Args:
            longest: The most last tokens that are looked for.
            shortest: The fewest.
        """
        self._lengths = range(longest, shortest - 1, -1)
        self._indexed = 0
        # Position of the token after each n-gram, at its last occurrence.
        self._positions: dict[tuple[int, ...], int] = {}

    def begin(self, ids: Sequence[int]) -> None:
        """Index another text; see ``Draft.begin``."""
        self._positions = {}
        self._indexed = 0
        self._index(ids)

    def seconds_behind(self, ids: Sequence[int]) -> float:
        """Time to catch up with a text, which is 0 for a lookup; see ``Draft.seconds_behind``."""
        return 0.0

    def propose(
        self, ids: Sequence[int], count: int, sampling: SamplingSettings | None
    ) -> list[DraftToken]:
        """Look up what followed the last tokens; see ``Draft.propose``."""
        self._index(ids)
        for length in self._lengths:
            position = self._positions.get(tuple(ids[-length:])) if len(ids) >= length else None
            if position is not None:
                return [DraftToken(token, None) for token in ids[position : position + count]]
        return []

    def _index(self, ids: Sequence[int]) -> None:
        for end in range(self._indexed + 1, len(ids)):
            for length in self._lengths:
                if end >= length:
                    self._positions[tuple(ids[end - length : end])] = end
        self._indexed = max(self._indexed, len(ids) - 1)


class DraftModel:
    """Proposes what a smaller model with the same vocabulary would write.

    The draft model reads only the last tokens of a text. They suffice for most tokens, and keep the
    cost low if the draft does not help.
    """

    def __init__(
        self,
        model: OnnxModel,
        *,
        window: int = 128,
        generator: np.random.Generator | None = None,
    ) -> None:
        """Measure how fast a draft model reads.

        Args:
            model: The draft model.
            window: Number of last tokens of a text that it reads.
            generator: Random numbers for sampled draft tokens.
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
        """Open a draft model for a model.

        Args:
            folder: The ONNX folder of the draft model.
            model: The model that checks the draft tokens, opened with ``alone=False``, because
                the two models compute in turn.
            threads: Threads of the draft model. By default as many as the model has.

        Returns:
            The draft.

        Raises:
            VocabularyError: If the two vocabularies differ.
        """
        if model.alone:
            _logger.warning(
                "%s was opened with alone=True, so that its threads slow down the draft model; "
                "open it with alone=False",
                model.folder,
            )
        draft = OnnxModel(folder, threads=threads or model.threads, alone=False)
        differences = same_vocabulary(load_vocabulary(folder), load_vocabulary(model.folder))
        if differences:
            raise VocabularyError(
                f"{folder} cannot be a draft model for {model.folder}, because their vocabularies "
                f"differ: {differences[0]}; use a model that was distilled from the same teacher"
            )
        return cls(draft)

    def begin(self, ids: Sequence[int]) -> None:
        """Start with another text; see ``Draft.begin``."""
        self._start = max(0, len(ids) - self._window)
        self._known = self._start

    def seconds_behind(self, ids: Sequence[int]) -> float:
        """Time to read what was written since; see ``Draft.seconds_behind``."""
        return self._seconds_per_token * min(self._window, max(0, len(ids) - self._known - LONGEST))

    def propose(
        self, ids: Sequence[int], count: int, sampling: SamplingSettings | None
    ) -> list[DraftToken]:
        """Write the next tokens with the draft model; see ``Draft.propose``."""
        room = self._model.context_length - count
        if len(ids) - self._known > self._window or len(ids) - self._start > room:
            self._start = max(0, len(ids) - self._window)
        text = list(ids[self._start :])
        draft_tokens = []
        for _ in range(count):
            logits = self._model.read(text)[0]
            if sampling is None or sampling.temperature == 0:
                draft_tokens.append(DraftToken(greedy(logits), None))
            else:
                distribution = candidates(logits, sampling)
                token = draw(distribution, self._generator)
                draft_tokens.append(DraftToken(token, distribution))
            text.append(draft_tokens[-1].token)
        self._known = len(ids)
        return draft_tokens
