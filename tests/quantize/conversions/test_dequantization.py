from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mistill.errors import FolderError, SettingsError
from mistill.folders.folder import open_folder
from mistill.folders.lineage import read_lineage
from mistill.pytorch.loading import load_pytorch
from quantize import to_nf4
from quantize.conversions.dequantization import dequantize
from tests.gptq_matrix import Way, matrix_folder, simple_folder

IDS = torch.arange(5, 45)[None]


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_pytorch(folder)(IDS).logits
    return found


def test_float32_holds_exactly_what_the_codes_stand_for(tmp_path: Path) -> None:
    source, weights = matrix_folder(tmp_path / "source", "gptq")
    made = dequantize(source, tmp_path / "float")
    info = open_folder(made)
    assert (info.form, info.quantization) == ("model", None)
    assert info.parameters == open_folder(source).parameters
    stored = load_file(made / "model.safetensors")
    for module, weight in weights.items():
        np.testing.assert_array_equal(stored[f"{module}.weight"].numpy(), weight.dequantize())
    assert torch.equal(logits(made), logits(source))
    assert json.loads((made / "config.json").read_text())["dtype"] == "float32"
    step = read_lineage(made)[-1]
    assert (step["step"], step["settings"]) == ("dequantize", {"dtype": "float32"})


@pytest.mark.parametrize("double_quantization", [True, False])
def test_nf4_becomes_the_weights_that_bitsandbytes_computes_with(
    double_quantization: bool, model: Path, tmp_path: Path
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    source = to_nf4(model, tmp_path / "nf4", double_quantization=double_quantization)
    made = dequantize(source, tmp_path / "float")
    stored = load_file(made / "model.safetensors")
    assert not [name for name in stored if not name.endswith(".weight")]
    for name, module in load_pytorch(source).named_modules():
        state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            theirs = dequantize_4bit(module.weight.data, state).float()
            # One of two products may be fused with a sum in their kernel.
            torch.testing.assert_close(stored[f"{name}.weight"], theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_shorter_type_rounds_each_weight_once(dtype: str, tmp_path: Path) -> None:
    source, weights = simple_folder(tmp_path / "m", Way(3, False, 32, "none", "float16"), "gptq")
    made = dequantize(source, tmp_path / "float", dtype=dtype)  # type: ignore[arg-type]
    stored = load_file(made / "model.safetensors")
    kind = getattr(torch, dtype)
    assert {tensor.dtype for tensor in stored.values()} == {kind}
    for module, weight in weights.items():
        assert torch.equal(
            stored[f"{module}.weight"], torch.from_numpy(weight.dequantize()).to(kind)
        )
    assert json.loads((made / "config.json").read_text())["dtype"] == dtype


def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    source, _ = simple_folder(tmp_path / "m", Way(4, True, 32, "none", "float32"), "gptq")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.scales"] *= 1e6
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        FolderError, match=r"up_proj\.weight holds weights that torch\.float16 cannot hold"
    ):
        dequantize(source, tmp_path / "float", dtype="float16")
    assert not (tmp_path / "float").exists()


def test_the_zero_biases_of_autogptq_are_left_out(tmp_path: Path) -> None:
    source, _ = simple_folder(tmp_path / "m", Way(4, True, 32, "none", "float16"), "gptq")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(128)
    save_file(tensors, file, {"format": "pt"})
    made = dequantize(source, tmp_path / "float")
    assert "model.layers.0.mlp.up_proj.bias" not in load_file(made / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(FolderError, match="a bias that its architecture does not have"):
        dequantize(source, tmp_path / "other")


def test_a_float_folder_and_an_unknown_type_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="is a float folder; give a GPTQ or NF4 folder"):
        dequantize(model, tmp_path / "float")
    with pytest.raises(SettingsError, match="dtype must be one of float32"):
        dequantize(model, tmp_path / "float", dtype="float8")  # type: ignore[arg-type]
