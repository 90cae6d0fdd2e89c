from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mistill.folder import describe, open_folder, read_json, read_lineage
from mistill.pytorch import load_pytorch
from mistill.vocabulary import load_vocabulary
from quantize import to_nf4
from quantize.storage import REPORT_FILE


@pytest.fixture(scope="module", params=[True, False], ids=["double", "single"])
def made(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, Path]:
    target = tmp_path_factory.mktemp("nf4") / "small"
    return request.param, to_nf4(model, target, double_quantization=request.param)


def test_codes_and_scales_are_those_of_bitsandbytes(made: tuple[bool, Path], model: Path) -> None:
    from bitsandbytes.functional import quantize_4bit

    double, target = made
    tensors = load_file(target / "model.safetensors")
    for name, weight in load_file(model / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(tensors[name], weight)
            continue
        codes, state = quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=double
        )
        assert torch.equal(tensors[name], codes)
        assert torch.equal(tensors[f"{name}.absmax"], state.absmax)
        if double:
            assert torch.equal(tensors[f"{name}.nested_absmax"], state.state2.absmax)


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
    report = read_json(target / REPORT_FILE)
    assert len(report["modules"]) == 14
    assert "model.embed_tokens.weight" in report["kept"]
    assert (target / "chat_template.jinja").read_text() == (
        model / "chat_template.jinja"
    ).read_text()


def test_transformers_loads_it_by_itself(made: tuple[bool, Path]) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(made[1], local_files_only=True)
    assert type(loaded.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
