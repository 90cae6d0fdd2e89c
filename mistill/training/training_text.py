"""Text to learn from and text to judge on, as blocks.

Documents that are judged on are never learnt from. Every block holds something to be predicted.

N is blocks, T positions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mistill.errors import TextError
from mistill.text.blocks import Document, TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.rows import Texts
from mistill.training.kept_back import without_kept_back

if TYPE_CHECKING:
    from mistill.text.vocabulary import Vocabulary


class ReadingSettings(Protocol):
    """How text is read and shared; the settings of whatever trains have these fields."""

    @property
    def block_length(self) -> int:
        """Tokens of a block, T."""

    @property
    def held_out_share(self) -> float:
        """How much of the text is kept from training, where no held-out text is given."""

    @property
    def held_out_tokens(self) -> int:
        """Most tokens to judge on."""

    @property
    def skip_bad_rows(self) -> bool:
        """Whether rows that cannot be read are passed over."""

    @property
    def seed(self) -> int:
        """Decides which documents are held out."""


def read_blocks(
    texts: Texts,
    held_out: Texts | None,
    vocabulary: Vocabulary,
    settings: ReadingSettings,
    kept_back: float = 0.0,
) -> tuple[TokenBlocks, TokenBlocks]:
    """Read text into blocks to learn from and blocks to judge on.

    Args:
        texts: Text to learn from.
        held_out: Text to judge on; if None, ``held_out_share`` of the documents of ``texts``.
        vocabulary: The one that all models share.
        settings: Block length, shares and seed.
        kept_back: Share of the documents to learn from that is left to a later step, 0 to 1.

    Returns:
        Training blocks and held-out blocks; every block has a kept position.

    Raises:
        TextError: If one of the two would be empty.
    """
    reading: dict[str, Any] = {
        "skip_bad_rows": settings.skip_bad_rows,
        "block_length": settings.block_length,
    }
    documents = without_kept_back(read_documents(texts, vocabulary, **reading), kept_back)
    if held_out is None:
        documents, judged = split_documents(
            documents, settings.held_out_share, settings.seed, settings.block_length
        )
    else:
        judged = list(read_documents(held_out, vocabulary, **reading))
    return packed_pair(documents, judged, settings)


def packed_pair(
    documents: Sequence[Document], judged: Sequence[Document], settings: ReadingSettings
) -> tuple[TokenBlocks, TokenBlocks]:
    """Pack documents to learn from and documents to judge on.

    Args:
        documents: To learn from.
        judged: To judge on; of their blocks as many are taken, evenly, as the settings allow.
        settings: Block length and tokens to judge on.

    Returns:
        Training blocks and held-out blocks; every block has a kept position.

    Raises:
        TextError: If one of the two would be empty.
    """
    training_blocks = _kept_blocks(documents, settings.block_length, "texts")
    judged_blocks = _kept_blocks(judged, settings.block_length, "held_out")
    count = max(1, settings.held_out_tokens // settings.block_length)
    return training_blocks, _evenly(judged_blocks, count)


def split_documents(
    documents: Sequence[Document],
    share: float,
    seed: int,
    block_length: int = 1,
    groups: Sequence[Hashable] | None = None,
) -> tuple[list[Document], list[Document]]:
    """Keep some documents from training.

    Where every document is longer than the share, as where one file is all there is, the end of
    the longest is kept out.

    Args:
        documents: All documents.
        share: How much of them to keep out, by tokens, above 0 and below 1.
        seed: Decides which.
        block_length: Where longer documents are cut.
        groups: What each document belongs to, such as its prompt; those of one group stay on one
            side. None where every document stands alone.

    Returns:
        Documents to learn from and documents to judge on.

    Raises:
        TextError: If there is too little text to share.
    """
    sizes = [len(document.ids) for document in documents]
    most = int(share * sum(sizes))
    held_out: set[int] = set()
    held_out_tokens = 0
    together: dict[Hashable, list[int]] = {}
    for index in range(len(documents)):
        together.setdefault(index if groups is None else groups[index], []).append(index)
    members = list(together.values())
    for place in np.random.default_rng(seed).permutation(len(members)):
        size = sum(sizes[index] for index in members[place])
        if held_out_tokens + size <= most:
            held_out.update(members[place])
            held_out_tokens += size
    if held_out:
        learnt = [document for index, document in enumerate(documents) if index not in held_out]
        return learnt, [documents[index] for index in sorted(held_out)]
    if most < 2:
        raise TextError(
            f"the texts hold {sum(sizes)} tokens, of which a share of {share} is too little to "
            "judge the model on; give held_out texts or more text"
        )
    longest = int(np.argmax(sizes))
    divided = documents[longest]
    cut = sizes[longest] - most
    # Where the document is cut anyway, so that its pieces are those that targets were cached for.
    cut = cut // block_length * block_length or cut
    begin, end = (
        replace(divided, ids=divided.ids[part], mask=divided.mask[part])
        for part in (slice(None, cut), slice(cut, None))
    )
    return [*documents[:longest], begin, *documents[longest + 1 :]], [end]


def _kept_blocks(documents: Sequence[Document], block_length: int, name: str) -> TokenBlocks:
    """Pack documents and drop blocks that hold nothing to be predicted."""
    blocks = pack(documents, block_length)
    rows = np.flatnonzero(blocks.kept.any(axis=1))
    if len(rows) == 0:
        raise TextError(
            f"the {name} hold nothing to be predicted: {len(documents)} documents without a "
            "single token that follows another; give text, or conversations with replies"
        )
    return blocks[rows]


def _evenly(blocks: TokenBlocks, count: int) -> TokenBlocks:
    """Some of the blocks, evenly spaced from the first to the last."""
    if count >= len(blocks):
        return blocks
    return blocks[np.linspace(0, len(blocks) - 1, count).round().astype(np.int64)]
