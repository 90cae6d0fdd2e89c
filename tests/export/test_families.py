"""Decoders that differ from Llama by a few lines of config say what transformers makes of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from export import to_gguf, to_onnx
from export.weights.architecture import read_architecture
from mistill.errors import ArchitectureError, FolderError
from mistill.folders.folder import read_json
from tests.export.sources import gptq_folder, nf4_folder
from tests.reference.llama_cpp import log_probabilities
from tests.reference.onnx_runner import OnnxRunner
from tests.tiny import SENTENCES, changed_config, changed_tensors, tiny_model

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 0,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "smollm3": {
        "model_type": "smollm3",
        "num_hidden_layers": 5,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "smollm3 by list": {
        "model_type": "smollm3",
        "num_hidden_layers": 3,
        "no_rope_layers": [0, 1, 0],
        "tie_word_embeddings": False,
    },
    "llama 3.2": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}
IDS = np.random.default_rng(0).integers(5, 380, (2, 24))


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / "model"
    return tiny_model(folder, **FAMILIES[request.param])


def expected_logits(folder: Path, ids: NDArray[np.int64] = IDS) -> NDArray[np.float32]:
    """What transformers itself makes of a float folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.from_numpy(ids)).logits.numpy()
    return logits


def test_a_family_differs_from_a_llama_in_what_it_should(source: Path):
    """A mistake in the builder of these models would make the other tests say nothing."""
    kind = read_json(source / "config.json")["model_type"]
    tensors = load_file(source / "model.safetensors")
    assert ("model.layers.0.self_attn.q_proj.bias" in tensors) == (kind == "qwen2")
    assert ("model.layers.0.self_attn.k_norm.weight" in tensors) == (kind == "qwen3")
    read = read_architecture(read_json(source / "config.json"))
    assert bool(read.unrotated_layers) == (kind == "smollm3")


def test_the_graph_computes_what_transformers_computes(source: Path, tmp_path: Path):
    runner = OnnxRunner(to_onnx(source, tmp_path / "onnx", parity_positions=0))
    expected = expected_logits(source)
    np.testing.assert_allclose(runner.logits(IDS), expected, atol=3e-5)
    cache, pieces = None, []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 24)):
        logits, cache = runner.run(IDS[:1, start:end], cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected[:1], atol=3e-5)


def test_the_portable_graph_and_8_bits_pass_their_own_check(source: Path, tmp_path: Path):
    exported = to_onnx(source, tmp_path / "portable", portable=True)
    assert read_json(exported / "manifest.json")["parity"]["max_difference"] < 3e-5
    exported = to_onnx(source, tmp_path / "int8", precision="int8")
    assert read_json(exported / "manifest.json")["parity"]["mean_kl"] < 2e-3


@pytest.mark.parametrize("form", ["gptq", "nf4"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_quantized_folders_pass_their_own_check(family: str, form: str, tmp_path: Path):
    source = tiny_model(tmp_path / "model", **FAMILIES[family])
    if form == "nf4":
        quantized = nf4_folder(source, tmp_path / "quantized")
    else:
        quantized, _ = gptq_folder(source, tmp_path / "quantized", act_order=True)
    exported = to_onnx(quantized, tmp_path / "onnx")
    assert read_json(exported / "manifest.json")["parity"]["mean_kl"] < 5e-3
    biased = "model.layers.0.self_attn.q_proj.bias"
    if family == "qwen2":
        tensors = dict(load_file(quantized / "model.safetensors"))
        assert np.abs(tensors[biased]).max() > 0.1


def test_a_folder_without_the_biases_of_its_family_is_refused(tmp_path: Path):
    source = tiny_model(tmp_path / "model", **FAMILIES["qwen2"])
    tensors = dict(load_file(source / "model.safetensors"))
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FolderError, match=r"layers\.1\.self_attn\.k_proj\.bias is missing"):
        to_onnx(source, tmp_path / "onnx")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "smollm3"])
def test_what_a_config_leaves_out_means_what_transformers_means(kind: str):
    sizes: dict[str, Any] = {
        "vocab_size": 100, "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    theirs = AutoConfig.for_model(kind, **sizes)
    ours = read_architecture({"model_type": kind, **sizes})
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64)
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.rotary.base == theirs.rope_parameters["rope_theta"]
    unrotated = [n for n, turned in enumerate(getattr(theirs, "no_rope_layers", [])) if not turned]
    assert sorted(ours.unrotated_layers) == unrotated
    assert ours.sliding_window is None


def test_a_window_in_some_layers_only_is_refused(tmp_path: Path):
    options = {**FAMILIES["qwen2 window"], "max_window_layers": 1}
    source = tiny_model(tmp_path / "model", **options)
    with pytest.raises(ArchitectureError, match="a sliding window in some layers only"):
        to_onnx(source, tmp_path / "onnx")


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3_moe", "phi3", "mixtral"])
def test_other_families_are_refused_by_name(kind: str, model: Path, tmp_path: Path):
    source = shutil.copytree(model, tmp_path / "other")
    config = {**read_json(source / "config.json"), "model_type": kind}
    (source / "config.json").write_text(json.dumps(config))
    for make in (to_onnx, to_gguf):
        with pytest.raises(
            ArchitectureError, match=f"qwen3 and smollm3 models, and this one is '{kind}"
        ):
            make(source, tmp_path / "made")


