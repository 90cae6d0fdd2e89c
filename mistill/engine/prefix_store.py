"""Texts that were read before, with their keys and values, so that they need not be read again.

To copy the keys and values of a token takes a hundredth of the time that reading it takes. The
store is bounded in bytes and forgets what was used least recently. A text is found by its owner
alone: the time to the first token tells whether a prompt was read before, so that users who shared
a store could guess each other's prompts (CVE-2025-46570).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistill.engine.key_value_cache import common_prefix, pages

LEAST_TOKENS = 16
"""A shorter text is not kept; reading it takes less time than looking after it."""


@dataclass(frozen=True, eq=False)
class StoredText:
    """A text that was read.

    Attributes:
        owner: For whom.
        ids: Its tokens.
        read_together: See ``TextRows.read_together``.
        values: Its keys and values by name, shape (heads, T, width).
        size_bytes: Memory that those take.
    """

    owner: str
    ids: list[int]
    read_together: int
    values: dict[str, NDArray[Any]]
    size_bytes: int


class Match(NamedTuple):
    """A stored text that begins as another one does.

    Attributes:
        text: The stored text; None if there is none.
        positions: How many tokens both share from the start.
    """

    text: StoredText | None
    positions: int


class PrefixStore:
    """Texts by owner, within a number of bytes.

    Attributes:
        most_bytes: Memory that the keys and values may take together.
        size_bytes: Memory that they take.
    """

    most_bytes: int
    size_bytes: int

    def __init__(self, most_bytes: int) -> None:
        """Make an empty store.

        Args:
            most_bytes: Memory that keys and values may take together; 0 keeps nothing.
        """
        self.most_bytes = most_bytes
        self.size_bytes = 0
        # The least recently used first.
        self._texts: list[StoredText] = []

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._texts)

    def longest(self, owner: str, ids: Sequence[int], *, together: bool = False) -> Match:
        """The text that shares the most tokens with another one.

        Args:
            owner: Whose texts may be used.
            ids: Tokens.
            together: Whether only positions count that were read together.

        Returns:
            The text and the number of tokens.
        """
        best = Match(None, 0)
        for text in self._texts:
            if text.owner == owner:
                shared = common_prefix(text.ids, ids)
                shared = min(shared, text.read_together) if together else shared
                if shared > best.positions:
                    best = Match(text, shared)
        return best

    def use(self, text: StoredText) -> None:
        """Note that a text was used, so that it is forgotten last.

        Args:
            text: A text of the store.
        """
        self._texts.remove(text)
        self._texts.append(text)

    def add(
        self, owner: str, ids: Sequence[int], read_together: int, values: dict[str, NDArray[Any]]
    ) -> None:
        """Keep a copy of a text's keys and values, and forget others to make room.

        Args:
            owner: For whom it was read.
            ids: Its tokens.
            read_together: See ``TextRows.read_together``.
            values: Its keys and values by name, shape (heads, T, width).
        """
        size = sum(array.nbytes for array in values.values())
        if len(ids) < LEAST_TOKENS or size > self.most_bytes:
            return
        for text in list(self._texts):
            shared = common_prefix(text.ids, ids) if text.owner == owner else 0
            if shared == len(ids) and text.read_together >= read_together:
                self.use(text)
                return
            if shared == len(text.ids) and text.read_together <= read_together:
                self._forget(text)
        self.shrink(self.most_bytes - size)
        text = StoredText(owner, list(ids), read_together, _copies(values, size), size)
        self._texts.append(text)
        self.size_bytes += size

    def shrink(self, most_bytes: int) -> None:
        """Forget what was used least recently.

        Args:
            most_bytes: Memory that the rest may take; less than 0 counts as 0.
        """
        while self.size_bytes > max(most_bytes, 0):
            self._forget(self._texts[0])

    def clear(self) -> None:
        """Forget all texts."""
        self._texts.clear()
        self.size_bytes = 0

    def _forget(self, text: StoredText) -> None:
        self._texts.remove(text)
        self.size_bytes -= text.size_bytes


def _copies(values: dict[str, NDArray[Any]], size: int) -> dict[str, NDArray[Any]]:
    """Copies in pages of their own, which are given back when the text is forgotten."""
    room, start, copies = pages((size,), np.uint8), 0, {}
    for name, array in values.items():
        end = start + math.prod(array.shape) * array.itemsize
        copies[name] = room[start:end].view(array.dtype).reshape(array.shape)
        copies[name][:] = array
        start = end
    return copies
