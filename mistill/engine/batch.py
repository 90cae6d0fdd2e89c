"""Decoding of several prompts at once: each step writes a token of every reply.

A step reads all weights, whether for one reply or for eight, so that a batch of replies costs
little more than one. The prefill is done one prompt after another, each into its own row of the
buffers, because reading many tokens keeps the processor busy by itself.

B is batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from mistill.engine.key_value_cache import as_value, cache_shapes, common_prefix, window_of
from mistill.engine.language_model import Choose
from mistill.engine.onnx_session import run_bound


def write_side_by_side(
    session: onnxruntime.InferenceSession,
    texts: Sequence[list[int]],
    limits: Sequence[int],
    chooses: Sequence[Choose],
    *,
    end_ids: Collection[int],
    chunk: int,
) -> None:
    """Continue several texts at once.

    Args:
        session: Session of the graph.
        texts: Token ids, at least one in each; written tokens are appended.
        limits: The greatest length of each text, at least its present one.
        chooses: For each text the function that picks its tokens.
        end_ids: Tokens that end a text and are its last.
        chunk: Positions that are read at once.
    """
    cache = _BatchCache(session, len(texts), max(limits))
    logits = cache.read(texts, chunk)
    # The number of the text in each row; the last text moves into a row that is finished.
    in_row = list(range(len(texts)))
    while True:
        for row, number in enumerate(in_row):
            if len(texts[number]) < limits[number]:
                texts[number].append(chooses[number](logits[row]))
        for row in reversed(range(len(in_row))):
            text = texts[in_row[row]]
            if text[-1] in end_ids or len(text) == limits[in_row[row]]:
                last = in_row.pop()
                if row < len(in_row):
                    cache.copy(len(in_row), row, len(texts[last]) - 1)
                    in_row[row] = last
        if not in_row:
            return
        logits = cache.step([texts[number] for number in in_row])


class _BatchCache:
    """The KV cache of several texts, and the graph bound to it."""

    def __init__(self, session: onnxruntime.InferenceSession, rows: int, capacity: int) -> None:
        self._session = session
        self._binding = session.io_binding()
        # In buffers as long as the text, a graph with a sliding window drops nothing.
        capacity = max(capacity, window_of(session) or 0)
        self._arrays = {
            name: np.empty((rows, heads, capacity, width), dtype)
            for name, (heads, width, dtype) in cache_shapes(session).items()
        }
        self._capacity = capacity
        # Rows that are bound for decoding; 0 during the prefill.
        self._bound = 0

    def read(self, texts: Sequence[Sequence[int]], chunk: int) -> NDArray[np.float32]:
        """Read each text into its row; what it shares with the one before is copied from there.

        Args:
            texts: One for each row.
            chunk: Positions that are read at once.

        Returns:
            Scores of the next token of each, shape (B, V).
        """
        logits = []
        ones = np.ones((1, self._capacity), np.int64)
        for row, text in enumerate(texts):
            shared = common_prefix(texts[row - 1], text[:-1]) if row else 0
            self.copy(row - 1, row, shared)
            self._bind(slice(row, row + 1))
            for start in range(shared, len(text), chunk):
                ids = np.array([text[start : start + chunk]], np.int64)
                last = self._run_graph(ids, ones[:, : start + ids.size])
            logits.append(last[0])
        return np.stack(logits)

    def step(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Read the last token of each text.

        Args:
            texts: Those of the first rows, one for each.

        Returns:
            Scores of the next token of each, shape (B, V).
        """
        if self._bound != len(texts):
            self._bind(slice(0, len(texts)))
            self._bound = len(texts)
        ids = np.array([text[-1:] for text in texts], np.int64)
        lengths = np.array([len(text) for text in texts])
        # The number of ones in a row of the mask is the length of its text.
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        return self._run_graph(ids, mask)

    def copy(self, source: int, target: int, positions: int) -> None:
        """Copy the first positions of a row into another.

        Args:
            source: The row to copy.
            target: The row to overwrite.
            positions: Number of positions.
        """
        for array in self._arrays.values():
            array[target, :, :positions] = array[source, :, :positions]

    def _bind(self, rows: slice) -> None:
        for name, array in self._arrays.items():
            value = as_value(array[rows])
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self._binding.bind_ortvalue_output(f"present.{name}", value)
        self._binding.bind_output("logits")

    def _run_graph(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        self._binding.bind_ortvalue_input("input_ids", as_value(ids))
        self._binding.bind_ortvalue_input("attention_mask", as_value(mask))
        run_bound(self._session, self._binding)
        logits: NDArray[np.float32] = self._binding.get_outputs()[-1].numpy()
        return logits[:, -1]