def test_a_bias_that_the_architecture_does_not_have_is_refused(model: Path, tmp_path: Path):
    def add(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(64)

    folder = changed_tensors(model, tmp_path / "biased", add)
    for make in (to_onnx, to_gguf):
        with pytest.raises(FolderError, match=r"q_proj.bias is a bias that its architecture does"):
            make(folder, tmp_path / "made")


def test_more_layers_than_the_files_hold_tensors_are_refused_at_once(model: Path, tmp_path: Path):
    folder = changed_config(model, tmp_path / "deep", num_hidden_layers=9999)
    for make in (to_onnx, to_gguf):
        with pytest.raises(FolderError, match="is 9999, more than the 21 tensors"):
            make(folder, tmp_path / "made")


def test_a_window_that_the_config_leaves_out_holds_past_its_end(tmp_path: Path):
    source = tiny_model(
        tmp_path / "model", num_hidden_layers=1, sliding_window=4096, max_position_embeddings=8192
    )
    silent = changed_config(source, tmp_path / "silent", "sliding_window")
    graph = to_onnx(silent, tmp_path / "onnx", context_length=8192, parity_positions=0)
    ids = np.random.default_rng(0).integers(5, 380, (1, 4200))
    expected = expected_logits(silent, ids)[:, -50:]
    np.testing.assert_allclose(OnnxRunner(graph).logits(ids)[:, -50:], expected, atol=1e-4)
    from gguf import GGUFReader

    fields = GGUFReader(to_gguf(silent, tmp_path / "m.gguf")).fields
    assert fields["llama.context_length"].contents() == 4096
    assert fields["llama.attention.sliding_window"].contents() == 4096


# --- llama.cpp ----------------------------------------------------------------------------------


def test_a_gguf_file_has_the_names_of_its_family(tmp_path: Path):
    from gguf import GGUFReader

    for family, names in {
        "qwen2": {"blk.1.attn_q.bias", "blk.1.attn_v.bias"},
        "qwen3": {"blk.1.attn_q_norm.weight", "blk.1.attn_k_norm.weight"},
        "smollm3": {"blk.4.attn_q.weight"},
    }.items():
        source = tiny_model(tmp_path / family, **FAMILIES[family])
        reader = GGUFReader(to_gguf(source, tmp_path / f"{family}.gguf", dtype="float32"))
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        assert names <= tensors.keys()
        assert reader.fields["general.architecture"].contents() == family
        stored = load_file(source / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
        same = np.array_equal(tensors["blk.1.attn_q.weight"], stored)
        assert same == (family != "smollm3")  # the rows of Qwen's stand as in transformers


def test_llama_cpps_own_choice_of_layers_is_the_only_one(tmp_path: Path):
    source = tiny_model(tmp_path / "model", **FAMILIES["smollm3 by list"])
    with pytest.raises(
        ArchitectureError, match=r"leaves every 4th layer .* the layers \[0, 2\] without"
    ):
        to_gguf(source, tmp_path / "tiny.gguf")
    scaled = {**FAMILIES["qwen2"], "rope_parameters": FAMILIES["llama 3.2"]["rope_parameters"]}
    source = tiny_model(tmp_path / "scaled", **scaled)
    with pytest.raises(
        ArchitectureError,
        match="does not support llama3 scaling of the rotary embedding in a qwen2",
    ):
        to_gguf(source, tmp_path / "tiny.gguf")


@pytest.mark.skipif("MISTILL_LLAMA_CPP" not in os.environ, reason="MISTILL_LLAMA_CPP is not set")
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3"])
def test_llama_cpp_predicts_what_transformers_does(family: str, tmp_path: Path):
    source = tiny_model(tmp_path / "model", **FAMILIES[family])
    file = to_gguf(source, tmp_path / "tiny.gguf", dtype="float32")
    program = Path(os.environ["MISTILL_LLAMA_CPP"]) / "llama-perplexity"
    tokens, theirs = log_probabilities(program, file, " ".join(SENTENCES) * 3, tmp_path, 64)
    ours = expected_logits(source, tokens[:1].astype(np.int64))[0, 32:63].astype(np.float64)
    ours -= np.logaddexp.reduce(ours, axis=-1, keepdims=True)
    near = ours > ours.max(-1, keepdims=True) - 14
    assert np.abs(ours - theirs[0])[near].max() < 1e-3


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("qwen3", {"attention_bias": True}, "qwen3 models have no bias in self_attn.o_proj"),
        (
            "smollm3",
            {"attention_bias": True, "num_hidden_layers": 4},
            "smollm3 models have no bias in self_attn.o_proj",
        ),
        (
            "smollm3",
            {"mlp_bias": True, "num_hidden_layers": 4},
            "no bias in mlp.gate_proj, mlp.up_proj, mlp.down_proj",
        ),
        ("qwen2", {"head_dim": 32}, "64 wide together, and those of this model are 128"),
    ],
)
def test_what_llama_cpps_graph_of_a_kind_cannot_hold_is_refused(
    kind: str, options: dict[str, Any], words: str, tmp_path: Path
):
    source = tiny_model(tmp_path / "model", model_type=kind, **options)
    with pytest.raises(ArchitectureError, match=words):
        to_gguf(source, tmp_path / "tiny.gguf")
    assert not (tmp_path / "tiny.gguf").exists()


def test_llama_cpps_llama_has_every_bias(tmp_path: Path):
    options = {"attention_bias": True, "mlp_bias": True, "head_dim": 32}
    source = tiny_model(tmp_path / "model", model_type="llama", **options)
    to_gguf(source, tmp_path / "tiny.gguf")
