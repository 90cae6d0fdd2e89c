"""What the processes of a run do each a part of, and the rows that they learn from together.

A trainer hands its micro-batches out in turn: of P processes the first takes micro-batches 0, P,
2 P and so on. So the rows of a step are the same however many processes there are, if their order
is, and if a step never ends with the data: an order goes on where it would end, and each step has
all of its rows.

N is rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mistill.training.processes import this_process

RowT = TypeVar("RowT")


def in_shares(
    rows: Sequence[RowT], compute: Callable[[Sequence[RowT]], NDArray[np.float64]], size: int
) -> NDArray[np.float64]:
    """Numbers of each row, worked out by all processes, each for some parts of the rows.

    Args:
        rows: N rows, the same in every process.
        compute: Gives a number, or as many as of every other one, for each of some rows.
        size: Rows of one part; they are computed together.

    Returns:
        Shape (N,) or (N, numbers of a row), the same in every process.
    """
    state = this_process()
    starts = range(0, len(rows), size)
    mine = {
        start: compute(rows[start : start + size])
        for start in starts[state.process_index :: state.num_processes]
    }
    if state.num_processes == 1:
        parts = mine
    else:
        from accelerate.utils import gather_object

        parts = {start: part for one in gather_object([mine]) for start, part in one.items()}
    return np.concatenate([parts[start] for start in starts]) if len(rows) else np.zeros(0)


def order_of_run(rows: int, needed: int, seed: int) -> list[int]:
    """The order in which a run learns from its rows: each time through in another one.

    Args:
        rows: How many there are.
        needed: Rows of all steps together.
        seed: Decides the order.

    Returns:
        As many numbers of rows as are needed.
    """
    generator = np.random.default_rng(seed)
    rounds = [generator.permutation(rows) for _ in range(0, needed, rows)]
    return [int(row) for row in np.concatenate(rounds)[:needed]]


def filled(order: Sequence[int], size: int) -> list[int]:
    """An order whose last micro-batch is full: its first rows stand there once more.

    Args:
        order: Numbers of rows.
        size: Rows of the micro-batches that all processes compute at once.

    Returns:
        The order, as long as a multiple of the size.
    """
    missing = -len(order) % size
    return [*order, *(order[place % len(order)] for place in range(missing))]
