from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from mistill.errors import FolderError
from mistill.weights.gptq_layout import (
    SUPPORTED_BITS,
    CheckpointFormat,
    GptqFormat,
    ModuleFormat,
    QuantizedWeight,
    ScaleType,
    pack,
    quantized_modules,
    read_quantization,
    unpack,
)

FORMATS: tuple[CheckpointFormat, ...] = ("gptq", "gptq_v2")


def random_weight(bits: int, group_size: int, seed: int = 0) -> QuantizedWeight:
    generator = np.random.default_rng(seed)
    outputs, columns = 32, 64
    groups = 1 if group_size == -1 else columns // group_size
    return QuantizedWeight(
        codes=generator.integers(0, 2**bits, (outputs, columns)).astype(np.uint8),
        scales=generator.random((outputs, groups)).astype(np.float16),
        zeros=generator.integers(0, 2**bits, (outputs, groups)).astype(np.uint8),
        g_idx=(np.arange(columns) // (columns // groups)).astype(np.int32),
        bits=bits,
        group_size=group_size,
    )


def one_word(codes: list[int], zeros: list[int], bits: int) -> QuantizedWeight:
    """A square weight whose first row of codes and only row of zeros are given."""
    size = len(codes)
    table = np.zeros((size, size), np.uint8)
    table[0] = codes
    return QuantizedWeight(
        codes=table,
        scales=np.ones((size, 1), np.float16),
        zeros=np.array(zeros, np.uint8)[:, None],
        g_idx=np.zeros(size, np.int32),
        bits=bits,
        group_size=-1,
    )


def assert_same(one: QuantizedWeight, other: QuantizedWeight) -> None:
    for name in ("codes", "zeros", "scales", "g_idx"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    assert (one.bits, one.group_size) == (other.bits, other.group_size)
    assert one.scale_type == other.scale_type


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("group_size", [-1, 16, 32])
@pytest.mark.parametrize("checkpoint_format", FORMATS)
def test_what_is_packed_comes_back_equal(
    bits: int, group_size: int, checkpoint_format: CheckpointFormat
) -> None:
    weight = random_weight(bits, group_size)
    tensors = pack(weight, checkpoint_format)
    assert_same(unpack(tensors, bits, group_size, checkpoint_format), weight)
    assert tensors["qweight"].shape == (64 * bits // 32, 32)
    assert tensors["qzeros"].shape == (weight.scales.shape[1], 32 * bits // 32)
    assert {name: str(tensor.dtype) for name, tensor in tensors.items()} == {
        "qweight": "int32",
        "qzeros": "int32",
        "scales": "float16",
        "g_idx": "int32",
    }


@pytest.mark.parametrize("scale_type", get_args(ScaleType))
def test_scales_come_back_in_the_type_they_were_stored_in(scale_type: ScaleType) -> None:
    weight = replace(random_weight(4, 16), scale_type=scale_type)
    coarse = weight.scales.astype(np.float32)
    if scale_type == "bfloat16":
        coarse = (coarse.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    weight = replace(weight, scales=coarse)
    tensors = pack(weight, "gptq_v2")
    assert str(tensors["scales"].dtype) == scale_type.replace("bfloat16", "float32")
    assert_same(unpack(tensors, 4, 16, "gptq_v2", scale_type), weight)


@pytest.mark.parametrize("scale_type", ["float16", "bfloat16"])
def test_scales_that_their_type_cannot_hold_are_not_stored(scale_type: ScaleType) -> None:
    weight = random_weight(4, 16)
    scales = np.full(weight.scales.shape, 0.1, np.float32)
    with pytest.raises(ValueError, match=f"not exact in {scale_type}"):
        pack(replace(weight, scales=scales, scale_type=scale_type), "gptq")


def test_thirty_two_3_bit_codes_are_one_stream_of_three_words() -> None:
    codes = np.random.default_rng(4).integers(0, 8, 32).tolist()
    weight = one_word(codes, [4] * 32, bits=3)
    words = pack(weight, "gptq_v2")["qweight"].view(np.uint32)[:, 0].tolist()
    stream = sum(code << (3 * place) for place, code in enumerate(codes))
    assert words == [stream >> shift & 0xFFFFFFFF for shift in (0, 32, 64)]


def test_sixteen_2_bit_codes_share_a_word_with_the_first_one_lowest() -> None:
    weight = one_word([1, 2, 3] + [0] * 12 + [2], [2] * 16, bits=2)
    assert pack(weight, "gptq_v2")["qweight"].view(np.uint32)[0, 0] == 0x80000039


def test_3_bit_zeros_wrap_each_on_its_own() -> None:
    zeros = [0, 5, 0, 7] + [4] * 28
    weight = one_word([0] * 32, zeros, bits=3)
    words = pack(weight, "gptq")["qzeros"].view(np.uint32)[0].tolist()
    less_one = sum(((zero - 1) % 8) << (3 * place) for place, zero in enumerate(zeros))
    assert words == [less_one >> shift & 0xFFFFFFFF for shift in (0, 32, 64)]


def test_eight_codes_share_a_word_with_the_first_one_lowest() -> None:
    weight = one_word([1, 2, 3, 4, 5, 6, 7, 15], [8] * 8, bits=4)
    words = pack(weight, "gptq_v2")["qweight"].view(np.uint32)
    assert words.shape == (1, 8)
    assert words[0, 0] == 0xF7654321


def test_four_8_bit_codes_share_a_word_with_the_first_one_lowest() -> None:
    weight = one_word([0x11, 0x22, 0x33, 0xFE], [128] * 4, bits=8)
    assert pack(weight, "gptq_v2")["qweight"].view(np.uint32)[0, 0] == 0xFE332211


def test_zeros_are_packed_along_the_outputs_and_less_one_in_the_first_format() -> None:
    weight = one_word([0] * 8, [8, 9, 8, 8, 8, 8, 8, 15], bits=4)
    assert pack(weight, "gptq_v2")["qzeros"].view(np.uint32).tolist() == [[0xF8888898]]
    assert pack(weight, "gptq")["qzeros"].view(np.uint32).tolist() == [[0xE7777787]]


def test_a_zero_of_0_borrows_from_its_neighbour_and_gets_it_back() -> None:
    zeros = [0, 5, 0, 0, 8, 1, 0, 3]
    weight = one_word([0] * 8, zeros, bits=4)
    tensors = pack(weight, "gptq")
    # 0x30180050 - 0x11111111, worked by hand: every lane of 0 becomes 15 and takes one from above.
    assert tensors["qzeros"].view(np.uint32).tolist() == [[0x1F06EF3F]]
    assert unpack(tensors, 4, -1, "gptq").zeros[:, 0].tolist() == zeros


def test_dequantizing_is_scale_times_code_less_zero() -> None:
    weight = QuantizedWeight(
        codes=np.array([[0, 8, 15, 3]], np.uint8),
        scales=np.array([[0.5, 2.0]], np.float16),
        zeros=np.array([[8, 3]], np.uint8),
        g_idx=np.array([0, 0, 1, 1], np.int32),
        bits=4,
        group_size=2,
    )
    assert weight.dequantize().tolist() == [[-4.0, 0.0, 24.0, 0.0]]
    assert weight.dequantize().dtype == np.float32


def test_g_idx_sends_each_column_to_its_group() -> None:
    weight = random_weight(4, 16)
    mixed = QuantizedWeight(
        weight.codes, weight.scales, weight.zeros, weight.g_idx[::-1].copy(), 4, 16
    )
    assert weight.ordered
    assert not mixed.ordered
    back = unpack(pack(mixed, "gptq_v2"), 4, 16, "gptq_v2")
    column, group = 5, int(weight.g_idx[-6])
    expected = (weight.codes[:, column].astype(float) - weight.zeros[:, group]) * weight.scales[
        :, group
    ]
    np.testing.assert_allclose(back.dequantize()[:, column], expected, rtol=1e-6)


def test_a_file_without_g_idx_has_its_groups_in_order() -> None:
    weight = random_weight(8, 16)
    tensors = pack(weight, "gptq")
    del tensors["g_idx"]
    np.testing.assert_array_equal(unpack(tensors, 8, 16, "gptq").g_idx, weight.g_idx)


def test_symmetric_means_every_zero_in_the_middle() -> None:
    assert one_word([0] * 8, [8] * 8, bits=4).symmetric
    assert not one_word([0] * 8, [8] * 7 + [7], bits=4).symmetric


@pytest.mark.parametrize(("bits", "unit"), [(2, 16), (3, 32), (4, 8), (8, 4)])
def test_columns_that_do_not_fill_whole_words_are_refused(bits: int, unit: int) -> None:
    weight = QuantizedWeight(
        codes=np.zeros((24, 66), np.uint8),
        scales=np.ones((24, 1), np.float16),
        zeros=np.zeros((24, 1), np.uint8),
        g_idx=np.zeros(66, np.int32),
        bits=bits,
        group_size=-1,
    )
    with pytest.raises(ValueError, match=f"divide by {unit}"):
        pack(weight, "gptq")


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("checkpoint_format", FORMATS)
def test_a_table_of_any_number_of_tokens_comes_back(
    bits: int, checkpoint_format: CheckpointFormat
) -> None:
    weight = random_weight(bits, 32)
    tokens = QuantizedWeight(
        weight.codes[:23], weight.scales[:23], weight.zeros[:23], weight.g_idx, bits, 32
    )
    tensors = pack(tokens, checkpoint_format)
    assert tensors["qzeros"].shape == (2, {2: 2, 3: 3, 4: 3, 8: 6}[bits])
    assert_same(unpack(tensors, bits, 32, checkpoint_format), tokens)


def test_tensors_of_another_bit_width_are_refused() -> None:
    tensors = pack(random_weight(8, 16), "gptq")
    with pytest.raises(FolderError, match="do not fit one another at 4 bits"):
        unpack(tensors, 4, 16, "gptq")


def test_a_group_that_is_not_there_is_refused() -> None:
    tensors = dict(pack(random_weight(4, 16), "gptq"))
    tensors["g_idx"] = np.full(64, 4, np.int32)
    with pytest.raises(FolderError, match="do not fit one another"):
        unpack(tensors, 4, 16, "gptq")


def test_the_config_that_is_written_is_read_back() -> None:
    layout = GptqFormat(bits=8, group_size=32, symmetric=False, checkpoint_format="gptq_v2")
    config = {"quantization_config": layout.to_config(damp_percent=0.05)}
    assert config["quantization_config"]["damp_percent"] == 0.05
    assert read_quantization(json.loads(json.dumps(config))) == layout


def test_modules_of_other_formats_are_written_as_gptqmodel_says_them() -> None:
    eight = ModuleFormat(bits=8, group_size=32)
    layout = GptqFormat(
        bits=4,
        group_size=64,
        symmetric=False,
        modules=((r".*\.1\..*down_proj", None), (".*down_proj", eight), ("lm_head", eight)),
        head=True,
    )
    config = layout.to_config()
    assert list(config["dynamic"].items()) == [
        (r"-:.*\.1\..*down_proj", {}),
        ("+:.*down_proj", {"bits": 8, "group_size": 32, "sym": True}),
        ("+:lm_head", {"bits": 8, "group_size": 32, "sym": True}),
    ]
    assert read_quantization(json.loads(json.dumps({"quantization_config": config}))) == layout
    assert layout.format_of("model.layers.0.mlp.down_proj") == eight
    assert layout.format_of("model.layers.1.mlp.down_proj") is None
    assert layout.format_of("model.layers.1.mlp.up_proj") == ModuleFormat(
        bits=4, group_size=64, symmetric=False
    )
    assert layout.format_of("lm_head") == eight
    assert layout.format_of("model.embed_tokens") is None


def test_a_pattern_matches_from_the_start_of_a_name_and_inherits_what_it_leaves_out() -> None:
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False}
    quantization["dynamic"] = {"down_proj": {"bits": 8}, ".*up_proj": {"bits": 8}}
    layout = read_quantization({"quantization_config": quantization})
    assert layout is not None
    plain = ModuleFormat(bits=4, group_size=64, symmetric=False)
    assert layout.format_of("model.layers.0.mlp.down_proj") == plain
    assert layout.format_of("model.layers.0.mlp.up_proj") == replace(plain, bits=8)


def test_words_that_do_not_come_in_threes_are_refused_as_3_bits() -> None:
    tensors = pack(random_weight(4, 16), "gptq")
    with pytest.raises(FolderError, match="not a multiple of three"):
        unpack(tensors, 3, 16, "gptq")


def test_a_float_or_nf4_config_has_no_gptq_format() -> None:
    assert read_quantization({"vocab_size": 3}) is None
    assert read_quantization({"quantization_config": {"quant_method": "bitsandbytes"}}) is None


def test_the_newer_name_of_the_format_is_read() -> None:
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 64, "format": "gptq_v2"}
    layout = read_quantization({"quantization_config": quantization})
    assert layout is not None
    assert layout.checkpoint_format == "gptq_v2"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": 5}, "2, 3, 4 or 8 bits, and quantization_config says 5"),
        ({"bits": "four"}, "whole numbers"),
        ({"group_size": None}, "whole numbers"),
        ({"group_size": 0}, "above 0, or -1"),
        ({"checkpoint_format": "marlin"}, "'marlin'"),
        ({"checkpoint_format": "gptq_p"}, "'gptq_p'"),
        ({"pack_dtype": "int64"}, "'int64'"),
        ({"dynamic": ["down_proj"]}, "dynamic .* should be an object"),
        ({"dynamic": {"+:(down": {}}}, r"'\+:\(down' .* is not a regular expression"),
        ({"dynamic": {"+:.*down_proj": {"bits": 5}}}, "down_proj.* says 5"),
        ({"dynamic": {".*down_proj": {"group_size": 0}}}, "above 0, or -1"),
        ({"dynamic": {".*down_proj": 8}}, "should be an object"),
    ],
)
def test_a_format_that_cannot_be_read_is_refused_by_name(
    change: dict[str, object], said: str
) -> None:
    quantization = GptqFormat(bits=4, group_size=64).to_config() | change
    with pytest.raises(FolderError, match=said):
        read_quantization({"quantization_config": quantization})


def test_modules_are_named_by_their_codes() -> None:
    names = ["a.q_proj.qweight", "a.q_proj.scales", "model.norm.weight", "b.qweight"]
    assert quantized_modules(names) == ["a.q_proj", "b"]


def test_reading_the_layout_loads_no_torch() -> None:
    code = "import sys, mistill.weights.gptq_layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
