from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mistill.errors import FolderError, SettingsError
from mistill.folders.folder import open_folder, weight_files
from mistill.folders.lineage import read_lineage
from mistill.pytorch.loading import load_pytorch
from mistill.weights.gptq_layout import CheckpointFormat, QuantizedWeight, read_quantization
from mistill.weights.tensor_files import TensorFiles, read_quantized
from quantize.conversions.conversion import convert
from quantize.folders.auto_gptq_names import name_as_auto_gptq
from tests.gptq_matrix import WAYS, Way, matrix_folder, simple_folder

OTHER: dict[CheckpointFormat, CheckpointFormat] = {"gptq": "gptq_v2", "gptq_v2": "gptq"}
SKEWED = Way(4, False, 32, "none", "float16")


def stored_in(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()
    }


def quantized_in(folder: Path) -> dict[str, QuantizedWeight]:
    files = TensorFiles(folder)
    layout = read_quantization(json.loads((folder / "config.json").read_text()))
    assert layout is not None
    modules = [name.removesuffix(".qweight") for name in files if name.endswith(".qweight")]
    return {module: read_quantized(files, module, layout) for module in modules}


def assert_codes_are(folder: Path, weights: dict[str, QuantizedWeight]) -> None:
    """Not one code, zero, scale or index differs."""
    found = quantized_in(folder)
    assert found.keys() == weights.keys()
    for module, weight in weights.items():
        for name in ("codes", "zeros", "scales", "g_idx"):
            one, other = getattr(found[module], name), getattr(weight, name)
            np.testing.assert_array_equal(one, other, f"{module} {name}")
        assert found[module].scale_type == weight.scale_type


@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_every_way_to_store_a_matrix_converts_there_and_back_to_the_same_bytes(
    stored: CheckpointFormat, tmp_path: Path
) -> None:
    source, weights = matrix_folder(tmp_path / "source", stored)
    assert len(weights) >= len(WAYS) == 144
    assert_codes_are(source, weights)
    there = convert(source, tmp_path / "there", to=OTHER[stored])
    assert_codes_are(there, weights)
    back = convert(there, tmp_path / "back", to=stored)
    before, between, after = stored_in(source), stored_in(there), stored_in(back)
    assert before.keys() == between.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, between[name]) is not name.endswith(".qzeros"), name


@pytest.mark.parametrize("bits", [2, 3])
def test_2_and_3_bits_convert_likewise(bits: int, tmp_path: Path) -> None:
    source, weights = simple_folder(
        tmp_path / "source", Way(bits, False, 32, "dynamic", "bfloat16"), "gptq_v2"
    )
    there = convert(source, tmp_path / "there", to="gptq")
    assert_codes_are(there, weights)
    assert_codes_are(convert(there, tmp_path / "back", to="gptq_v2"), weights)


def test_the_model_computes_the_same_bits_and_remembers_its_way(tmp_path: Path) -> None:
    source, _ = simple_folder(tmp_path / "source", SKEWED, "gptq_v2")
    there = convert(source, tmp_path / "there", to="gptq")
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        ours, theirs = (load_pytorch(folder)(ids).logits for folder in (source, there))
    assert torch.equal(ours, theirs)
    config = json.loads((there / "config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == "gptq"
    step = read_lineage(there)[-1]
    assert (step["step"], step["settings"]) == ("convert", {"to": "gptq"})
    assert open_folder(there).parameters == open_folder(source).parameters


def test_what_other_readers_make_of_borrowing_zeros_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, weights = simple_folder(tmp_path / "source", SKEWED, "gptq_v2")
    count = sum(int((weight.zeros == 0).sum()) for weight in weights.values())
    with caplog.at_level(logging.WARNING):
        there = convert(source, tmp_path / "there", to="gptq")
    assert f"stores {count} zero points of 0 minus one" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        convert(there, tmp_path / "back", to="gptq_v2")
    assert caplog.text == ""


def test_a_folder_that_autogptq_named_becomes_one_that_transformers_reads(tmp_path: Path) -> None:
    source, weights = simple_folder(tmp_path / "source", SKEWED, "gptq")
    name_as_auto_gptq(source, "gptq_model-4bit-32g")
    assert not (source / "model.safetensors").exists()
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))

    assert open_folder(source).form == "gptq"
    load_pytorch(source)
    there = convert(source, tmp_path / "there", to="gptq_v2")
    assert (there / "model.safetensors").is_file()
    assert_codes_are(there, weights)
    for file in ("config.json", "quantize_config.json"):
        said = json.loads((there / file).read_text())
        said = said.get("quantization_config", said)
        assert (said["checkpoint_format"], said["model_file_base_name"]) == ("gptq_v2", "model")


@pytest.mark.parametrize("name", ["gptq_model-4bit-32g", "my-weights"])
def test_shards_are_found_under_the_names_that_autogptq_gives(name: str, tmp_path: Path) -> None:
    from mistill.weights.tensor_writer import TensorWriter

    source, weights = simple_folder(tmp_path / "source", SKEWED, "gptq_v2")
    tensors = stored_in(source)
    (source / "model.safetensors").unlink()
    with TensorWriter(source, shard_bytes=100_000) as writer:
        for tensor_name, tensor in tensors.items():
            writer.add(tensor_name, tensor)
    assert len(weight_files(source)) > 2
    name_as_auto_gptq(source, name)
    assert all(file.name.startswith(f"{name}-0000") for file in weight_files(source))
    assert_codes_are(source, weights)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"to": "gptq"}, FolderError, "stored as gptq already"),
        ({"to": "marlin"}, SettingsError, "to must be gptq or gptq_v2, not 'marlin'"),
    ],
)
def test_a_conversion_to_nothing_else_is_refused(
    options: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    source, _ = simple_folder(tmp_path / "source", SKEWED, "gptq")
    with pytest.raises(error, match=said):
        convert(source, tmp_path / "there", **options)
    assert not (tmp_path / "there").exists()


def test_a_float_folder_and_one_that_contradicts_itself_are_refused(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(FolderError, match="is a float folder"):
        convert(model, tmp_path / "there", to="gptq")
    source, _ = simple_folder(tmp_path / "source", SKEWED, "gptq", intermediate_size=512)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(FolderError, match="but the data is gptq"):
        convert(source, tmp_path / "there", to="gptq")
