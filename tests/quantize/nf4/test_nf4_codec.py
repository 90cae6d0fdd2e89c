"""NF4 without bitsandbytes is NF4 with it, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitsandbytes.functional import (
    create_dynamic_map,
    dequantize_4bit,
    quantize_4bit,
    quantize_blockwise,
)
from torch import Tensor

from mistill.errors import FolderError
from mistill.weights.nf4_layout import NF4_STATE, read_nf4
from quantize.nf4.nf4_codec import _LEVELS, _encode_scales, dynamic_levels, encode_nf4

# The last shapes have a last block that is not full, with an even and an odd number of weights.
SHAPES = ((64, 64), (128, 192), (300, 64), (17, 640), (7, 96), (5, 33))
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def weights(kind: str, shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    normal = torch.randn(shape, generator=generator)
    if kind == "normal":
        return 0.02 * normal
    if kind == "wild":
        powers = torch.randint(-4, 4, shape, generator=generator).float()
        return normal * 10**powers * (torch.rand(shape, generator=generator) > 0.3)
    return torch.zeros(shape) if kind == "zeros" else torch.ones(shape)


def theirs(W: Tensor, double: bool) -> dict[str, Tensor]:
    codes, state = quantize_4bit(W, quant_type="nf4", compress_statistics=double)
    packed = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"weight": codes, **packed}


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "wild", "zeros", "ones"])
def test_every_tensor_is_that_of_bitsandbytes(kind, shape, dtype, double):
    W = weights(kind, shape).to(dtype)
    found, expected = encode_nf4(W, double), theirs(W, double)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_numbers_halfway_between_two_levels_go_where_bitsandbytes_sends_them():
    levels = encode_nf4(torch.ones(1, 64), False)["weight.quant_map"]
    middles = (levels[:-1] + levels[1:]) / 2
    around = torch.cat([middles.nextafter(torch.tensor(side)) for side in (-9.0, 9.0)])
    W = torch.cat([levels, middles, around, torch.zeros(3)])[None]
    assert W.numel() == 64
    assert torch.equal(encode_nf4(W, False)["weight"], theirs(W, False)["weight"])


def test_quantized_scales_are_those_of_bitsandbytes_over_their_whole_range():
    """A step of its table holds levels on both sides: a million numbers find all such steps."""
    assert torch.equal(dynamic_levels(), create_dynamic_map())
    generator = torch.Generator().manual_seed(0)
    for powers in (0, 6):
        scales = torch.randn(1_000_003, generator=generator)
        scales *= 10 ** -torch.randint(0, powers + 1, scales.shape, generator=generator).float()
        codes, largest = _encode_scales(scales)
        expected, state = quantize_blockwise(scales, blocksize=256)
        assert torch.equal(codes, expected)
        assert torch.equal(largest, state.absmax)


def test_products_and_quotients_are_rounded_where_bitsandbytes_rounds_them():
    """Scales times points between two codes: there the last bit of a quotient decides."""
    generator = torch.Generator().manual_seed(0)
    levels = dynamic_levels()
    places = ((levels[:-1] + levels[1:]) / 2 + 1) * 32767.5
    edges = ((places.floor() + 0.5) / 32767.5 - 1)[:, None]
    for scale in torch.rand(300, generator=generator).tolist():
        scales = torch.cat([edges * scale, edges.new_full((1, 1), scale)]).view(-1)
        assert torch.equal(_encode_scales(scales)[0], quantize_blockwise(scales, blocksize=256)[0])
    levels = torch.tensor(_LEVELS)
    middles = torch.cat([(levels[:-1] + levels[1:]) / 2, torch.ones(1)])
    for scale in torch.rand(300, generator=generator).tolist():
        for rows in (1, 4):  # a last block that is not full, and one that is
            W = (middles * scale).repeat(rows)[None]
            assert torch.equal(encode_nf4(W, False)["weight"], theirs(W, False)["weight"])


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", [(64, 64), (17, 640)], ids=str)
def test_what_is_read_back_is_what_bitsandbytes_reads(shape, double):
    codes, state = quantize_4bit(
        weights("normal", shape), quant_type="nf4", compress_statistics=double
    )
    tensors = {name: t.numpy() for name, t in encode_nf4(weights("normal", shape), double).items()}
    decoded = read_nf4(tensors, "here").dequantize()
    assert decoded.dtype == np.float32
    # bitsandbytes multiplies two quantized numbers and adds the mean in one rounding or in two.
    torch.testing.assert_close(
        torch.from_numpy(decoded), dequantize_4bit(codes, state), rtol=3e-7, atol=0
    )


def test_a_last_block_that_is_not_full_is_read_back():
    """By the definition: bitsandbytes' own reader takes other scales for rows that share blocks."""
    W = weights("normal", (5, 33))
    tensors = {name: tensor.numpy() for name, tensor in encode_nf4(W, False).items()}
    pairs = tensors["weight"].reshape(-1)
    codes = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1)[: W.numel()]
    scales = tensors["weight.absmax"].repeat(64)[: W.numel()]
    expected = (tensors["weight.quant_map"][codes] * scales).reshape(5, 33)
    assert np.array_equal(read_nf4(tensors, "here").dequantize(), expected)


def test_tensors_that_contradict_one_another_are_refused():
    tensors = {name: t.numpy() for name, t in encode_nf4(torch.ones(4, 64), True).items()}
    short = {**tensors, "weight": tensors["weight"][:-1]}
    with pytest.raises(FolderError, match=r"here has 127 bytes.*4 x 64 weights in blocks of 64"):
        read_nf4(short, "here")
    for name in ("weight.quant_map", "weight.nested_quant_map", f"weight.{NF4_STATE}"):
        lacking = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(FolderError, match=f"here.{name} is missing"):
            read_nf4(lacking, "here")


def test_weights_that_are_no_numbers_are_refused():
    for bad in (torch.nan, torch.inf):
        W = torch.ones(2, 64)
        W[1, 7] = bad
        with pytest.raises(ValueError, match="not a finite number"):
            encode_nf4(W, True)
