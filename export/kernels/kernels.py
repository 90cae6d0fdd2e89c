"""The kernels with which ONNX Runtime can multiply a matrix, and a timer for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from mistill.cost_model.processors import held_to_first_processor
from mistill.cost_model.products import Kernel, open_products

PROMPT = 512
"""Tokens of the prompt that is timed."""

MOST_WEIGHTS = 1 << 20
"""A larger matrix is timed by some of its rows; time grows with rows."""

_FLUSH_BYTES = 1 << 26
_ROUNDS = {1: 15, PROMPT: 2}


KERNELS = (
    *(Kernel("int4", block) for block in (32, 64, 128)),
    *(Kernel("int8", block) for block in (32, 64, 128)),
    Kernel("dynamic_int8"),
    Kernel("float32"),
)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long a product takes.

    Attributes:
        token: Seconds for one token.
        prompt: Seconds for 512 of them.
    """

    token: float
    prompt: float


Timer = Callable[[Sequence[Kernel], int, int], Mapping[Kernel, Timing]]
"""A function that times products with a matrix of some rows and columns for several kernels."""


class OnnxTimer:
    """Times products in ONNX Runtime with a cold processor cache, as in a step of a whole model.

    Kernels take turns, so that other load of the machine affects all of them, and the shortest
    round counts.
    """

    def __init__(self, threads: int, clock: Callable[[], float] = perf_counter) -> None:
        """Make a timer.

        Args:
            threads: Threads to multiply with.
            clock: Seconds from some moment on.
        """
        self._threads = threads
        self._clock = clock
        self._flush = np.ones(_FLUSH_BYTES // 8, np.int64)

    def __call__(
        self, kernels: Sequence[Kernel], rows: int, columns: int
    ) -> Mapping[Kernel, Timing]:
        """Time a product with each kernel.

        Args:
            kernels: Kernels to time.
            rows: Rows of the matrix, N.
            columns: Columns of the matrix, K.

        Returns:
            The least of several rounds.
        """
        timed = min(rows, max(MOST_WEIGHTS // columns, 64))
        # Several copies of a small matrix make a run longer than its fixed cost.
        copies = max(1, MOST_WEIGHTS // (timed * columns))
        sessions = {
            kernel: open_products(
                kernel, timed, columns, threads=self._threads, copies=copies, alone=False
            )
            for kernel in kernels
        }
        share = rows / (timed * copies)
        least = {tokens: dict.fromkeys(kernels, float("inf")) for tokens in _ROUNDS}
        for tokens, rounds in _ROUNDS.items():
            feeds = {"x": np.ones((tokens, columns), np.float32)}
            with held_to_first_processor():
                for session in sessions.values():
                    session.run(None, feeds)
                for _ in range(rounds):
                    for kernel, session in sessions.items():
                        self._flush.max()
                        start = self._clock()
                        session.run(None, feeds)
                        seconds = (self._clock() - start) * share
                        least[tokens][kernel] = min(least[tokens][kernel], seconds)
        return {
            kernel: Timing(token=least[1][kernel], prompt=least[PROMPT][kernel])
            for kernel in kernels
        }
