"""A graph of standard operators computes what PyTorch computes, in any runtime."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from export.onnx_folder import to_onnx
from export.settings import OnnxSettings
from mistill.errors import FolderError, SettingsError
from mistill.pytorch.loading import load_pytorch
from tests.export.sources import gptq_folder, nf4_folder
from tests.tiny import tiny_model

Cache = dict[str, NDArray[np.float32]]

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 7, "num_key_value_heads": 1},
    "narrow heads": {"head_dim": 24, "num_attention_heads": 6, "tie_word_embeddings": True},
    "biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama 3 rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}
IDS = np.random.default_rng(0).integers(5, 380, (2, 20))


def session(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # Otherwise ONNX Runtime rounds activations where it multiplies codes.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(folder / "model.onnx", options)


def run(
    graph: Any, ids: NDArray[np.int64], cache: Cache | None = None, mask: Any = None
) -> tuple[NDArray[np.float32], Cache]:
    """Logits (B, T, V) of ids that follow a cache, and the cache with them."""
    names = [entry.name for entry in graph.get_inputs() if entry.name.startswith("past")]
    if cache is None:
        shape = graph.get_inputs()[2].shape
        cache = {n: np.zeros((len(ids), shape[1], 0, shape[3]), np.float32) for n in names}
    total = ids.shape[1] + cache[names[0]].shape[2]
    mask = np.ones((len(ids), total), np.int64) if mask is None else mask
    wanted = ["logits", *(name.replace("past_key_values", "present") for name in names)]
    logits, *present = graph.run(
        wanted, {"input_ids": ids, "attention_mask": mask, **{n: cache[n] for n in names}}
    )
    return logits, dict(zip(names, present, strict=True))


def torch_logits(folder: Path, ids: NDArray[np.int64], mask: Any = None) -> NDArray[np.float32]:
    with torch.inference_mode():
        kept = None if mask is None else torch.from_numpy(mask)
        logits: NDArray[np.float32] = load_pytorch(folder)(
            torch.from_numpy(ids), attention_mask=kept
        ).logits.numpy()
    return logits


@pytest.mark.parametrize("shape", SHAPES)
def test_float_logits_are_pytorchs_as_a_whole_and_in_pieces(shape: str, tmp_path: Path):
    source = tiny_model(tmp_path / "model", **SHAPES[shape])
    graph = session(to_onnx(source, tmp_path / "onnx", portable=True, parity_positions=0))
    expected = torch_logits(source, IDS)
    whole, _ = run(graph, IDS)
    np.testing.assert_allclose(whole, expected, atol=3e-5)
    cache, pieces = None, []
    for start, end in ((0, 5), (5, 6), (6, 13), (13, 20)):
        logits, cache = run(graph, IDS[:, start:end], cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=3e-5)


@pytest.mark.parametrize("window", [None, 6])
def test_rows_may_be_padded_on_the_left(window: int | None, tmp_path: Path):
    source = tiny_model(tmp_path / "model", sliding_window=window)
    graph = session(to_onnx(source, tmp_path / "onnx", portable=True, parity_positions=0))
    alone, _ = run(graph, IDS[1:, 4:])
    mask = np.ones_like(IDS)
    mask[1, :4] = 0
    logits, cache = run(graph, IDS[:, :12], mask=mask[:, :12])
    following, _ = run(graph, IDS[:, 12:], cache, mask)
    both = np.concatenate([logits, following], axis=1)
    np.testing.assert_allclose(both[1:, 4:], alone, atol=3e-5)
    np.testing.assert_allclose(both[:1], torch_logits(source, IDS[:1]), atol=3e-5)


def operators(folder: Path) -> tuple[set[str], dict[str, int]]:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    return {f"{node.domain}{node.op_type}" for node in model.graph.node}, versions


@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_the_standards_own_checker_and_runtime_accept_the_graph(precision: Any, tmp_path: Path):
    source = tiny_model(tmp_path / "model", sliding_window=9, tie_word_embeddings=True)
    exported = to_onnx(
        source, tmp_path / "onnx", portable=True, precision=precision, parity_positions=0
    )
    onnx.checker.check_model(exported / "model.onnx", full_check=True)
    found, versions = operators(exported)
    assert versions == {"": 21}
    assert ("DequantizeLinear" in found) == (precision != "float32")
    graph = session(exported)
    expected, _ = run(graph, IDS[:, :9])
    reference = ReferenceEvaluator(str(exported / "model.onnx"))
    shape = (2, 2, 0, 16)
    feeds = {name: np.zeros(shape, np.float32) for name in reference.input_names if "past" in name}
    mask = np.ones((2, 9), np.int64)
    logits: Any = reference.run(
        ["logits"], {"input_ids": IDS[:, :9], "attention_mask": mask, **feeds}
    )
    np.testing.assert_allclose(logits[0], expected, atol=5e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "options", [{}, {"symmetric": False}, {"act_order": True}], ids=["", "zeros", "order"]
)
def test_codes_of_a_gptq_folder_go_over_unchanged(
    bits: int, options: dict[str, Any], model: Path, tmp_path: Path
):
    source, weights = gptq_folder(model, tmp_path / "gptq", bits=bits, group_size=32, **options)
    exported = to_onnx(
        source,
        tmp_path / "onnx",
        portable=True,
        head_bits=32,
        embedding_bits=32,
        parity_positions=0,
    )
    logits, _ = run(session(exported), IDS)
    np.testing.assert_allclose(logits, torch_logits(source, IDS), atol=1e-4)
    stored = onnx.load(exported / "model.onnx")
    tensors = {tensor.name: tensor for tensor in stored.graph.initializer}
    weight = weights["model.layers.0.mlp.down_proj"]
    codes = onnx.numpy_helper.to_array(tensors["layers.0.down.codes"]).astype(np.int16).T
    order = np.argsort(weight.g_idx, kind="stable")
    middle = 0 if "layers.0.down.zeros" in tensors else 1 << (bits - 1)
    np.testing.assert_array_equal(codes + middle, weight.codes[:, order])


def test_tables_of_codes_and_nf4_pass_their_own_check(model: Path, tmp_path: Path):
    source = nf4_folder(model, tmp_path / "nf4")
    exported = to_onnx(source, tmp_path / "onnx", portable=True)
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["portable"] is True
    assert (manifest["head_bits"], manifest["embedding_bits"]) == (8, 8)
    # Products are in float32: what is left is the order of additions.
    assert manifest["parity"]["max_difference"] < 1e-4
    assert 0.001 < manifest["parity"]["max_rounding"] < 0.01


def test_the_folder_says_that_its_cache_is_not_extended_in_place(model: Path, tmp_path: Path):
    exported = to_onnx(model, tmp_path / "onnx", portable=True, parity_positions=0)
    search = json.loads((exported / "genai_config.json").read_text())["search"]
    assert search["past_present_share_buffer"] is False


def test_kernels_are_not_timed_for_a_graph_without_them():
    with pytest.raises(SettingsError, match="a portable graph has none of them"):
        OnnxSettings(portable=True, precision="int4", tune_for="here")


def test_the_engine_refuses_it_in_a_line(model: Path, tmp_path: Path):
    from mistill.engine.onnx_model import OnnxModel

    exported = to_onnx(model, tmp_path / "onnx", portable=True, parity_positions=0)
    with pytest.raises(FolderError, match="is not a graph that this engine runs"):
        OnnxModel(exported)


@pytest.mark.skipif("MISTILL_GENAI_VENV" not in os.environ, reason="needs onnxruntime-genai")
def test_genai_runs_it_too(tmp_path: Path):
    import subprocess

    from tests.export.runtimes.test_genai import SCRIPT

    source = tiny_model(tmp_path / "model", tie_word_embeddings=True)
    exported = to_onnx(source, tmp_path / "onnx", portable=True, parity_positions=0)
    asked = {
        "folder": str(exported),
        "text": "wind",
        "chat": [{"role": "user", "content": "x"}],
        "ids": IDS[0].tolist(),
        "count": 12,
    }
    python = Path(os.environ["MISTILL_GENAI_VENV"]) / "bin" / "python"
    done = subprocess.run(
        [python, "-c", SCRIPT], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    ids = IDS[0].tolist()
    for _ in range(12):
        ids.append(int(torch_logits(source, np.array([ids]))[0, -1].argmax()))
    found = json.loads(done.stdout.splitlines()[-1])["ids"]
    assert found == ids[20 : 20 + len(found)]
    assert len(found) >= 1
