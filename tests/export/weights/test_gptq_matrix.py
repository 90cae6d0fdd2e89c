"""Every way to store a matrix goes into ONNX with no code and no zero changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export import to_onnx
from export.settings import OnnxSettings
from export.weights.architecture import read_architecture
from export.weights.blocks import BlockWeight
from export.weights.folder_weights import FolderWeights
from mistill.errors import SettingsError
from mistill.pytorch.loading import load_pytorch
from mistill.weights.gptq_layout import CheckpointFormat, GptqFormat, ModuleFormat, QuantizedWeight
from tests.export.sources import quantized_weight
from tests.gptq_matrix import WAYS, Way, matrix_folder, simple_folder, write_folder
from tests.reference.onnx_runner import OnnxRunner
from tests.tiny import tiny_model

IDS = np.random.default_rng(0).integers(5, 300, (2, 24))


def codes_and_zeros(weight: BlockWeight) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per column, in the order of the input: codes, zeros, scales. Written out with plain loops."""
    rows, blocks, width = weight.codes.shape
    per_byte = 8 // weight.bits
    codes = np.zeros((rows, blocks, width * per_byte), np.uint8)
    for lane in range(per_byte):
        codes[:, :, lane::per_byte] = weight.codes >> (lane * weight.bits) & (2**weight.bits - 1)
    middle = np.full((rows, blocks), 1 << (weight.bits - 1), np.uint8)
    zeros = (middle if weight.zeros is None else weight.zeros).repeat(weight.block_size, 1)
    scales = weight.scales.repeat(weight.block_size, 1)
    codes = codes.reshape(rows, -1)[:, : weight.columns]
    order = np.arange(weight.columns) if weight.order is None else weight.order
    back = np.argsort(order)
    return codes[:, back], zeros[:, : weight.columns][:, back], scales[:, : weight.columns][:, back]


def assert_carried(folder: Path, weights: dict[str, QuantizedWeight]) -> set[int]:
    """Compare what the graph is built from with what was stored; returns the bits used."""
    config = json.loads((folder / "config.json").read_text())
    used = set()
    with FolderWeights(folder, read_architecture(config), OnnxSettings()) as opened:
        for module, weight in weights.items():
            block = opened.linear(module).weight
            assert isinstance(block, BlockWeight)
            used.add(block.bits)
            codes, zeros, scales = codes_and_zeros(block)
            np.testing.assert_array_equal(codes, weight.codes, module)
            np.testing.assert_array_equal(zeros, weight.zeros[:, weight.g_idx], module)
            stored = weight.scales.astype(np.float32)[:, weight.g_idx]
            np.testing.assert_array_equal(scales, stored, module)
    return used


def pytorch_logits(folder: Path) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = load_pytorch(folder)(torch.from_numpy(IDS)).logits.numpy()
    return logits


@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_no_code_zero_or_scale_changes_on_the_way_into_onnx(
    stored: CheckpointFormat, tmp_path: Path
) -> None:
    source, weights = matrix_folder(tmp_path / "source", stored)
    assert len(WAYS) == 144
    assert assert_carried(source, weights) == {4, 8}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_graph_computes_what_pytorch_does(bits: int, symmetric: bool, tmp_path: Path) -> None:
    way = Way(bits, symmetric, 32, "dynamic", "bfloat16")
    source, weights = simple_folder(tmp_path / "source", way, "gptq_v2")
    # 3 bits travel as codes of 4; 2 bits as they are where onnxruntime is quick with them.
    assert assert_carried(source, weights) == {{2: 2, 3: 4, 4: 4, 8: 8}[bits]}
    exported = to_onnx(source, tmp_path / "onnx", head_bits=32, embedding_bits=32, accuracy_level=0)
    # Sums in float32, in another order.
    np.testing.assert_allclose(
        OnnxRunner(exported).logits(IDS), pytorch_logits(source), rtol=0, atol=2e-4
    )


def test_2_bits_are_multiplied_in_integers(tmp_path: Path) -> None:
    source, _ = simple_folder(tmp_path / "m", Way(2, True, 32, "none", "float16"), "gptq")
    exported = to_onnx(source, tmp_path / "onnx", head_bits=32, embedding_bits=32)
    ours, theirs = OnnxRunner(exported).logits(IDS), pytorch_logits(source)
    assert 0 < np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()
    assert b"\x0a\x04bits\x18\x02" in (exported / "model.onnx").read_bytes()


