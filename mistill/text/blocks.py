"""Documents of token ids packed into blocks, with masks of what is to be predicted."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mistill.errors import TextError
from mistill.settings import require


@dataclass(frozen=True)
class Document:
    """One text or one conversation.

    Attributes:
        ids: Token ids, int64, shape (T,).
        mask: Bool, shape (T,), True where the token is to be predicted from those before it.
        number: Its place in the text, from 0, where not all documents of the text are packed; None
            for that among those that are.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    number: int | None = None


@dataclass(frozen=True)
class TokenBlocks:
    """Documents packed into blocks of one length, N blocks of T positions.

    The logits at position t predict the token at t + 1; ``kept`` marks the positions that count. To
    keep documents from attending to one another in a transformers model, give it ``position_ids``,
    no attention mask, and ``use_cache=False``.

    Attributes:
        ids: Token ids, int64, shape (N, T); 0 where there is no document.
        mask: Bool, shape (N, T), True where the token is to be predicted.
        documents: Number of the document at each position, int32, shape (N, T); -1 for none.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    documents: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: slice | NDArray[np.int64] | Sequence[int]) -> TokenBlocks:
        return TokenBlocks(self.ids[which], self.mask[which], self.documents[which])

    @property
    def block_length(self) -> int:
        """Positions in a block, T."""
        return int(self.ids.shape[1])

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Positions whose logits count, bool, shape (N, T); never the last of a document."""
        kept = np.zeros_like(self.mask)
        same = self.documents[:, 1:] == self.documents[:, :-1]
        kept[:, :-1] = self.mask[:, 1:] & same & (self.documents[:, 1:] >= 0)
        return kept

    @property
    def position_ids(self) -> NDArray[np.int64]:
        """Positions counted from 0 in every document, int64, shape (N, T)."""
        columns = np.broadcast_to(np.arange(self.block_length), self.ids.shape)
        begins = np.ones(self.ids.shape, bool)
        begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        return columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)

    @property
    def runs(self) -> NDArray[np.int64]:
        """Where each run of one document, or of padding, lies in its block, in row-major order.

        Shape (R, 3): the block, the first column, the column after the last.
        """
        begins = np.ones(self.documents.shape, bool)
        begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=self.documents.size)
        rows, columns = np.divmod(starts, self.block_length)
        return np.stack([rows, columns, columns + lengths], axis=1)

    @property
    def digest(self) -> str:
        """A hash of all that the blocks hold: ids, masks and document numbers, in hexadecimal."""
        digest = hashlib.sha256()
        for part in (self.ids, self.mask, self.documents):
            digest.update(f"{part.dtype} {part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens in all documents, padding left out."""
        return int((self.documents >= 0).sum())


def joined(parts: Sequence[TokenBlocks]) -> TokenBlocks:
    """Blocks of several texts as one set, in turn: the first of each, the second of each, ...

    Args:
        parts: Blocks of one length; at least one set.

    Returns:
        All blocks, so spread that any run of them holds every text in proportion. Documents are
        numbered anew.
    """
    documents, first = [], 0
    for part in parts:
        documents.append(np.where(part.documents < 0, -1, part.documents + first).astype(np.int32))
        first += int(part.documents.max()) + 1
    place = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in parts])
    order = np.argsort(place, kind="stable")
    return TokenBlocks(
        ids=np.concatenate([part.ids for part in parts])[order],
        mask=np.concatenate([part.mask for part in parts])[order],
        documents=np.concatenate(documents)[order],
    )


def pack(documents: Iterable[Document], block_length: int) -> TokenBlocks:
    """Pack documents into blocks of one length.

    A document that fits into a block is never split, because its end would be learned without its
    beginning. It goes into the fullest block with room for it, or a new one (best fit; Ding et al.,
    2024, https://arxiv.org/abs/2404.10830). A longer one is split every ``block_length`` tokens.
    Blocks are in the order in which they were started.

    Args:
        documents: Documents in their order.
        block_length: Positions in a block, T; at least 2.

    Returns:
        Blocks in which the first token of every part of a document is masked.

    Raises:
        TextError: If there are no documents.
    """
    require(block_length >= 2, f"block_length must be at least 2, not {block_length}")
    placed: list[tuple[int, int, int, Document, int]] = []  # block, column, number, document, start
    rooms: list[deque[int]] = [deque() for _ in range(block_length + 1)]  # blocks by room left
    open_rooms = 0  # bit r is set where a block has r positions left
    blocks = 0
    for place, document in enumerate(documents):
        number = place if document.number is None else document.number
        for start in range(0, len(document.ids), block_length):
            length = min(block_length, len(document.ids) - start)
            large_enough = open_rooms >> length << length
            room = (large_enough & -large_enough).bit_length() - 1
            if large_enough:
                block = rooms[room].popleft()
                if not rooms[room]:
                    open_rooms ^= 1 << room
            else:
                block, room, blocks = blocks, block_length, blocks + 1
            placed.append((block, block_length - room, number, document, start))
            padding = room - length
            if padding:
                rooms[padding].append(block)
                open_rooms |= 1 << padding
    if not placed:
        raise TextError("there is no text to pack")
    packed = TokenBlocks(
        ids=np.zeros((blocks, block_length), np.int64),
        mask=np.zeros((blocks, block_length), bool),
        documents=np.full((blocks, block_length), -1, np.int32),
    )
    for block, column, number, document, start in placed:
        tokens = slice(start, start + block_length)
        ids = document.ids[tokens]
        target = (block, slice(column, column + len(ids)))
        packed.ids[target] = ids
        packed.mask[target] = document.mask[tokens]
        packed.mask[block, column] = False
        packed.documents[target] = number
    return packed
