"""Speculative decoding: propose draft tokens cheaply, and let the model check them in one step.

Each draft token is compared with what the model itself chooses there, so that the text is the
model's own. With draft tokens that are looked up or chosen greedily, it is the text that the model
would have written without them; with a draft model that samples, it is a draw from the same
distribution (Leviathan et al., 2022, https://arxiv.org/abs/2211.17192). Drafting is switched off
while it does not help.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from mistill.engine.drafts import Draft, DraftModel, DraftToken, PromptLookup
from mistill.engine.language_model import LOOK_UP, Choose, LanguageModel, greedy
from mistill.engine.onnx_model import OnnxModel, Reader
from mistill.engine.pace import LONGEST, Pace
from mistill.engine.sampling import Sampler
from mistill.settings import require

SAME = 1e-3
"""Logits of one position, read alone or among others, count as equal up to this difference."""

_logger = logging.getLogger(__name__)


class SpeculativeModel:
    """A model that writes faster by speculative decoding; meets ``LanguageModel``.

    A model that multiplies in 8-bit integers rounds its activations. The last bit of a sum depends
    on how many positions are read at once, and rounding makes it visible in the logits. Such a
    model may write another text with draft tokens than without. With ``exact`` the difference of
    its logits is measured, and if it is not negligible, replies that must not change are written
    without draft tokens. Replies that are drawn without a seed differ anyway.

    Attributes:
        model: The model itself.
        pace: Decides how many draft tokens each step checks.
        rounding: The largest difference of logits of one position, read alone or with others.
        speculates: Whether speculative decoding is on for replies that must not change by it,
            too: greedy ones, and those with a seed.
    """

    model: OnnxModel
    pace: Pace
    rounding: float
    speculates: bool

    def __init__(self, model: OnnxModel, draft: Draft, *, exact: bool = True) -> None:
        """Give a model a draft.

        Args:
            model: The model that checks draft tokens.
            draft: The source of draft tokens.
            exact: Whether greedy text must be, token for token, what the model writes without a
                draft.
        """
        self.model = model
        self.rounding = rounding_of(model)
        self.speculates = not exact or self.rounding <= SAME
        self.pace = Pace(draft_token_cost(model, draft))
        self._draft = draft
        # The loop that has the draft, while it lives.
        self._reader: ref[Reader] | None = None
        self._lock = threading.Lock()
        self._warned = False

    @property
    def vocabulary_size(self) -> int:
        """Number of logits per position, V."""
        return self.model.vocabulary_size

    @property
    def context_length(self) -> int:
        """Most positions that the model can hold at once."""
        return self.model.context_length

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of every next token at every position; see ``LanguageModel.logits``."""
        return self.model.logits(ids)

    def stream(
        self, ids: Sequence[int], choose: Choose = greedy, *, repeatable: bool | None = None
    ) -> Iterator[int]:
        """Write tokens after a prompt, one at a time; see ``OnnxModel.stream``.

        Only one of several texts that are written at once has draft tokens.

        Args:
            ids: The prompt.
            choose: Picks a token from the logits (V,) of a position.
            repeatable: As for ``OnnxModel.stream``; None is for whatever is not known to be drawn
                without a seed.

        Returns:
            Token ids, one at a time.
        """
        if repeatable is None:
            sampling = choose.settings if isinstance(choose, Sampler) else None
            drawn = sampling is not None and sampling.temperature > 0 and sampling.seed is None
            return self._write(self.model.checked(ids), choose, not drawn, False)
        return self._write(self.model.checked(ids), choose, repeatable, repeatable)

    def _write(
        self, tokens: list[int], choose: Choose, unchanged: bool, repeatable: bool
    ) -> Iterator[int]:
        if unchanged and not self.speculates:
            self._warn()
            reader = None
        else:
            reader = self._take_draft()
        if reader is None:
            yield from self.model.stream(tokens, choose, repeatable=repeatable)
        else:
            yield from self._speculate(reader, tokens, choose)

    def _warn(self) -> None:
        if self._warned:
            return
        self._warned = True
        _logger.warning(
            "speculative decoding is off for greedy and seeded replies of %s, because its logits "
            "change by %.2g when several tokens are read at once, so that the replies could "
            "change; set exact=False (--no-exact) to allow that, or export the model with "
            "--cache int8 and --block-size 32, which often keeps the logits equal",
            self.model.folder.name,
            self.rounding,
        )

    def _take_draft(self) -> Reader | None:
        """Take the draft for a loop; None if another one has it."""
        with self._lock:
            if self._reader is not None and self._reader() is not None:
                return None
            reader = Reader()
            self._reader = ref(reader)
            return reader

    def _speculate(self, reader: Reader, tokens: list[int], choose: Choose) -> Iterator[int]:
        sampler = choose if isinstance(choose, Sampler) else None
        sampling = None if sampler is None else sampler.settings
        self._draft.begin(tokens)
        reading_prompt = True
        while len(tokens) < self.context_length:
            began = time.perf_counter()
            draft_tokens: list[DraftToken] = []
            if not reading_prompt:
                count = self.pace.length(self._draft.seconds_behind(tokens))
                count = min(count, self.context_length - len(tokens) - 1)
                if count > 0:
                    draft_tokens = self._draft.propose(tokens, count, sampling)
            text = tokens + [drafted.token for drafted in draft_tokens] if draft_tokens else tokens
            scores = self.model.follow(reader, text, len(draft_tokens) + 1)
            seconds = time.perf_counter() - began
            accepted = 0
            for position, logits in enumerate(scores):
                drafted = draft_tokens[position] if position < len(draft_tokens) else None
                if drafted is not None and drafted.distribution is not None and sampler is not None:
                    token = sampler.accept_or_replace(logits, drafted.token, drafted.distribution)
                else:
                    token = choose(logits)
                tokens.append(token)
                yield token
                if drafted is None or token != drafted.token:
                    break
                accepted += 1
            if not reading_prompt:
                self.pace.note(len(draft_tokens), accepted, seconds)
            reading_prompt = False


