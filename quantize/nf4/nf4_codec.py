"""Weights to 4-bit NormalFloat, bit for bit as bitsandbytes 0.50 does on a CPU, without it.

Each run of 64 weights is divided by its largest magnitude and rounded to the nearest of 16 levels,
the quantiles of a normal distribution (QLoRA, Dettmers et al., 2023, section 3,
https://arxiv.org/abs/2305.14314). The scales may be quantized in turn: their mean is taken away,
and what is left is rounded to 8 bits, 256 at a time (section 3, "Double Quantization"), in a format
that is finer around 0 (Dettmers, 2015, https://arxiv.org/abs/1511.04561).

To be equal to the last bit, the same products have to be rounded in the same places: a weight is
multiplied by the reciprocal of its scale, except in a last block that is not full, where it is
divided. Quantized scales go through a table of 65,536 entries, as in bitsandbytes' C++ code; within
a table's step the nearest level is not always the one taken.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from mistill.weights.nf4_layout import NF4_STATE

BLOCK = 64
NESTED_BLOCK = 256

_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# Divisors are at least this, so that a block of zeros has codes.
_LEAST_SCALE = 1e-38

# Weights that are encoded at once: few enough for a cache, enough for every thread.
_AT_ONCE = 1 << 20

_TABLE = 1 << 16


def encode_nf4(W: Tensor, double_quantization: bool) -> dict[str, Tensor]:
    """Store a weight as bitsandbytes would.

    Args:
        W: Shape (N, K), float32, float16 or bfloat16; finite.
        double_quantization: Whether the scales are quantized too.

    Returns:
        The tensors of the weight by the names that ``mistill.weights.nf4_layout`` lists.

    Raises:
        ValueError: If a weight is not a finite number.
    """
    codes, scales = _encode(W.reshape(-1))
    if not scales.isfinite().all():
        raise ValueError("a weight is not a finite number")
    dtype = str(W.dtype).removeprefix("torch.")
    state: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": dtype,
        "shape": list(W.shape),
    }
    tensors = {"weight": codes[:, None], "weight.quant_map": torch.tensor(_LEVELS)}
    if double_quantization:
        mean = scales.mean()
        tensors["weight.absmax"], tensors["weight.nested_absmax"] = _encode_scales(scales - mean)
        tensors["weight.nested_quant_map"] = dynamic_levels()
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": mean.item(),
        }
    else:
        tensors["weight.absmax"] = scales
    words = json.dumps(state).encode()
    tensors[f"weight.{NF4_STATE}"] = torch.frombuffer(bytearray(words), dtype=torch.uint8)
    return tensors


def _encode(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two a byte, and scales of a run of n weights."""
    count = len(weights)
    codes = torch.empty((count + 1) // 2, dtype=torch.uint8)
    scales = torch.empty(-(-count // BLOCK))
    in_whole_blocks = count // BLOCK * BLOCK
    above = torch.empty(_AT_ONCE, dtype=torch.bool)
    for start in range(0, in_whole_blocks, _AT_ONCE):
        end = min(start + _AT_ONCE, in_whole_blocks)
        blocks = weights[start:end].float().view(-1, BLOCK)
        largest = blocks.abs().amax(1)
        scales[start // BLOCK : end // BLOCK] = largest
        scaled = blocks * largest.clamp(min=_LEAST_SCALE).reciprocal_()[:, None]
        codes[start // 2 : end // 2] = _packed(_nearest(scaled.view(-1), above[: end - start]))
    if in_whole_blocks < count:
        rest = weights[in_whole_blocks:].float()
        scales[-1] = rest.abs().max().clamp(min=_LEAST_SCALE)
        scaled = torch.cat([rest / scales[-1], torch.zeros(count % 2)])
        codes[in_whole_blocks // 2 :] = _packed(_nearest(scaled, above[: len(scaled)]))
    return codes, scales


def _nearest(scaled: Tensor, above: Tensor) -> Tensor:
    """The nearest level of each number: how many midpoints between two levels it exceeds."""
    codes = torch.zeros(len(scaled), dtype=torch.uint8)
    for middle in _midpoints():
        codes += torch.gt(scaled, middle, out=above).view(torch.uint8)
    return codes


def _packed(codes: Tensor) -> Tensor:
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] << 4).bitwise_or_(pairs[:, 1])


@functools.cache
def _midpoints() -> tuple[float, ...]:
    levels = torch.tensor(_LEVELS)
    return tuple(((levels[:-1] + levels[1:]) / 2).tolist())


def _encode_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes of B numbers, and the largest magnitude of every 256 of them."""
    count = len(scales)
    padded = torch.nn.functional.pad(scales, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = padded.abs().amax(1)
    scaled = (padded * largest.reciprocal()[:, None]).clamp_(-1, 1)
    indices = ((scaled + 1) * 0.5 * (_TABLE - 1) + 0.5).floor_()
    # A block of zeros has no scale: 0 / 0 is not a number, and bitsandbytes gives it code 0.
    codes = _scale_table()[indices.nan_to_num_(0).clamp_(0, _TABLE - 1).int()]
    return codes.view(-1)[:count].clone(), largest


@functools.cache
def _scale_table() -> Tensor:
    """The nearest level to each of 65,536 evenly spaced numbers from -1 to 1."""
    levels = dynamic_levels().double()
    numbers = torch.arange(_TABLE, dtype=torch.float64) * 2 / (_TABLE - 1) - 1
    return torch.bucketize(numbers, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


def dynamic_levels() -> Tensor:
    """The 256 levels of the dynamic 8-bit format, from least to greatest.

    Each power of ten from 1e-6 to 1 is cut into twice as many steps as the one below, 1 to 64, and
    the levels are the middles of the steps, of either sign; with 0 and 1 that makes 256.

    Returns:
        Shape (256,), float32.
    """
    return torch.tensor(sorted([0.0, 1.0, *_middles()]), dtype=torch.float32)


def _middles() -> Iterator[float]:
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32)
        middles = (10.0 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        yield from (sign * middle for sign in (1, -1) for middle in middles)
