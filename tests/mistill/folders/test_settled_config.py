"""Configs that say something else than the weights beside them: read as transformers reads both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export import to_gguf, to_onnx
from mistill.cli.inspection import inspect_folder
from mistill.engine import OnnxModel
from mistill.errors import FolderError
from mistill.folders.folder import describe, open_folder, read_config
from mistill.folders.weight_files import weight_files
from mistill.pytorch import load_pytorch
from mistill.sources.source import save_model
from quantize import rotate, to_nf4, to_rounding
from tests.tiny import changed_config, changed_tensors, tiny_model

IDS = np.random.default_rng(0).integers(5, 380, (1, 24))


def theirs(folder: Path) -> Any:
    """What transformers makes of a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)).logits.numpy()


def ours(folder: Path) -> Any:
    with torch.inference_mode():
        return load_pytorch(folder)(torch.from_numpy(IDS)).logits.numpy()


# --- a head of its own under a config that ties it ----------------------------------------------


@pytest.fixture(scope="module")
def own_head(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tied") / "own-head"
    return changed_config(model, place, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def equal_tables(own_head: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def repeat(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    return changed_tensors(own_head, tmp_path_factory.mktemp("tied") / "equal", repeat)


def test_a_head_that_differs_from_the_embedding_is_read_from_its_own_table(
    own_head: Path, tmp_path: Path
):
    expected = theirs(own_head)
    np.testing.assert_allclose(ours(own_head), expected, atol=1e-5)
    assert read_config(own_head)["tie_word_embeddings"] is False
    graph = OnnxModel(to_onnx(own_head, tmp_path / "onnx"))
    np.testing.assert_allclose(graph.logits(IDS), expected, atol=1e-4)
    np.testing.assert_allclose(theirs(rotate(own_head, tmp_path / "r")), expected, atol=1e-3)
    from gguf import GGUFReader

    names = [tensor.name for tensor in GGUFReader(to_gguf(own_head, tmp_path / "m.gguf")).tensors]
    assert "output.weight" in names


@pytest.mark.parametrize("quantize", [to_nf4, to_rounding])
def test_a_quantized_folder_keeps_a_head_of_its_own(quantize: Any, own_head: Path, tmp_path: Path):
    options = {} if quantize is to_nf4 else {"group_size": 32}
    folder = quantize(own_head, tmp_path / "small", **options)
    kept = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert kept.equal(load_file(own_head / "model.safetensors")["lm_head.weight"])
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_two_equal_tables_stay_tied(equal_tables: Path, tmp_path: Path):
    assert read_config(equal_tables)["tie_word_embeddings"] is True
    model = load_pytorch(equal_tables)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    folder = to_rounding(equal_tables, tmp_path / "small", group_size=32)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert not [note for note in inspect_folder(equal_tables).notes if "ties the head" in note]
    assert describe(equal_tables).parameters == describe(folder).parameters


def test_tables_of_two_types_are_compared_by_their_numbers(equal_tables: Path, tmp_path: Path):
    def shorten(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
        tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"].float()

    folder = changed_tensors(equal_tables, tmp_path / "types", shorten)
    assert read_config(folder)["tie_word_embeddings"] is True


def test_the_comparison_is_made_again_when_the_file_changes(equal_tables: Path, tmp_path: Path):
    folder = Path(shutil.copytree(equal_tables, tmp_path / "copy"))
    assert read_config(folder)["tie_word_embeddings"] is True

    def change(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"][-1, -1] += 1

    changed_tensors(folder, folder, change)
    assert read_config(folder)["tie_word_embeddings"] is False


def test_an_architecture_that_ties_by_default_is_looked_at_too(tmp_path: Path):
    folder = tiny_model(tmp_path / "m", model_type="smollm3", tie_word_embeddings=False)
    folder = changed_config(folder, tmp_path / "silent", "tie_word_embeddings")
    graph = OnnxModel(to_onnx(folder, tmp_path / "onnx"))
    np.testing.assert_allclose(graph.logits(IDS), theirs(folder), atol=1e-4)


def test_inspect_says_that_the_tables_differ(own_head: Path):
    (note,) = [note for note in inspect_folder(own_head).notes if "tables" in note]
    assert "two tables that differ: the head is read from its own" in note


# --- a single file beside an index --------------------------------------------------------------


@pytest.fixture
def stale(model: Path, tmp_path: Path) -> Path:
    """A model saved as one file beside the shards and the index of another."""
    folder = Path(shutil.copytree(model, tmp_path / "stale"))
    parent = load_file(tiny_model(tmp_path / "parent", seed=1) / "model.safetensors")
    names = sorted(parent)
    shards = {"model-00001-of-00002.safetensors": names[:5]}
    shards["model-00002-of-00002.safetensors"] = names[5:]
    for file, members in shards.items():
        save_file({name: parent[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


@pytest.mark.parametrize("shards_are_there", [True, False])
def test_a_single_file_comes_before_an_index(
    shards_are_there: bool, stale: Path, model: Path, tmp_path: Path
):
    if not shards_are_there:
        for file in stale.glob("*-of-*"):
            file.unlink()
    np.testing.assert_array_equal(theirs(stale), theirs(model))
    open_folder(stale)
    np.testing.assert_array_equal(ours(stale), ours(model))
    saved = save_model(stale, tmp_path / "saved")
    np.testing.assert_array_equal(ours(saved), ours(model))
    assert not list(saved.glob("*index*"))
    assert any("index.json lies beside" in note for note in inspect_folder(stale).notes)


@pytest.mark.parametrize(
    "weight_map", [{}, [], {"a": 1}, {"a": "../model.safetensors"}, {"a": "/etc/passwd"}, None]
)
def test_an_index_that_leads_nowhere_or_outside_is_refused(weight_map: Any, stale: Path):
    (stale / "model.safetensors").unlink()
    (stale / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FolderError, match=r"index.json is damaged: its weight_map"):
        weight_files(stale)
    with pytest.raises(FolderError, match=r"index.json is damaged"):
        open_folder(stale)


# --- padding tokens that are none ---------------------------------------------------------------


@pytest.mark.parametrize("padding", [-1, 384, 32000])
def test_a_padding_token_without_a_row_is_none(padding: int, model: Path, tmp_path: Path):
    folder = changed_config(model, tmp_path / "padded", pad_token_id=padding)
    np.testing.assert_array_equal(ours(folder), ours(model))
    quantized = to_nf4(folder, tmp_path / "nf4")
    assert json.loads((quantized / "config.json").read_text())["pad_token_id"] is None
    load_pytorch(quantized)
    graph = to_onnx(folder, tmp_path / "onnx", parity_positions=0)
    genai = json.loads((graph / "genai_config.json").read_text())["model"]
    assert genai["pad_token_id"] in genai["eos_token_id"]
    assert any(f"padding token {padding}" in note for note in inspect_folder(folder).notes)
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    del tokenizer_config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    from gguf import GGUFReader

    fields = GGUFReader(to_gguf(folder, tmp_path / "m.gguf")).fields
    assert "tokenizer.ggml.padding_token_id" not in fields


def test_a_padding_token_with_a_row_stays(model: Path):
    assert read_config(model)["pad_token_id"] == 2
    assert inspect_folder(model).notes == ("it has no lineage, because mistill did not make it",)
