"""The matrices of a decoder layer by kind, and the shapes in which they are multiplied."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from export.weights.architecture import Architecture

MatrixKind = Literal["qkv", "o", "gate_up", "down", "head"]


KINDS: tuple[MatrixKind, ...] = ("qkv", "o", "gate_up", "down", "head")


_KIND_OF: dict[str, MatrixKind] = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
}


@dataclass(frozen=True, order=True)
class StoredFormat:
    """The format of matrices of a kind in the source.

    Attributes:
        bits: Bits of a code as the source or the rounding has it.
        group: Columns that share a scale, of which blocks must be parts.
        largest: Most columns that a block may have.
        widens: Whether the codes may be stored in 8 bits, which changes no weight.
    """

    bits: int
    group: int
    largest: int
    widens: bool


def kind_of(module: str) -> MatrixKind | None:
    """The kind of matrix that a module of a layer is.

    Args:
        module: Name of the module.

    Returns:
        The kind; None for one that is not multiplied.
    """
    return _KIND_OF.get(module.rpartition(".")[2])


def product_shapes(architecture: Architecture) -> dict[MatrixKind, tuple[int, int, int]]:
    """The matrices that a step multiplies by.

    Args:
        architecture: Architecture of the decoder.

    Returns:
        Rows, columns and how many there are, of each kind.
    """
    one = {
        name.removeprefix("model.layers.0."): shape for name, shape in _first_layer(architecture)
    }
    sizes: dict[MatrixKind, list[tuple[int, ...]]] = {}
    for name, shape in one.items():
        kind = kind_of(name)
        if kind is not None:
            sizes.setdefault(kind, []).append(shape)
    shapes: dict[MatrixKind, tuple[int, int, int]] = {
        kind: (sum(shape[0] for shape in parts), parts[0][1], architecture.layers)
        for kind, parts in sizes.items()
    }
    shapes["head"] = (architecture.vocabulary_size, architecture.hidden_size, 1)
    return shapes


def _first_layer(architecture: Architecture) -> Iterable[tuple[str, tuple[int, ...]]]:
    return (
        (name, shape)
        for name, shape in architecture.shapes().items()
        if name.startswith("model.layers.0.")
    )
