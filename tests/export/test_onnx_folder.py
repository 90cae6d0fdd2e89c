"""An ONNX folder is whole, describes itself, and appears only if it is right."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import export.checks.parity
import export.onnx_folder
from export.onnx_folder import to_onnx
from export.settings import OnnxSettings
from export.weights.architecture import rotary_tables
from mistill.engine.sampling import FOR_SMALL_MODELS
from mistill.errors import (
    ArchitectureError,
    ExportError,
    FolderError,
    SettingsError,
    TargetExistsError,
    VocabularyError,
)
from mistill.folders.folder import open_folder
from mistill.folders.lineage import read_lineage
from mistill.text.vocabulary import load_vocabulary
from mistill.weights.gptq_layout import QuantizedWeight
from mistill.weights.tensor_files import read_quantized
from tests.export.sources import gptq_folder, nf4_folder
from tests.reference.onnx_runner import OnnxRunner
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def chatbot(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two-layer Mistral, rounded to 8 bits; read only."""
    return to_onnx(model, tmp_path_factory.mktemp("folder") / "onnx", precision="int8")


def manifest_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return value


def change_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def change_weights(folder: Path, **tensors: Any) -> None:
    """Replace tensors, or drop those that are None; double underscores stand for dots."""
    stored = dict(load_file(folder / "model.safetensors"))
    for name, tensor in tensors.items():
        stored.pop(name.replace("__", "."))
        if tensor is not None:
            stored[name.replace("__", ".")] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """The two-layer Mistral, to be damaged."""
    return shutil.copytree(model, tmp_path / "copy")


# --- what is in it ------------------------------------------------------------------------------


def test_a_chatbot_says_how_it_is_sampled_unless_its_model_does(
    chatbot: Path, model: Path, tmp_path: Path
) -> None:
    said = json.loads((chatbot / "generation_config.json").read_text())
    assert said.items() >= FOR_SMALL_MODELS.items()
    assert load_vocabulary(chatbot).end_ids == load_vocabulary(model).end_ids
    copy = shutil.copytree(model, tmp_path / "model")
    own = {"do_sample": True, "temperature": 0.3, "eos_token_id": 2}
    (copy / "generation_config.json").write_text(json.dumps(own))
    bot = to_onnx(copy, tmp_path / "bot", parity_positions=0)
    assert json.loads((bot / "generation_config.json").read_text()) == own


