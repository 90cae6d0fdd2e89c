"""Keys and values of the tokens that a model has read: what makes the next token cheap.

The graph reads and extends the buffers in place. Taking tokens back is forgetting how many of the
positions count, so a text that begins like the last one is read from where the two part.

A graph whose model looks back a limited way may keep no more than that: its buffers have a fixed
number of rows, and attention drops the oldest, many at once, when they are full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

FIRST_CAPACITY = 512
"""Positions that the cache has room for at first."""

WINDOW_SLACK = 256
"""Rows beyond a window: old positions are dropped once in so many tokens, by moving the others."""

WINDOW_PROPERTY = "mistill.sliding_window_cache"
"""Entry of a graph's metadata: the positions that a query sees, where older ones are dropped."""

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

    Attributes:
        ids: The tokens whose keys and values are in the buffers.
        values: The buffers by name, such as ``0.key``; a new dictionary when they have moved.
        context_length: Most positions there can be.
        shapes: Heads and width of a head, and the type, of each buffer by name.
        window: Positions that a query sees, where the graph drops older ones; None where it keeps
            all.
    """

    ids: list[int]
    values: dict[str, onnxruntime.OrtValue]
    context_length: int
    shapes: dict[str, tuple[int, int, type[np.generic]]]
    window: int | None

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        context_length: int,
        device: Device = "cpu",
    ) -> None:
        """Make an empty cache for a graph.

        Args:
            session: The graph, whose inputs say how large a position is.
            context_length: Most positions there can be.
            device: Where the buffers are.
        """
        self.ids = []
        self.values = {}
        self.context_length = context_length
        self.shapes = cache_shapes(session)
        self.window = window_of(session)
        self._capacity = 0
        self._device = device
        # Of a cache on the processor only: the same memory as the values.
        self._arrays: dict[str, NDArray[Any]] = {}

    @property
    def size_bytes(self) -> int:
        """Memory that the buffers take."""
        return self._capacity * sum(
            heads * width * np.dtype(kind).itemsize for heads, width, kind in self.shapes.values()
        )

    def rewind(self, count: int) -> None:
        """Forget all but the first tokens; what comes next overwrites their keys and values.

        Where older positions were dropped that a shorter text would need, nothing is kept.

        Args:
            count: How many tokens to keep.
        """
        back = len(self.ids) - count
        if back > 0 and self._rows(count) != self._rows(len(self.ids)) - back:
            count = 0
        del self.ids[count:]

    def reserve(self, positions: int) -> None:
        """Make room for this many positions, and keep what is there.

        Args:
            positions: At most ``context_length``.
        """
        if positions <= self._capacity or (self.window is not None and self._capacity):
            return
        capacity = max(self._capacity, min(FIRST_CAPACITY, self.context_length))
        while capacity < positions:
            capacity = min(2 * capacity, self.context_length)
        self._replace(self.used(), self._fixed_capacity() or capacity)

    def used(self) -> dict[str, NDArray[Any]]:
        """The keys and values that count.

        Returns:
            Arrays by name, shape (1, heads, rows, width), a row for each token that was not
            dropped; views of the buffers where those are in the processor's memory.
        """
        if not self.ids:
            return {}
        arrays = self._arrays or {name: value.numpy() for name, value in self.values.items()}
        rows = self._rows(len(self.ids))
        return {name: array[:, :, :rows] for name, array in arrays.items()}

    def restore(self, ids: Sequence[int], kept: Mapping[str, NDArray[Any]]) -> None:
        """Take over the keys and values of a text that was read before.

        Args:
            ids: Its tokens, at most ``context_length``.
            kept: What ``used`` gave for them.
        """
        self.ids = []
        capacity = max(self._capacity, min(FIRST_CAPACITY, self.context_length))
        while capacity < len(ids):
            capacity = min(2 * capacity, self.context_length)
        self._replace(kept, self._fixed_capacity() or capacity)
        self.ids = list(ids)

    def _fixed_capacity(self) -> int | None:
        return None if self.window is None else self.window + WINDOW_SLACK

    def _rows(self, tokens: int) -> int:
        """Rows that are in use after some tokens, as GroupQueryAttention defines it."""
        if self.window is None or tokens <= self._capacity:
            return tokens
        dropped = self._capacity - self.window + 1
        return tokens - dropped * -(-(tokens - self._capacity) // dropped)

    def _replace(self, kept: Mapping[str, NDArray[Any]], capacity: int) -> None:
        arrays = {}
        for name, (heads, width, kind) in self.shapes.items():
            arrays[name] = np.empty((1, heads, capacity, width), kind)
            if kept:
                arrays[name][:, :, : kept[name].shape[2]] = kept[name]
        self.values = {name: as_value(array, self._device) for name, array in arrays.items()}
        self._arrays = arrays if self._device == "cpu" else {}
        self._capacity = capacity


def cache_shapes(
    session: onnxruntime.InferenceSession,
) -> dict[str, tuple[int, int, type[np.generic]]]:
    """How large a position of the cache is.

    Args:
        session: The graph.

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
        session: The graph.

    Returns:
        Positions; None if it keeps all.
    """
    found = session.get_modelmeta().custom_metadata_map.get(WINDOW_PROPERTY)
    return None if found is None else int(found)


def as_value(array: NDArray[Any], device: Device = "cpu") -> onnxruntime.OrtValue:
    """An array as ONNX Runtime sees it.

    Args:
        array: Contiguous.
        device: Where it shall be.

    Returns:
        The same memory on the processor, a copy on another device.
    """
    if device == "cpu":
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts share from the start.

    Args:
        first: Token ids.
        second: Token ids.

    Returns:
        At most the length of the shorter one.
    """
    shorter = min(len(first), len(second))
    # Usually one is the beginning of the other, and a list compares thousands in microseconds.
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(place for place in range(shorter) if first[place] != second[place])
