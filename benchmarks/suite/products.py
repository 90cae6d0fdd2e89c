"""How fast torch multiplies float32 matrices, as it comes and where mistill chooses the library.

    python -m benchmarks.suite.products

Shapes are those of a small model's layers, of its head, and of a layer that writes one token. Both
ways take turns; the error is relative, against float64. The last line is one JSON document. See
``mistill/pytorch/products.py``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.suite.turns import spread_of
from mistill.pytorch.products import fast_products

SHAPES = ((512, 576, 1536), (512, 1536, 576), (512, 576, 49_152), (1, 576, 1536))
"""Rows, inputs and outputs of a product."""

_WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "as torch comes": nullcontext,
    "fast products": fast_products,
}


def measure(shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Multiply in turn.

    Args:
        shape: Rows, inputs, outputs.
        rounds: Turns of each way, after one that warms up.

    Returns:
        By the names of both ways: billions of operations a second, and the relative error.
    """
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    W = torch.randn(outputs, inputs, generator=generator)
    exact = x.double() @ W.double().t()
    repeats = max(1, 2**30 // (rows * inputs * outputs))
    speeds: dict[str, list[float]] = {name: [] for name in _WAYS}
    errors = {}
    for turn in range(rounds + 1):
        for name, way in _WAYS.items():
            with way():
                started = time.perf_counter()
                for _ in range(repeats):
                    product: Tensor = linear(x, W)
                seconds = (time.perf_counter() - started) / repeats
            errors[name] = float((product.double() - exact).norm() / exact.norm())
            if turn:
                speeds[name].append(2e-9 * rows * inputs * outputs / seconds)
    return {
        name: {"billions_a_second": spread_of(speeds[name]), "relative_error": errors[name]}
        for name in _WAYS
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print a JSON document.

    Args:
        words: The command line; None for this process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    shapes = {" x ".join(map(str, shape)): measure(shape, args.rounds) for shape in SHAPES}
    print(json.dumps({"benchmark": "products", "threads": args.threads, "shapes": shapes}))


if __name__ == "__main__":
    main()
