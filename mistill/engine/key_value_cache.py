"""The KV cache: keys and values of the tokens that a model has read.

The graph reads and extends the buffers in place. Removing tokens from the end only changes the
number of positions in use, so that a text with a common prefix is read from where it differs.

A graph with a sliding window may have buffers with a fixed number of rows. When they are full,
attention drops the oldest rows, many at once.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

FIRST_CAPACITY = 512
"""Initial capacity of the cache in positions."""

WINDOW_SLACK = 256
"""Rows beyond the window; old positions are dropped once in this many tokens, by moving others."""

WINDOW_PROPERTY = "mistill.sliding_window_cache"
"""Entry of a graph's metadata: the sliding window, if the graph drops older positions."""

CACHE_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}

Device = Literal["cpu", "cuda"]


class KeyValueCache:
    """Keys and values of the tokens read so far, one buffer for each tensor of each layer.

    A buffer has room for more positions than are used, and more room is made by doubling it:
    room for the whole context at once would cost a laptop gigabytes that most chats never use.
    Buffers move one after another, so that there is never room for two caches in memory.

    Attributes:
        ids: The tokens whose keys and values are in the buffers.
        read_together: How many of them, from the first, were read in runs of an even number of
            positions; see ``chunk_size``.
        values: The buffers by name, such as ``0.key``.
        context_length: Most positions there can be.
        shapes: Heads and width of a head, and the type, of each buffer by name.
        window: Positions that a query sees, where the graph drops older ones; None where it keeps
            all.
    """

    ids: list[int]
    read_together: int
    values: dict[str, onnxruntime.OrtValue]
    context_length: int
    shapes: dict[str, tuple[int, int, type[np.generic]]]
    window: int | None

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        context_length: int,
        device: Device = "cpu",
        before_move: Callable[[], None] = lambda: None,
    ) -> None:
        """Make an empty cache for a graph.

        Args:
            session: The graph, whose inputs say how large a position is.
            context_length: Most positions there can be.
            device: Device of the buffers.
            before_move: Called before the buffers move, so that a binding can release them.
        """
        self.ids = []
        self.read_together = 0
        self.values = {}
        self.context_length = context_length
        self.shapes = cache_shapes(session)
        self.window = window_of(session)
        self._capacity = 0
        self._device = device
        self._before_move = before_move
        # Views of the same memory as the values, only for a cache on the CPU.
        self._arrays: dict[str, NDArray[Any]] = {}

    @property
    def size_bytes(self) -> int:
        """Memory that the buffers take."""
        return self._capacity * sum(
            heads * width * np.dtype(dtype).itemsize for heads, width, dtype in self.shapes.values()
        )

    def rewind(self, count: int) -> None:
        """Remove all but the first tokens; later ones overwrite their keys and values.

        If older positions were dropped that the shorter text needs, all tokens are removed.

        Args:
            count: Number of tokens to keep.
        """
        back = len(self.ids) - count
        if back > 0 and self._rows(count) != self._rows(len(self.ids)) - back:
            count = 0
        del self.ids[count:]
        self.read_together = min(self.read_together, len(self.ids))

    def can_take_back(self, count: int) -> bool:
        """Whether the token after so many can be read and removed without the loss of others.

        Args:
            count: Number of tokens before it.

        Returns:
            False where the graph drops old positions to read it.
        """
        return self._rows(count + 1) == self._rows(count) + 1

    def extend(self, tokens: Sequence[int]) -> None:
        """Note tokens that the graph has read in one run.

        Args:
            tokens: The tokens that follow.
        """
        if self.read_together == len(self.ids):
            self.read_together += len(tokens) - len(tokens) % 2
        self.ids += tokens

    def copy(self, other: KeyValueCache, count: int) -> None:
        """Replace the content by the first tokens of another cache of the same graph.

        Args:
            other: A cache that keeps all positions.
            count: Number of tokens.
        """
        if count:
            values = {name: array[:, :, :count] for name, array in other.used().items()}
            self.restore(other.ids[:count], values, other.read_together)

    def reserve(self, positions: int) -> None:
        """Make room for this many positions, and keep those in use.

        Args:
            positions: At most ``context_length``.
        """
        if positions > self._capacity and (self.window is None or not self._capacity):
            ids, together = self.ids, self.read_together
            self._move(self._room(positions), self.used())
            self.ids, self.read_together = ids, together

    def used(self) -> dict[str, NDArray[Any]]:
        """The keys and values in use.

        Returns:
            Arrays by name, shape (1, heads, rows, width), a row for each token that was not
            dropped; views of the buffers where those are in the processor's memory.
        """
        if not self.ids:
            return {}
        rows = self._rows(len(self.ids))
        return {name: self._array(name)[:, :, :rows] for name in self.values}

    def fits(self, ids: Sequence[int], values: Mapping[str, NDArray[Any]]) -> bool:
        """Whether keys and values of a file are those of some tokens in this graph.

        Args:
            ids: The tokens.
            values: Arrays by name.

        Returns:
            True if there is an array for each buffer, with its heads, width and type, and rows
            for the tokens.
        """
        if not ids:
            return not values
        if values.keys() != self.shapes.keys():
            return False
        rows = {array.shape[2] if array.ndim == 4 else 0 for array in values.values()}
        most = len(ids) if self.window is None else min(len(ids), self._room(len(ids)))
        least = len(ids) if self.window is None else 1
        return (
            len(rows) == 1
            and least <= min(rows) <= most
            and all(
                values[name].shape == (1, heads, min(rows), width) and values[name].dtype == dtype
                for name, (heads, width, dtype) in self.shapes.items()
            )
        )

    def restore(
        self, ids: Sequence[int], values: Mapping[str, NDArray[Any]], read_together: int = 0
    ) -> None:
        """Replace the content by keys and values of a text that was read before.

        Args:
            ids: Its tokens, at most ``context_length``.
            values: The keys and values that ``used`` returned for them.
            read_together: How many of them were read in runs of an even number.
        """
        self._move(self._room(len(ids)), dict(values))
        self.ids = list(ids)
        self.read_together = min(read_together, len(self.ids))

    def _rows(self, tokens: int) -> int:
        """Rows that are in use after some tokens, as GroupQueryAttention defines it."""
        if self.window is None or tokens <= self._capacity:
            return tokens
        dropped = self._capacity - self.window + 1
        return tokens - dropped * -(-(tokens - self._capacity) // dropped)

    def _room(self, positions: int) -> int:
        """Capacity for so many positions: that of now, doubled until they fit."""
        if self.window is not None:
            return self.window + WINDOW_SLACK
        capacity = max(self._capacity, min(FIRST_CAPACITY, self.context_length))
        while capacity < positions:
            capacity = min(2 * capacity, self.context_length)
        return capacity

    def _array(self, name: str) -> NDArray[Any]:
        return self._arrays[name] if self._arrays else self.values[name].numpy()

    def _move(self, capacity: int, values: dict[str, NDArray[Any]]) -> None:
        """Take new buffers, one after another; if it is interrupted, the cache is left empty.

        Args:
            capacity: Positions that they have room for.
            values: Keys and values to copy into them; each array is released once it is copied.
        """
        self.ids, self.read_together, self._capacity = [], 0, 0
        self._before_move()
        for name, (heads, width, dtype) in self.shapes.items():
            array = pages((1, heads, capacity, width), dtype)
            if values:
                old = values.pop(name)
                array[:, :, : old.shape[2]] = old
                del old
            self.values[name] = as_value(array, self._device)
            if self._device == "cpu":
                self._arrays[name] = array
        self._capacity = capacity


def cache_shapes(
    session: onnxruntime.InferenceSession,
) -> dict[str, tuple[int, int, type[np.generic]]]:
    """How large a position of the cache is.

    Args:
        session: Session of the graph.

    Returns:
        Heads, width of a head and type by the buffer's name, such as ``0.key``.
    """
    return {
        entry.name.removeprefix("past_key_values."): (
            entry.shape[1],
            entry.shape[3],
            CACHE_TYPES[entry.type],
        )
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values.")
    }


def window_of(session: onnxruntime.InferenceSession) -> int | None:
    """Positions that a query sees, if a graph drops older ones from its buffers.

    Args:
        session: Session of the graph.

    Returns:
        Positions; None if it keeps all.
    """
    stated = session.get_modelmeta().custom_metadata_map.get(WINDOW_PROPERTY)
    return None if stated is None else int(stated)


def as_value(array: NDArray[Any], device: Device = "cpu") -> onnxruntime.OrtValue:
    """An array as ONNX Runtime sees it.

    Args:
        array: A contiguous array.
        device: Device of the value.

    Returns:
        The same memory on the processor, a copy on another device.
    """
    if device == "cpu":
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)


def pages(shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """An array in pages of its own, which take memory when written and return it when freed.

    The C library often keeps the memory of ``np.empty``, so that a cache that moves would take it
    twice.

    Args:
        shape: Shape of the array.
        dtype: Type of its elements.

    Returns:
        Zeros.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if sys.platform == "win32":
        pages = mmap.mmap(-1, size)
    else:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype).reshape(shape)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts share from the start.

    Args:
        first: Token ids.
        second: Token ids.

    Returns:
        At most the length of the shorter one.
    """
    shorter = min(len(first), len(second))
    # Usually one text is a prefix of the other, and comparing lists takes microseconds.
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(index for index in range(shorter) if first[index] != second[index])
