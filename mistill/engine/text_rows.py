"""The KV cache of several texts, a row for each, and the graph bound to rows that stand together.

A step of the graph reads all weights, whether for one text or for eight, so that a step over many
rows costs little more than a step over one. The rows of a step must stand side by side in the
buffers, which the graph reads and extends in place; a step copies nothing.

The buffers have room for the whole context in every row, in pages that take memory only once
something is written to them.

B is batch, T positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from mistill.engine.key_value_cache import as_value, cache_shapes, pages, window_of
from mistill.engine.onnx_session import run_bound
from mistill.engine.prefix_store import StoredText

MOST_BINDINGS = 128
"""Groups of rows whose bindings are kept; to bind a group takes about half a millisecond.

Prompts are read in one row after another, so that fewer than there are rows would be of no use.
"""

Scored = Literal["none", "last", "every"]
"""Of which positions of a chunk the scores are wanted."""


class TextRows:
    """Keys and values of several texts, and the graph that extends them.

    Attributes:
        texts: The tokens of each row whose keys and values are in the buffers.
        read_together: How many positions of each row, from its first, were read in pairs: in runs
            of an even number of positions. ONNX Runtime computes the attention of a position that
            is read alone on another path, with other rounding, and some of its products take two
            positions at a time and round the last of an odd number otherwise.
        position_bytes: Memory that the keys and values of one position take.
    """

    texts: list[list[int]]
    read_together: list[int]
    position_bytes: int

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        rows: int,
        context_length: int,
        vocabulary_size: int,
    ) -> None:
        """Make rows without a text, and one more that stands beside the last of them.

        Args:
            session: Session of the graph, on the processor.
            rows: Number of rows.
            context_length: Most positions of a text.
            vocabulary_size: Number of logits for each position, V.
        """
        self.texts = [[] for _ in range(rows)]
        self.read_together = [0] * rows
        self.position_bytes = bytes_per_position(session)
        self._session = session
        shapes = cache_shapes(session)
        # In buffers longer than the text, a graph with a sliding window drops nothing.
        # One position more is read where positions are read in pairs.
        capacity = max(context_length + 1, window_of(session) or 0)
        self.texts.append([])
        self.read_together.append(0)
        self._arrays = {
            name: pages((rows + 1, heads, _whole_pages(capacity, width, dtype), width), dtype)
            for name, (heads, width, dtype) in shapes.items()
        }
        self._memory = {name: _mapped(array) for name, array in self._arrays.items()}
        for memory in self._memory.values():
            # A huge page would take two megabytes where a short text needs four kilobytes.
            _advise(memory, "MADV_NOHUGEPAGE", 0, len(memory))
        self._ones = np.ones((1, capacity), np.int64)
        # One buffer for all bindings: what a run writes is valid until the next.
        self._logits = np.empty((rows + 1, 1, vocabulary_size), np.float32)
        self._bindings: OrderedDict[tuple[int, int], _Binding] = OrderedDict()

    def step(
        self, first: int, tokens: Sequence[int], *, paired: bool = False
    ) -> NDArray[np.float32]:
        """Read one more token of each of some rows that stand side by side.

        Args:
            first: The first of the rows.
            tokens: One for each row.
            paired: Whether to compute an even number of rows, so that the scores of each do not
                depend on how many there are. The row beside the last one is computed too where
                that is needed; its text stays as it is.

        Returns:
            Scores of the next token of each, shape (B, V); valid until the next run.
        """
        count = len(tokens)
        ids = [*tokens, 0] if paired and count % 2 else tokens
        texts = self.texts[first : first + len(ids)]
        if len(ids) == 1:
            mask = self._ones[:, : len(texts[0]) + 1]
        else:
            lengths = np.array([len(text) + 1 for text in texts])
            # The number of ones in a row of the mask is the length of its text.
            mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        binding = self._binding(first, len(ids))
        binding.ids[:, 0] = ids
        binding.bind(binding.ids, binding.logits)
        self._run(binding, mask)
        for text, token in zip(texts, tokens, strict=False):
            text.append(token)
        logits: NDArray[np.float32] = binding.logits[:count, 0]
        return logits

    def read(
        self, row: int, tokens: Sequence[int], scored: Scored = "last", *, paired: bool = False
    ) -> NDArray[np.float32]:
        """Read the tokens that follow in one row.

        Args:
            row: The row.
            tokens: At least one.
            scored: Of which positions the scores are wanted; none saves a millisecond.
            paired: Whether to compute an even number of positions, so that the scores of each do
                not depend on how many there are; a token that is not kept is read where needed.

        Returns:
            Scores of the next token at every position, at the last one or at none, shape (T, V),
            (1, V) or (0, V); valid until the next run.
        """
        text, count = self.texts[row], len(tokens)
        binding = self._binding(row, 1)
        ids = np.array([[*tokens, tokens[-1]] if paired and count % 2 else tokens], np.int64)
        ours = scored == "last" and not paired
        first = {"none": ids.size, "last": ids.size - 2 if paired else -1, "every": 0}[scored]
        binding.bind(ids, binding.logits if ours else None, first)
        self._run(binding, self._ones[:, : len(text) + ids.size])
        if self.read_together[row] == len(text):
            self.read_together[row] += count if ids.size % 2 == 0 else count - 1
        text.extend(tokens)
        logits = (binding.logits if ours else binding.graph.get_outputs()[-1].numpy())[0]
        scores: NDArray[np.float32] = logits[: len(logits) - (ids.size - count)]
        return scores[-1:] if scored == "last" else scores

    def rounds_by_rows(self) -> bool:
        """Whether the scores of a row depend on how many others are computed in the same step.

        Returns:
            True if the last bit of any score does.
        """
        spare = len(self.texts) - 1
        self.read(spare, [0, 0], "none")
        alone = self.step(spare, [0])[0].copy()
        self.rewind(spare, 2)
        both = self.step(spare - 1, [0, 0])[1]
        self.rewind(spare - 1, len(self.texts[spare - 1]) - 1)
        self.rewind(spare, 0)
        return not np.array_equal(alone, both)

    def rewind(self, row: int, positions: int) -> None:
        """Remove all but the first positions of a row.

        Args:
            row: The row.
            positions: Number of positions to keep.
        """
        del self.texts[row][positions:]
        self.read_together[row] = min(self.read_together[row], positions)

    def copy(self, source: int, target: int, positions: int) -> None:
        """Copy the first positions of a row into another.

        Args:
            source: The row to copy.
            target: The row to overwrite.
            positions: Number of positions.
        """
        for array in self._arrays.values():
            array[target, :, :positions] = array[source, :, :positions]
        self.texts[target] = self.texts[source][:positions]
        self.read_together[target] = min(self.read_together[source], positions)

    def values(self, row: int) -> dict[str, NDArray[Any]]:
        """The keys and values of a row.

        Args:
            row: The row.

        Returns:
            Views of the buffers by name, shape (heads, T, width).
        """
        length = len(self.texts[row])
        return {name: array[row, :, :length] for name, array in self._arrays.items()}

    def load(self, row: int, text: StoredText, positions: int) -> None:
        """Copy the first positions of a stored text into a row.

        Args:
            row: The row to overwrite.
            text: The text.
            positions: Number of positions.
        """
        for name, array in self._arrays.items():
            array[row, :, :positions] = text.values[name][:, :positions]
        self.texts[row] = text.ids[:positions]
        self.read_together[row] = min(text.read_together, positions)

    def release(self, row: int) -> None:
        """Forget a row, and give its memory back to the system where that can be done.

        Args:
            row: The row.
        """
        self.rewind(row, 0)
        for name, array in self._arrays.items():
            _advise(self._memory[name], "MADV_DONTNEED", row * array[row].nbytes, array[row].nbytes)

    def exchange(self, first: int, second: int) -> None:
        """Let two rows change places.

        Args:
            first: A row.
            second: Another row.
        """
        if len(self.texts[first]) < len(self.texts[second]):
            first, second = second, first
        long, short = len(self.texts[first]), len(self.texts[second])
        for array in self._arrays.values():
            copy = array[second, :, :short].copy()
            array[second, :, :long] = array[first, :, :long]
            array[first, :, :short] = copy
        texts, together = self.texts, self.read_together
        texts[first], texts[second] = texts[second], texts[first]
        together[first], together[second] = together[second], together[first]

    def _binding(self, first: int, count: int) -> _Binding:
        key = first, count
        if key in self._bindings:
            self._bindings.move_to_end(key)
            return self._bindings[key]
        if len(self._bindings) == MOST_BINDINGS:
            self._bindings.popitem(last=False)
        arrays = {name: array[first : first + count] for name, array in self._arrays.items()}
        binding = self._bindings[key] = _Binding(self._session, arrays, self._logits[:count])
        return binding

    def _run(self, binding: _Binding, mask: NDArray[np.int64]) -> None:
        binding.graph.bind_cpu_input("attention_mask", mask)
        run_bound(self._session, binding.graph)


class _Binding:
    """The graph bound to some rows; only what changes is bound again.

    Attributes:
        graph: ONNX Runtime's binding.
        ids: Input of a step, shape (B, 1).
        logits: Output at the last position, shape (B, 1, V).
    """

    graph: onnxruntime.IOBinding
    ids: NDArray[np.int64]
    logits: NDArray[np.float32]

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        arrays: dict[str, NDArray[Any]],
        logits: NDArray[np.float32],
    ) -> None:
        """Bind keys and values.

        Args:
            session: Session of the graph.
            arrays: The rows of each buffer by name.
            logits: Where the scores of a step go, shape (B, 1, V).
        """
        self.graph = session.io_binding()
        for name, array in arrays.items():
            value = as_value(array)
            self.graph.bind_ortvalue_input(f"past_key_values.{name}", value)
            self.graph.bind_ortvalue_output(f"present.{name}", value)
            rows = len(array)
        self.ids = np.zeros((rows, 1), np.int64)
        self.logits = logits
        self._bound: tuple[Any, Any] | None = None

    def bind(
        self, ids: NDArray[np.int64], logits: NDArray[np.float32] | None, first_logit: int = -1
    ) -> None:
        """Bind tokens and where logits go, unless they are bound since the last run.

        Args:
            ids: Shape (B, T).
            logits: ``self.logits``, or None to let ONNX Runtime allocate them, as it must for any
                number of positions but one, which the graph declares.
            first_logit: The first position whose logits are computed.
        """
        if self._bound is not None and self._bound[0] is ids and self._bound[1] is logits:
            return
        self.graph.bind_ortvalue_input("input_ids", as_value(ids))
        self.graph.bind_ortvalue_input("first_logit", as_value(np.array([first_logit], np.int64)))
        # Bound after the cache, so that it is the last output.
        if logits is None:
            self.graph.bind_output("logits")
        else:
            self.graph.bind_ortvalue_output("logits", as_value(logits))
        self._bound = ids, logits


def _whole_pages(capacity: int, width: int, dtype: type[np.generic]) -> int:
    """Positions, at least so many, so that each head of a row takes whole pages."""
    step = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, width * np.dtype(dtype).itemsize)
    return -(-capacity // step) * step


def _mapped(array: NDArray[Any]) -> mmap.mmap:
    """The memory that ``pages`` mapped for an array."""
    base: Any = array
    while not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else base.base
    memory: mmap.mmap = base
    return memory


def _advise(memory: mmap.mmap, advice: str, start: int, size: int) -> None:
    """Tell the system how memory is used, where it can be told so."""
    if hasattr(mmap, advice):
        # A kernel without huge pages knows no advice about them.
        with contextlib.suppress(OSError):
            memory.madvise(getattr(mmap, advice), start, size)


def bytes_per_position(session: onnxruntime.InferenceSession) -> int:
    """Memory that the keys and values of one position take.

    Args:
        session: Session of the graph.

    Returns:
        Bytes.
    """
    return sum(
        math.prod((heads, width)) * np.dtype(dtype).itemsize
        for heads, width, dtype in cache_shapes(session).values()
    )
