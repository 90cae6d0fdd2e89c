"""Text that a model is not tuned on, by which a report says what it has forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

from mistill.errors import TextError, VocabularyError
from mistill.folders.lineage import without_paths
from mistill.settings import require
from mistill.text.blocks import TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.rows import Texts, check_texts, first_row, sources_of
from mistill.text.vocabulary import Vocabulary

OWN = "@demo-held-out"
"""The conversations that are read where no other text is named; mistill ships them."""

# Tokens of a block, at most.
_BLOCK_LENGTH = 512
# Conversations of the shipped text that are read as plain text at most.
_PLAIN_ROWS = 50


class OtherTextSettings(Protocol):
    """How much other text is read; the settings of what tunes a language model have these."""

    @property
    def other_tokens(self) -> int:
        """Most tokens of other text; 0 reads none."""

    @property
    def skip_bad_rows(self) -> bool:
        """Whether rows that cannot be read are passed over."""


@dataclass(frozen=True, eq=False)
class OtherText:
    """Text beside that which a model learns.

    Attributes:
        names: What was read.
        blocks: The text.
    """

    names: list[str]
    blocks: TokenBlocks


def check_other_text(texts: Texts | None, settings: OtherTextSettings) -> None:
    """Refuse other text that is missing or of an unknown kind, or that would not be read.

    Args:
        texts: As it was named; None where it was not.
        settings: How much of it is read.

    Raises:
        SettingsError: If text is named and none is read.
        TextError: If it cannot be read.
    """
    if texts is None:
        return
    require(
        settings.other_tokens > 0,
        "other_texts names text, and other_tokens 0 reads none of it; leave one of them out",
    )
    check_texts(texts, skip_bad_rows=settings.skip_bad_rows)


def read_other_text(
    texts: Texts | None, vocabulary: Vocabulary, context_length: int, settings: OtherTextSettings
) -> OtherText | None:
    """Read the beginning of a text that a model is not tuned on.

    Args:
        texts: As it was named; the shipped conversations where it was not, of which a model
            without a chat template, or with one that cannot write them, reads the replies alone.
        vocabulary: The model's.
        context_length: The model's.
        settings: How much is read.

    Returns:
        The text; None where none is asked for.

    Raises:
        TextError: If the text cannot be read, or holds nothing to predict.
        VocabularyError: If it holds conversations and there is no chat template.
    """
    if not settings.other_tokens:
        return None
    length = min(_BLOCK_LENGTH, context_length)

    def blocks(source: Texts, skip_bad_rows: bool) -> TokenBlocks:
        documents = read_documents(
            source,
            vocabulary,
            limit=settings.other_tokens,
            skip_bad_rows=skip_bad_rows,
            block_length=length,
        )
        packed = pack(documents, length)
        kept = packed[np.flatnonzero(packed.kept.any(axis=1))]
        if not len(kept):
            raise TextError(
                f"the first {settings.other_tokens} tokens of the other texts hold nothing to "
                "predict; raise other_tokens or name other text"
            )
        return kept

    if texts is not None:
        names = [str(name) for name in without_paths(sources_of(texts))]
        return OtherText(names, blocks(texts, settings.skip_bad_rows))
    try:
        return OtherText([OWN], blocks(OWN, skip_bad_rows=True))
    except (TextError, VocabularyError):
        return OtherText([f"{OWN}, replies"], blocks(list(_replies()), skip_bad_rows=False))


def _replies() -> Iterator[str]:
    """The replies of the shipped conversations, as plain text."""
    for row in islice(first_row(OWN), _PLAIN_ROWS):
        yield "\n\n".join(
            str(turn["content"]) for turn in row.value["messages"] if turn["role"] == "assistant"
        )