def with_draft(model: LanguageModel, draft: str | Path, *, exact: bool = True) -> SpeculativeModel:
    """Let a model decode speculatively.

    Args:
        model: An open ONNX folder; for a draft model, opened with ``alone=False``.
        draft: ``lookup``, or the ONNX folder of a draft model with the same vocabulary.
        exact: Whether greedy text must be what the model writes without a draft.

    Returns:
        The model with its draft.

    Raises:
        SettingsError: If the model does not run in ONNX Runtime.
        VocabularyError: If the vocabulary of the draft model differs.
    """
    require(
        isinstance(model, OnnxModel),
        "speculative decoding needs an ONNX folder; export the model, or leave out the draft",
    )
    assert isinstance(model, OnnxModel)
    source = PromptLookup() if str(draft) == LOOK_UP else DraftModel.open(draft, model)
    return SpeculativeModel(model, source, exact=exact)


def rounding_of(model: OnnxModel) -> float:
    """The difference between logits of one position, read alone or together with others.

    Args:
        model: Any model; its KV cache is overwritten.

    Returns:
        The largest difference over a few positions.
    """
    step = model.vocabulary_size // 24
    ids = [step * number for number in range(1, 13)]
    model.read([ids[0]])
    together = model.read(ids, 8)
    model.read([ids[0], ids[0]])
    alone = np.concatenate([model.read(ids[: end + 1]) for end in range(4, 12)])
    return float(np.abs(together - alone).max())


def draft_token_cost(model: OnnxModel, draft: Draft) -> float:
    """The time that a draft token adds to a step of a model, measured on a few positions.

    Args:
        model: The model; its KV cache is overwritten.
        draft: The source of draft tokens; it starts with another text.

    Returns:
        A share of the time of a plain step.
    """
    ids = [number % model.vocabulary_size for number in range(3, 15)]

    def seconds(positions: int) -> float:
        samples = []
        for _ in range(3):
            model.read(ids[:-positions])
            began = time.perf_counter()
            model.read(ids, positions)
            samples.append(time.perf_counter() - began)
        return min(samples)

    step = seconds(1)
    draft.begin(ids)
    draft.propose(ids, 1, None)
    began = time.perf_counter()
    draft.propose(ids, 1, None)
    drafting = time.perf_counter() - began
    # The kernel may differ for one, two and eight positions.
    reading = max((seconds(1 + count) - step) / count for count in (1, LONGEST))
    return (reading + drafting) / step
