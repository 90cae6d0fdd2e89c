"""How many bytes llama.cpp's Q4_K_M takes of a model: the size of a mix where none is asked for.

Q4_K_M is what most people download. Which type each tensor gets there, and that a type of blocks of
256 gives way to one of blocks of 32 where rows do not divide, is written in llama.cpp's
``src/llama-quant.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping

# Bytes and columns of a block of each type.
_Q4_K, _Q6_K, _Q5_0, _Q8_0 = (144, 256), (210, 256), (22, 32), (34, 32)
_FLOAT16 = (2, 1)


def q4_k_m_bytes(
    matrices: Mapping[str, tuple[int, int]],
    tables: Mapping[str, tuple[int, int]],
    other_values: int,
) -> int:
    """Bytes of all tensors of a model in llama.cpp's Q4_K_M.

    Args:
        matrices: Inputs and outputs of the matrices in the layers, by their names in transformers.
        tables: The same of the embedding, and of the output head where it is another table.
        other_values: Number of values of norms and biases, which stay float32.

    Returns:
        The bytes, without the tokenizer and the names.
    """
    layers = 1 + max(_layer_of(name) for name in matrices)
    total = 4 * other_values
    for name, shape in matrices.items():
        generous = name.endswith(("v_proj", "down_proj")) and _gets_more(_layer_of(name), layers)
        total += _bytes(shape, _Q6_K if generous else _Q4_K)
    *embedding, head = tables.values()
    return total + _bytes(head, _Q6_K) + sum(_bytes(shape, _Q4_K) for shape in embedding)


def _layer_of(name: str) -> int:
    return int(name.split(".")[2])


def _gets_more(layer: int, layers: int) -> bool:
    """Whether a layer is one of the first or last eighth, or a third one between."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def _bytes(shape: tuple[int, int], block: tuple[int, int]) -> int:
    inputs, outputs = shape
    if inputs % block[1]:
        block = _Q8_0 if block == _Q6_K else _Q5_0
    if inputs % block[1]:
        block = _FLOAT16
    return inputs * outputs // block[1] * block[0]
