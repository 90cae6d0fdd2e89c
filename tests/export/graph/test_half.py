"""A graph whose activations are float16 predicts what the float32 graph predicts.

Of float16's 11 binary digits the last is worth 2 ** -11 of a value. Between the embedding and a
logit of these models some 20 results are rounded one after another, and a logit is a sum of 64
products of values near 1 with weights near 0.15, so that its error is about
20 * 2 ** -11 * 0.15 * 8 = 0.012; the largest of thousands may be three times as far off.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from export.onnx_folder import to_onnx
from mistill.chat.bot import ChatBot
from mistill.cost_model.onnx_cost import constant_array
from mistill.engine.onnx_model import OnnxModel
from mistill.errors import ExportError
from tests.export.sources import gptq_folder, nf4_folder
from tests.tiny import tiny_model

TOLERANCE = 0.04
IDS = np.arange(5, 70)[None]


def logits_of(folder: Path) -> Any:
    return OnnxModel(folder, threads=1).logits(IDS)


def types_of(folder: Path) -> dict[str, str]:
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    return {entry.name: entry.type for entry in (*session.get_inputs(), *session.get_outputs())}


@pytest.mark.parametrize(
    "kind",
    [
        {"model_type": "mistral"},
        {"model_type": "llama", "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 16},
        {"model_type": "qwen2"},
    ],
    ids=lambda kind: kind["model_type"],
)
def test_a_float_model_predicts_the_same_in_half_the_bytes(
    kind: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(tmp_path / "model", seed=2, **kind)
    whole = to_onnx(model, tmp_path / "whole", parity_positions=0)
    half = to_onnx(model, tmp_path / "half", precision="float16")
    differences = np.abs(logits_of(half) - logits_of(whole))
    assert 0 < differences.max() < TOLERANCE
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in (half, whole)]
    assert sizes[0] < 0.55 * sizes[1]  # large tensors begin at a page
    types = types_of(half)
    assert types["past_key_values.0.key"] == types["present.1.value"] == "tensor(float16)"
    assert types["logits"] == "tensor(float)"
    manifest = json.loads((half / "manifest.json").read_text())
    assert (manifest["precision"], manifest["activations"]) == ("float16", "float16")
    assert 0 < manifest["parity"]["mean_kl"] < 1e-4


def test_auto_keeps_float_weights_in_the_type_of_the_activations(
    model: Path, tmp_path: Path
) -> None:
    one = to_onnx(model, tmp_path / "one", activations="float16", parity_positions=0)
    other = to_onnx(model, tmp_path / "other", precision="float16", parity_positions=0)
    assert (one / "model.onnx.data").read_bytes() == (other / "model.onnx.data").read_bytes()


@pytest.mark.parametrize("form", ["gptq", "gptq act-order", "nf4", "int4", "int8"])
def test_codes_stay_codes(form: str, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", seed=2)
    options: dict[str, Any] = {"float_columns": 0}
    if form == "nf4":
        source = nf4_folder(source, tmp_path / "source")
    elif form.startswith("gptq"):
        source, _ = gptq_folder(source, tmp_path / "source", act_order=form != "gptq")
    else:
        options["precision"] = form
    whole = to_onnx(source, tmp_path / "whole", parity_positions=0, **options)
    half = to_onnx(source, tmp_path / "half", activations="float16", **options)
    codes = [
        {
            str(node.name): constant_array(node.inputs[1])
            for node in ir.load(folder / "model.onnx").graph
            if node.op_type == "MatMulNBits"
        }
        for folder in (half, whole)
    ]
    assert codes[0].keys() == codes[1].keys()
    assert len(codes[0]) == 9  # four for each of two layers, and the head
    for name, stored in codes[0].items():
        other = codes[1][name]
        assert stored is not None
        assert other is not None
        assert np.array_equal(stored, other)
    # Activations are rounded to 8 bits in both graphs, and to others where float16 moved them.
    shifts = logits_of(half) - logits_of(whole)
    assert np.abs(shifts).mean() < 0.1
    assert types_of(half)["past_key_values.0.key"] == "tensor(float16)"


def test_a_text_is_written_on_a_cache_of_half_floats(model: Path, tmp_path: Path) -> None:
    folder = to_onnx(model, tmp_path / "half", precision="float16", parity_positions=0)
    whole = OnnxModel(folder, threads=1)
    written = list(islice(whole.stream(IDS[0].tolist()), 20))
    # One token at a time predicts what all predict together.
    scores = OnnxModel(folder, threads=1).logits(np.array([[*IDS[0], *written]]))[0, IDS.size - 1 :]
    chosen = scores[np.arange(20), written]
    assert (scores[:20].max(-1) - chosen < TOLERANCE).all()
    dtype = whole._cache.shapes["0.key"][2]
    assert dtype == np.float16
    kept = whole.save_cache(tmp_path / "kept.safetensors")
    other = OnnxModel(folder, threads=1)
    other.restore_cache(kept)
    assert other._cache.ids == whole._cache.ids
    bot = ChatBot(folder, threads=1, temperature=0, max_new_tokens=8)
    first = "".join(bot.reply("Hello"))
    bot.reset()
    assert "".join(bot.reply("Hello")) == first


def test_a_weight_that_float16_does_not_hold_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", seed=2)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 1e5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"layers.1.down.weight holds 1e\+05, .* most 65504; "):
        to_onnx(model, tmp_path / "half", precision="float16")
    assert not (tmp_path / "half").exists()


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
@pytest.mark.parametrize("precision", ["float16", "int4"])
def test_a_gpu_predicts_what_the_processor_predicts(
    provider: Any, precision: Any, model: Path, tmp_path: Path
) -> None:
    name = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[provider]
    if name not in onnxruntime.get_available_providers():
        pytest.skip(f"ONNX Runtime has no {name} here")
    folder = to_onnx(model, tmp_path / "half", precision=precision, activations="float16")
    gpu = OnnxModel(folder, provider=provider)
    # A processor rounds activations to 8 bits where it multiplies codes, a GPU does not.
    tolerance = TOLERANCE if precision == "float16" else 1.0
    assert np.abs(gpu.logits(IDS) - logits_of(folder)).max() < tolerance
    assert len(list(islice(gpu.stream(IDS[0].tolist()), 40))) == 40