def test_a_folder_holds_all_that_a_chat_needs(chatbot: Path, model: Path) -> None:
    assert sorted(file.name for file in chatbot.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "genai_config.json",
        "generation_config.json",
        "lineage.json",
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    info = open_folder(chatbot)
    assert (info.form, info.architecture, info.context_length) == ("onnx", "mistral", 512)
    assert info.parameters == open_folder(model).parameters
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (chatbot / name).read_bytes() == (model / name).read_bytes()


def test_the_manifest_holds_the_checksum_of_every_other_file(chatbot: Path) -> None:
    files = manifest_of(chatbot)["files"]
    assert files.keys() | {"manifest.json", "README.md"} == {
        file.name for file in chatbot.iterdir()
    }
    for name, entry in files.items():
        content = (chatbot / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_manifest_says_how_near_the_graph_is_to_pytorch(chatbot: Path) -> None:
    parity = manifest_of(chatbot)["parity"]
    assert parity["positions"] == 48
    assert 0 < parity["mean_kl"] < 1e-3
    assert parity["same_top"] > 0.9
    assert 0.002 < parity["max_rounding"] < 0.01
    assert 0 < parity["pieces_difference"] < parity["max_difference"] * 3


def test_float_parity_is_close(model: Path, tmp_path: Path) -> None:
    parity = manifest_of(to_onnx(model, tmp_path / "onnx"))["parity"]
    assert parity["max_difference"] < 3e-5
    assert (parity["same_top"], parity["max_rounding"]) == (1.0, 0.0)


def test_bytes_per_token_count_every_weight_that_is_read(model: Path, tmp_path: Path) -> None:
    # By hand: D = 64, 4 heads of 16 and 2 of them for keys and values, 128 wide, V = 384 or less.
    vocabulary = open_folder(model).vocabulary_size
    matrices = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128
    norms, rotary_row, embedding_row = 5 * 64 * 4, 8 * 4, 64 * 4
    floats = 2 * matrices * 4 + vocabulary * 64 * 4 + norms + 4 * rotary_row + embedding_row
    exported = to_onnx(model, tmp_path / "float", parity_positions=0)
    assert manifest_of(exported)["bytes_per_token"] == floats
    # 8-bit codes, and a scale of 4 bytes for 32 of them.
    codes = (2 * matrices + vocabulary * 64) * (1 + 4 / 32)
    row = 64 + 2 * 4
    exported = to_onnx(model, tmp_path / "int8", precision="int8", parity_positions=0)
    assert manifest_of(exported)["bytes_per_token"] == codes + norms + 4 * rotary_row + row


def test_a_shared_table_is_read_from_end_to_end_by_the_head(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", tie_word_embeddings=True)
    tied = to_onnx(source, tmp_path / "tied", precision="int8", parity_positions=0)
    apart = to_onnx(source, tmp_path / "apart", precision="int8", head_bits=32, parity_positions=0)
    vocabulary = open_folder(source).vocabulary_size
    difference = manifest_of(apart)["bytes_per_token"] - manifest_of(tied)["bytes_per_token"]
    assert difference == vocabulary * 64 * 4 - vocabulary * (64 + 2 * 4)


def test_the_lineage_goes_on(chatbot: Path, tmp_path: Path) -> None:
    entry = read_lineage(chatbot)[-1]
    assert entry["step"] == "export"
    assert entry["settings"]["precision"] == "int8"
    assert entry["settings"]["head_bits"] is None


def test_the_same_source_gives_the_same_bytes(chatbot: Path, model: Path, tmp_path: Path) -> None:
    again = to_onnx(model, tmp_path / "again", precision="int8")
    for name in ("model.onnx", "model.onnx.data", "genai_config.json"):
        assert (again / name).read_bytes() == (chatbot / name).read_bytes()
    assert manifest_of(again)["parity"] == manifest_of(chatbot)["parity"]


def test_the_context_is_the_models_own_but_at_most_4096(model: Path, tmp_path: Path) -> None:
    def context(**options: Any) -> tuple[int, int]:
        exported = to_onnx(model, tmp_path / "onnx", overwrite=True, parity_positions=0, **options)
        genai = json.loads((exported / "genai_config.json").read_text())
        return genai["model"]["context_length"], genai["search"]["max_length"]

    assert context() == (512, 512)
    assert context(context_length=100) == (100, 100)
    change = shutil.copytree(model, tmp_path / "long")
    change_config(change, max_position_embeddings=100_000)
    exported = to_onnx(change, tmp_path / "made", parity_positions=0)
    assert open_folder(exported).context_length == 4096


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_sources_are_read(dtype: str, model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = shutil.copytree(model, tmp_path / "half")
    half = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    half.save_pretrained(source)
    exported = to_onnx(source, tmp_path / "onnx")
    assert manifest_of(exported)["parity"]["max_difference"] < 3e-5


def test_weights_in_shards_are_read(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = shutil.copytree(model, tmp_path / "shards")
    (source / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(source, max_shard_size="100KB")
    assert (source / "model.safetensors.index.json").is_file()
    assert manifest_of(to_onnx(source, tmp_path / "onnx"))["parity"]["max_difference"] < 3e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gptq_folder_passes_its_own_check(bits: int, model: Path, tmp_path: Path) -> None:
    source, _ = gptq_folder(model, tmp_path / "gptq", bits=bits, act_order=True, symmetric=False)
    exported = to_onnx(source, tmp_path / "onnx")
    manifest = manifest_of(exported)
    assert manifest["precision"] == "auto"
    assert manifest["parity"]["mean_kl"] < 5e-3
    # Only the tables are rounded: the codes are the source's own.
    assert manifest["parity"]["max_rounding"] < 0.01
    assert open_folder(exported).quantization is not None


def test_an_nf4_folder_passes_its_own_check(model: Path, tmp_path: Path) -> None:
    exported = to_onnx(nf4_folder(model, tmp_path / "nf4"), tmp_path / "onnx")
    assert manifest_of(exported)["parity"]["mean_kl"] < 1e-3
    assert manifest_of(exported)["parity"]["max_rounding"] < 0.01


def test_a_bias_of_zeros_that_a_quantizer_added_is_left_out(model: Path, tmp_path: Path) -> None:
    source, _ = gptq_folder(model, tmp_path / "gptq")
    tensors = dict(load_file(source / "model.safetensors"))
    tensors["model.layers.0.mlp.down_proj.bias"] = np.zeros(64, np.float16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    exported = to_onnx(source, tmp_path / "onnx")
    assert b"bias" not in (exported / "model.onnx").read_bytes()


# --- what is refused ----------------------------------------------------------------------------


def refused(source: Path, target: Path, error: type[Exception], words: str, **options: Any) -> None:
    """The export fails with these words and leaves nothing behind."""
    with pytest.raises(error, match=words):
        to_onnx(source, target, **options)
    assert list(target.parent.glob(f"*{target.name}*")) == []


def test_an_existing_target_is_refused(model: Path, chatbot: Path) -> None:
    with pytest.raises(TargetExistsError):
        to_onnx(model, chatbot)


def test_an_onnx_folder_is_refused_as_a_source(chatbot: Path, tmp_path: Path) -> None:
    refused(chatbot, tmp_path / "onnx", FolderError, "is an ONNX folder already")


def test_rounding_codes_again_is_refused(model: Path, tmp_path: Path) -> None:
    source, _ = gptq_folder(model, tmp_path / "source")
    refused(source, tmp_path / "onnx", SettingsError, "rounds float weights", precision="int8")


def test_a_context_beyond_the_models_own_is_refused(model: Path, tmp_path: Path) -> None:
    refused(model, tmp_path / "onnx", SettingsError, "own context has 512", context_length=513)


def test_an_unknown_architecture_is_refused(copy: Path, tmp_path: Path) -> None:
    change_config(copy, model_type="gpt2")
    refused(copy, tmp_path / "onnx", ArchitectureError, "'gpt2'")


def test_a_folder_without_tokenizer_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").unlink()
    refused(copy, tmp_path / "onnx", (FolderError, VocabularyError), "tokenizer.json")  # type: ignore[arg-type]


def test_missing_weights_are_named(copy: Path, tmp_path: Path) -> None:
    change_weights(copy, model__layers__1__mlp__up_proj__weight=None)
    refused(copy, tmp_path / "onnx", FolderError, "layers.1.mlp.up_proj")


def test_a_weight_of_the_wrong_shape_is_refused(copy: Path, tmp_path: Path) -> None:
    change_weights(copy, model__layers__1__mlp__up_proj__weight=np.zeros((128, 32), np.float32))
    refused(copy, tmp_path / "onnx", FolderError, r"up_proj.*\(128, 32\).*\(128, 64\)")


def test_a_table_of_the_wrong_size_is_refused(copy: Path, tmp_path: Path) -> None:
    change_weights(copy, model__embed_tokens__weight=np.zeros((100, 64), np.float32))
    refused(copy, tmp_path / "onnx", FolderError, r"embed_tokens.*\(100, 64\)")


def test_a_weight_that_is_not_a_number_is_refused(copy: Path, tmp_path: Path) -> None:
    weight = np.zeros((64, 128), np.float32)
    weight[3, 5] = np.nan
    change_weights(copy, model__layers__0__mlp__down_proj__weight=weight)
    for precision in ("float32", "int8"):
        refused(
            copy, tmp_path / "onnx", FolderError, "down_proj.*not a number", precision=precision
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [("MOST_DIFFERENCE", 1e-9), ("MOST_DIVERGENCE", 0.0), ("MOST_ROUNDING", {8: 0.001})],
)
def test_a_graph_that_is_off_is_refused_with_figures(
    name: str, value: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.checks.parity, name, value)
    precision = "float32" if name == "MOST_DIFFERENCE" else "int8"
    words = "changed a matrix by 1%" if name == "MOST_ROUNDING" else "over 48 positions: largest"
    refused(model, tmp_path / "onnx", ExportError, words, precision=precision)


def test_a_wrong_graph_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any) -> Any:
        cosine, sine = real(*args)
        return cosine, -sine

    real = rotary_tables
    monkeypatch.setattr("export.graph.decoder.rotary_tables", wrong)
    for precision in ("float32", "int8", "int4"):
        refused(model, tmp_path / "onnx", ExportError, "48 positions", precision=precision)


def test_codes_that_are_misread_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one(*args: Any) -> QuantizedWeight:
        weight = read_quantized(*args)
        return replace(weight, zeros=weight.zeros + np.uint8(1))

    source, _ = gptq_folder(model, tmp_path / "source")
    monkeypatch.setattr("export.weights.folder_weights.read_quantized", off_by_one)
    refused(source, tmp_path / "onnx", ExportError, "zeros of model.layers.0")
    # Were they not compared, the logits would tell.
    monkeypatch.setattr("export.checks.lint.check_codes", lambda *args: None)
    refused(source, tmp_path / "onnx", ExportError, "48 positions")


def test_without_pytorch_the_folder_says_that_it_was_not_compared(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(export.onnx_folder, "can_compare", lambda: False)
    with caplog.at_level(logging.WARNING):
        exported = to_onnx(model, tmp_path / "onnx")
    assert manifest_of(exported)["parity"] is None
    assert "were not compared" in caplog.text
    assert np.isfinite(OnnxRunner(exported).logits(np.array([[5, 6, 7]]))).all()


def test_neither_pytorch_nor_transformers_is_needed(model: Path, tmp_path: Path) -> None:
    source, _ = gptq_folder(model, tmp_path / "source")
    exported = tmp_path / "onnx"
    script = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'transformers', 'bitsandbytes']); "
        f"import export; export.to_onnx({str(source)!r}, {str(exported)!r})"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert manifest_of(exported)["parity"] is None


def test_settings_and_options_give_the_same_folder(model: Path, tmp_path: Path) -> None:
    settings = OnnxSettings(precision="int4", head_bits=4, parity_positions=0)
    first = to_onnx(model, tmp_path / "first", settings=settings)
    second = to_onnx(model, tmp_path / "second", precision="int4", head_bits=4, parity_positions=0)
    assert (first / "model.onnx").read_bytes() == (second / "model.onnx").read_bytes()
    with pytest.raises(SettingsError, match="head_bit"):
        to_onnx(model, tmp_path / "third", head_bit=4)  # type: ignore[call-arg]
