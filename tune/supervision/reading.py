"""Conversations to tune on, and conversations to judge on, as blocks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mistill.errors import TextError
from mistill.text.blocks import Document, TokenBlocks
from mistill.text.documents import read_documents
from mistill.text.row_counts import RowCounts
from mistill.text.rows import Texts, sources_of
from mistill.training.training_text import packed_pair, split_documents

if TYPE_CHECKING:
    from mistill.text.vocabulary import Vocabulary
    from tune.settings import SupervisedSettings

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read to tune on.

    Attributes:
        training: Blocks to learn from.
        judged: Blocks to judge on.
        prompts: Token ids of some held-out prompts, up to the answer.
        rows: How many rows of the texts were read.
        passed_over: How many of them could not be read, or held nothing to learn.
        left_out: How many conversations were left out because they are longer than a block.
    """

    training: TokenBlocks
    judged: TokenBlocks
    prompts: list[list[int]]
    rows: int
    passed_over: int
    left_out: int


def read_texts(
    texts: Texts, held_out: Texts | None, vocabulary: Vocabulary, settings: SupervisedSettings
) -> Reading:
    """Read text to tune on and text to judge on.

    Args:
        texts: Text to learn from.
        held_out: Text to judge on; if None, ``held_out_share`` of the documents of ``texts``,
            those with the same prompt together.
        vocabulary: The model's.
        settings: Block length, shares and seed.

    Returns:
        Both, and how many rows came to nothing.

    Raises:
        TextError: If a row cannot be read, a conversation is too long, or one of the two would be
            empty.
    """
    counts = RowCounts(sources_of(texts))
    documents, left_out = _read(texts, "texts", vocabulary, settings, counts)
    if held_out is None:
        documents, judged = split_documents(
            documents,
            settings.held_out_share,
            settings.seed,
            settings.block_length,
            groups=[_prompt(document) for document in documents],
        )
    else:
        judged, _ = _read(
            held_out, "held_out", vocabulary, settings, RowCounts(sources_of(held_out))
        )
        learned = {_prompt(document) for document in documents}
        again = sum(_prompt(document) in learned for document in judged)
        if again:
            _log.warning(
                "%d of %d held-out documents have a prompt that is also in the texts, so that they "
                "are not held out",
                again,
                len(judged),
            )
    training, blocks = packed_pair(documents, judged, settings)
    prompts = [
        document.ids[: _prompt_length(document)].tolist()
        for document in judged
        if _is_conversation(document)
    ]
    return Reading(
        training=training,
        judged=blocks,
        prompts=_evenly(prompts, settings.replies),
        rows=counts.rows,
        passed_over=counts.passed_over,
        left_out=left_out,
    )


def _read(
    texts: Texts,
    name: str,
    vocabulary: Vocabulary,
    settings: SupervisedSettings,
    counts: RowCounts,
) -> tuple[list[Document], int]:
    """The documents of a text, and how many conversations were left out for their length."""
    documents = list(
        read_documents(
            texts,
            vocabulary,
            skip_bad_rows=settings.skip_bad_rows,
            block_length=settings.block_length,
            counts=counts,
        )
    )
    too_long = [
        document
        for document in documents
        if len(document.ids) > settings.block_length and _is_conversation(document)
    ]
    if not too_long or settings.long_conversations == "split":
        return documents, 0
    longest = max(len(document.ids) for document in too_long)
    words = (
        f"{len(too_long)} of {len(documents)} conversations of the {name} are longer than a block "
        f"of {settings.block_length} tokens, the longest has {longest}"
    )
    if settings.long_conversations == "refuse":
        raise TextError(
            f"{words}; raise block_length, or say by long_conversations whether to leave_out or "
            "split them"
        )
    _log.warning("%s; they are left out", words)
    long_ones = {id(document) for document in too_long}
    rest = [document for document in documents if id(document) not in long_ones]
    if not rest:
        raise TextError(f"{words}, so that nothing is left; raise block_length")
    return rest, len(too_long)


def _is_conversation(document: Document) -> bool:
    """Whether only a part of a document is to be learned."""
    return not bool(document.mask[1:].all())


def _prompt_length(document: Document) -> int:
    """Tokens before the first that is to be learned."""
    learned: NDArray[np.int64] = np.flatnonzero(document.mask)
    return int(learned[0]) if len(learned) else len(document.ids)


def _prompt(document: Document) -> bytes:
    """What two documents with the same prompt share; of plain text, the whole of it."""
    end = _prompt_length(document) if _is_conversation(document) else len(document.ids)
    return document.ids[:end].tobytes()


def _evenly(prompts: Sequence[list[int]], wanted: int) -> list[list[int]]:
    if not wanted or not prompts:
        return []
    places = np.linspace(0, len(prompts) - 1, min(wanted, len(prompts))).round().astype(int)
    return [prompts[place] for place in places]