def with_tables(
    folder: Path, *, bits: int, symmetric: bool, tied: bool, order: bool = False
) -> tuple[Path, dict[str, QuantizedWeight]]:
    tiny_model(folder, tie_word_embeddings=tied)
    floats = load_file(folder / "model.safetensors")
    names = [name for name in sorted(floats) if name.endswith("_proj.weight")]
    names += ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    walk = np.random.default_rng(5).permutation(64) if order else None
    weights = {}
    for name in names:
        table = "_proj" not in name
        weights[name.removesuffix(".weight")] = quantized_weight(
            floats[name].numpy(),
            bits=bits if table else 4,
            group_size=32,
            symmetric=symmetric,
            order=walk if table else None,
        )
    form = ModuleFormat(bits=bits, group_size=32, symmetric=symmetric)
    layout = GptqFormat(
        bits=4,
        group_size=32,
        symmetric=symmetric,
        activation_order=order,
        checkpoint_format="gptq_v2",
        modules=(("lm_head", form), (r"model\.embed_tokens", form)),
        head=True,
        embedding=True,
    )
    return write_folder(folder, weights, layout), weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantized_tables_are_taken_over_as_they_are_stored(
    bits: int, symmetric: bool, tied: bool, tmp_path: Path
) -> None:
    source, weights = with_tables(tmp_path / "m", bits=bits, symmetric=symmetric, tied=tied)
    exported = to_onnx(source, tmp_path / "onnx", accuracy_level=0)
    np.testing.assert_allclose(
        OnnxRunner(exported).logits(IDS), pytorch_logits(source), rtol=0, atol=2e-4
    )
    said = json.loads((exported / "manifest.json").read_text())
    assert said["head_bits"] == said["embedding_bits"] == bits
    config = json.loads((source / "config.json").read_text())
    with FolderWeights(source, read_architecture(config), OnnxSettings()) as opened:
        for module in weights.keys() & {"model.embed_tokens", "lm_head"}:
            block = opened.table(module, bits)
            assert isinstance(block, BlockWeight)
            codes, zeros, _ = codes_and_zeros(block)
            np.testing.assert_array_equal(codes, weights[module].codes)
            np.testing.assert_array_equal(zeros, weights[module].zeros[:, weights[module].g_idx])


def test_tables_of_2_bits_run_as_they_are(tmp_path: Path) -> None:
    source, _ = with_tables(tmp_path / "m", bits=2, symmetric=False, tied=True)
    ours = OnnxRunner(to_onnx(source, tmp_path / "onnx")).logits(IDS)
    theirs = pytorch_logits(source)
    # Only activations are rounded.
    assert 0 < np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()


def test_tables_whose_groups_are_mixed_are_put_in_order(tmp_path: Path) -> None:
    source, _ = with_tables(tmp_path / "m", bits=4, symmetric=False, tied=True, order=True)
    exported = to_onnx(source, tmp_path / "onnx", accuracy_level=0)
    np.testing.assert_allclose(
        OnnxRunner(exported).logits(IDS), pytorch_logits(source), rtol=0, atol=2e-4
    )


def test_a_stored_table_becomes_float_but_is_not_rounded_again(tmp_path: Path) -> None:
    source, _ = with_tables(tmp_path / "m", bits=4, symmetric=True, tied=True)
    exported = to_onnx(source, tmp_path / "f", accuracy_level=0, head_bits=32, embedding_bits=32)
    np.testing.assert_allclose(
        OnnxRunner(exported).logits(IDS), pytorch_logits(source), rtol=0, atol=2e-4
    )
    with pytest.raises(SettingsError, match=r"head_bits is 8, .* stores that table in 4-bit codes"):
        to_onnx(source, tmp_path / "onnx", head_bits=8)


def test_a_code_that_changes_on_the_way_is_noticed(tmp_path: Path) -> None:
    source, weights = simple_folder(tmp_path / "m", Way(4, False, 32, "dynamic", "float16"), "gptq")
    assert_carried(source, weights)
    module = next(iter(weights))
    codes = weights[module].codes.copy()
    codes[3, 5] ^= 1
    with pytest.raises(AssertionError, match=module):
        assert_carried(source, {module: replace(weights[module], codes=codes)})
