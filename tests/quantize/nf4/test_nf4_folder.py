from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistill.errors import ArchitectureError, FolderError
from mistill.folders.folder import QUANTIZE_REPORT_FILE, describe, open_folder, read_json
from mistill.folders.lineage import read_lineage
from mistill.pytorch.loading import load_pytorch
from mistill.text.vocabulary import load_vocabulary
from mistill.weights.nf4_layout import NF4_NAMES, read_nf4
from quantize import to_nf4
from tests.tiny import tiny_model


@pytest.fixture(scope="module", params=[True, False], ids=["double", "single"])
def made(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, Path]:
    target = tmp_path_factory.mktemp("nf4") / "small"
    return request.param, to_nf4(model, target, double_quantization=request.param)


def test_the_folder_is_the_one_that_transformers_and_bitsandbytes_write(
    made: tuple[bool, Path], model: Path, tmp_path: Path
) -> None:
    """Every tensor by name, type and bytes, and how config.json says to read them."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    double, target = made
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", quantization_config=quantization, device_map={"": "cpu"}
    )
    theirs.save_pretrained(tmp_path)
    expected, found = (load_file(folder / "model.safetensors") for folder in (tmp_path, target))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert read_json(target / "config.json") == read_json(tmp_path / "config.json")


def test_it_is_written_and_read_without_bitsandbytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    target = to_nf4(model, tmp_path / "small")
    files = load_file(target / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj"):
        parts = {
            part: files[f"{name}.{part}"].numpy() for part in NF4_NAMES if f"{name}.{part}" in files
        }
        decoded = torch.from_numpy(read_nf4(parts, name).dequantize())
        original = load_file(model / "model.safetensors")[f"{name}.weight"]
        # NF4 leaves about a tenth of a normal weight's size, and its sign.
        assert 0.05 < (decoded - original).norm() / original.norm() < 0.13


def test_it_runs_without_bitsandbytes_as_with_it(
    made: tuple[bool, Path], model: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    ids = torch.tensor([load_vocabulary(model).encode("The mistral is a cold wind.")])
    with torch.no_grad():
        expected = load_pytorch(made[1])(ids).logits
        for name in ("bitsandbytes", "bitsandbytes.nn", "bitsandbytes.nn.modules"):
            monkeypatch.setitem(sys.modules, name, None)
        found = load_pytorch(made[1])(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "bitsandbytes is not installed" in caplog.text
    assert "take the memory of float weights" in caplog.text


def test_a_tied_head_is_stored_once_and_not_quantized(tmp_path: Path) -> None:
    tied = tiny_model(tmp_path / "tied", model_type="llama", tie_word_embeddings=True, seed=3)
    target = to_nf4(tied, tmp_path / "small")
    names = load_file(target / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names
    assert not any(name.startswith("lm_head") for name in names)
    assert describe(target).parameters == describe(tied).parameters


def test_rows_that_share_a_block_are_refused(tmp_path: Path) -> None:
    odd = tiny_model(tmp_path / "odd", intermediate_size=96)
    with pytest.raises(ArchitectureError, match=r"multiple of 64.*down_proj has 96"):
        to_nf4(odd, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_weight_that_is_no_number_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FolderError, match=r"layers.1.mlp.up_proj.weight.*infinite or not a number"):
        to_nf4(tmp_path / "broken", tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_double_quantization_is_written_only_where_asked_for(made: tuple[bool, Path]) -> None:
    double, target = made
    names = load_file(target / "model.safetensors").keys()
    assert any(name.endswith("nested_absmax") for name in names) == double


def test_the_folder_runs_as_the_weights_that_it_stands_for(
    made: tuple[bool, Path], model: Path
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    double, target = made
    plain = load_pytorch(model)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("_proj.weight"):
                codes, state = quantize_4bit(
                    parameter, blocksize=64, quant_type="nf4", compress_statistics=double
                )
                parameter.copy_(dequantize_4bit(codes, state))
        ids = torch.tensor([load_vocabulary(model).encode("The mistral is a cold wind.")])
        torch.testing.assert_close(
            load_pytorch(target)(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_the_folder_says_what_it_is_and_what_stayed(made: tuple[bool, Path], model: Path) -> None:
    double, target = made
    info = open_folder(target)
    assert info.form == "nf4"
    assert info.parameters == describe(model).parameters
    step = read_lineage(target)[-1]
    assert step["step"] == "nf4"
    assert step["settings"] == {"double_quantization": double}
    assert "lm_head.weight" in step["kept_float"]
    report = read_json(target / QUANTIZE_REPORT_FILE)
    assert len(report["modules"]) == 14
    assert "model.embed_tokens.weight" in report["kept"]
    assert (target / "chat_template.jinja").read_text() == (
        model / "chat_template.jinja"
    ).read_text()


def test_transformers_loads_it_by_itself(made: tuple[bool, Path]) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(made[1], local_files_only=True)
    assert type(loaded.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
