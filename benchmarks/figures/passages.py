"""The text of a comparison: what is scored, and what is read as prompts.

Every model sees the same tokens. The fingerprint of those tokens is kept with the result, since
perplexities over different text must not be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mistill.errors import TextError

if TYPE_CHECKING:
    from mistill.text.blocks import Document


@dataclass(frozen=True)
class Passage:
    """Tokens that are scored at once.

    Attributes:
        ids: Shape (T,).
        kept: Shape (T - 1,), True at t where the token at t + 1 is to be predicted.
    """

    ids: NDArray[np.int64]
    kept: NDArray[np.bool_]

    @property
    def targets(self) -> NDArray[np.int64]:
        """The tokens to be predicted, one for each kept position."""
        return self.ids[1:][self.kept]


def cut_passages(
    documents: Iterable[Document], *, context_length: int, scored_tokens: int
) -> list[Passage]:
    """Cut documents into passages until enough tokens are to be predicted.

    A document longer than the context is cut without overlap; the first token of a passage is
    never predicted. The last passage is masked so that the number of tokens is met exactly, if
    there is text enough.

    Args:
        documents: Token ids and masks.
        context_length: Most tokens of a passage.
        scored_tokens: Tokens to be predicted.

    Returns:
        Passages that each have something to predict.

    Raises:
        TextError: If nothing in the text is to be predicted.
    """
    passages: list[Passage] = []
    remaining = scored_tokens
    for document in documents:
        for start in range(0, len(document.ids), context_length):
            ids = document.ids[start : start + context_length]
            predicted = document.mask[start + 1 : start + len(ids)].copy()
            predicted[np.cumsum(predicted) > remaining] = False
            if not predicted.any():
                continue
            # Causal models: what follows the last token to be predicted cannot matter.
            end = int(np.flatnonzero(predicted)[-1]) + 1
            passages.append(Passage(ids[: end + 1], predicted[:end]))
            remaining -= int(predicted.sum())
            if remaining == 0:
                return passages
    if not passages:
        raise TextError(
            "the text has no token to predict; give text of at least two tokens, or conversations "
            "in which the assistant speaks"
        )
    return passages


def cut_prompts(passages: Sequence[Passage], *, length: int, count: int) -> list[list[int]]:
    """Prompts from the text, no two of which begin with the same token.

    An engine may keep the KV cache of the last prompt as a prefix cache. Prompts that differ in
    their first token have to be read in full.

    Args:
        passages: Where the tokens come from; they repeat if there are few.
        length: Tokens of each prompt.
        count: Number of prompts.

    Returns:
        Lists of token ids. Neighbours differ in their first token if the text has two that do.
    """
    tokens = np.concatenate([passage.ids for passage in passages])
    prompts: list[list[int]] = []
    first_tokens: set[int] = set()
    start = 0
    for _ in range(count):
        ahead = (start + np.arange(len(tokens))) % len(tokens)
        fresh = [int(place) for place in ahead if int(tokens[place]) not in first_tokens]
        if not fresh:
            first_tokens = {prompts[-1][0]}
            fresh = [int(place) for place in ahead if int(tokens[place]) not in first_tokens]
        start = fresh[0] if fresh else start
        prompts.append(
            [int(token) for token in tokens.take(start + np.arange(length), mode="wrap")]
        )
        first_tokens.add(prompts[-1][0])
        start = (start + length) % len(tokens)
    return prompts


def fingerprint_of(passages: Sequence[Passage]) -> str:
    """SHA-256 of the tokens and of which of them are predicted.

    Args:
        passages: The text.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(len(passage.ids).to_bytes(8, "little"))
        digest.update(passage.ids.astype("<i8").tobytes())
        digest.update(np.packbits(passage.kept).tobytes())
    return digest.hexdigest()
