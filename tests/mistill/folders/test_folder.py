"""A folder is described from its small files and headers, with all that is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mistill.errors import FolderError
from mistill.folders.folder import copy_companions, open_folder, problems


def test_a_model_folder_is_described_without_loading_it(teacher):
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    info = open_folder(teacher)
    assert info.form == "model"
    assert info.architecture == "mistral"
    assert info.layers == 4
    assert info.parameters == loaded.num_parameters()
    assert info.weight_bytes == (teacher / "model.safetensors").stat().st_size
    assert info.size_bytes == sum(file.stat().st_size for file in teacher.iterdir())
    assert info.context_length == 512
    assert 32 < info.bits_per_weight < 33


def test_everything_that_is_missing_is_listed_at_once(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "vocab_size": 3}))
    assert problems(tmp_path) == [
        "config.json lacks num_hidden_layers, hidden_size, max_position_embeddings",
        "tokenizer.json is missing",
        "model.safetensors is missing",
    ]
    with pytest.raises(FolderError, match=r"lacks .*; tokenizer.json is missing; model.safet"):
        open_folder(tmp_path)


def _only_index(folder: Path, index: dict[str, Any]) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "JSON object"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "is cut short"),
        (lambda folder: os.truncate(folder / "model.safetensors", 100), "not a safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a safetensors file"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "safetensors only",
        ),
        (
            lambda folder: _only_index(folder, {"weight_map": {"a": "model-00001.safetensors"}}),
            "model-00001.safetensors is missing",
        ),
        (
            lambda folder: _only_index(folder, {}),
            "index.json is damaged",
        ),
    ],
)
def test_damage_is_named(model, tmp_path, damage, words):
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(FolderError, match=words):
        open_folder(folder)


def test_a_way_of_quantizing_that_is_not_known_is_named(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FolderError, match="'awq'; mistill reads float, GPTQ and NF4"):
        open_folder(folder)


def test_a_folder_with_tekken_alone_is_told_what_to_do(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    (folder / "tokenizer.json").rename(folder / "tekken.json")
    with pytest.raises(FolderError, match=r"only tokenizer is tekken.json, .* put the tokenizer"):
        open_folder(folder)


def test_a_model_in_the_form_of_its_makers_is_told_what_to_do(model, tmp_path):
    (tmp_path / "params.json").write_text('{"dim": 64}')
    (tmp_path / "tekken.json").write_text("{}")
    shutil.copyfile(model / "model.safetensors", tmp_path / "consolidated.safetensors")
    with pytest.raises(FolderError) as no:
        open_folder(tmp_path)
    assert "in the form of its makers" in str(no.value)
    assert "give its transformers version" in str(no.value)
    assert "is missing" not in str(no.value)


def test_companions_are_copied_and_weights_are_not(model, tmp_path):
    copy_companions(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"hidden_size": "wide"},
            "hidden_size in config.json should be a whole number, not 'wide'",
        ),
        ({"vocab_size": None}, "vocab_size in config.json should be a whole number, not None"),
        ({"quantization_config": "gptq"}, "quantization_config .* should be an object"),
    ],
)
def test_a_config_with_values_of_the_wrong_kind_is_refused(model, tmp_path, changes, words):
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(FolderError, match=words):
        open_folder(folder)
