"""NF4 layers keep the order in which they were stored, also on processors with AVX512-BF16.

Where the processor has it, bitsandbytes' own repacking is what must not happen; where not, the
processor is said to have it, and a repacking would be seen.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantize
from mistill.errors import ArchitectureError
from mistill.folders.folder import open_folder
from mistill.loss.heads import read_head
from mistill.pytorch.four_bit import hold_codes_as, keep_as_stored
from mistill.pytorch.loading import load_pytorch
from mistill.pytorch.spread import load_spread
from mistill.training.adapters import add_adapters

modules = pytest.importorskip("bitsandbytes.nn.modules")

IDS = torch.arange(40)[None] % 300 + 5
HAS_IT = bool(modules.has_avx512bf16())


@pytest.fixture
def repacked(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What was repacked; every layer that is made now believes in AVX512-BF16."""
    seen: list[torch.Tensor] = []

    def repack(weight: torch.Tensor, state: Any) -> Any:
        seen.append(weight)
        return weight, state

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", repack)
    return seen


def of_folder(folder: Path, made: Path) -> Any:
    return load_pytorch(quantize.to_nf4(folder, made))


def while_loading(folder: Path, made: Path) -> Any:
    return load_spread(open_folder(folder), torch.float32, {"": "cpu"}, nf4=True)


def in_bfloat16(folder: Path, made: Path) -> Any:
    return load_spread(open_folder(folder), torch.bfloat16, {"": "cpu"}, nf4=True)


WAYS = [of_folder, while_loading, in_bfloat16]


@pytest.mark.parametrize("load", WAYS)
def test_no_layer_repacks_in_an_evaluation(
    tmp_path: Path, model: Path, repacked: list[torch.Tensor], load: Callable[..., Any]
) -> None:
    four_bit = load(model, tmp_path / "nf4").eval()
    with torch.no_grad():
        four_bit(IDS, use_cache=False)
    assert repacked == []
    unguarded: Any = next(m for m in four_bit.modules() if type(m).__name__ == "Linear4bit")
    unguarded.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        four_bit(IDS, use_cache=False)
    assert len(repacked) == 1, "the simulation sees no repacking at all"


def step(adapted: Any) -> dict[str, torch.Tensor]:
    """The gradient of the cross-entropy with some tokens."""
    adapted.zero_grad()
    adapted.train()
    logits = adapted(IDS, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1].float(), IDS[0, 1:]).backward()
    return {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("load", WAYS[:2])
def test_an_evaluation_changes_neither_gradients_nor_what_is_saved(
    tmp_path: Path, model: Path, load: Callable[..., Any]
) -> None:
    adapted = load(model, tmp_path / "nf4")
    torch.manual_seed(0)
    add_adapters(adapted, rank=4)
    before, stored = step(adapted), {n: v.clone() for n, v in adapted.state_dict().items()}
    adapted.eval()
    with torch.no_grad():
        adapted(IDS, use_cache=False)
    after = step(adapted)
    assert before.keys() == after.keys()
    assert len(before) > 10
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=0, atol=0, msg=name)
    for name, value in adapted.state_dict().items():
        assert torch.equal(value, stored[name]), name


@pytest.mark.filterwarnings("ignore:bitsandbytes.*an autograd kernel was not registered")
@pytest.mark.skipif(not HAS_IT, reason="this processor has no AVX512-BF16")
def test_without_the_guard_an_evaluation_does_change_them(tmp_path: Path, model: Path) -> None:
    adapted = while_loading(model, tmp_path)
    for module in adapted.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = True
    torch.manual_seed(0)
    add_adapters(adapted, rank=4)
    before = step(adapted)
    adapted.eval()
    with torch.no_grad():
        adapted(IDS, use_cache=False)
    repacked = [m for m in adapted.modules() if type(m).__name__ == "Linear4bit"]
    assert any(m.weight.quant_state.packing_format_for_cpu for m in repacked)
    with pytest.raises(ArchitectureError, match="has repacked a 4-bit layer"):
        keep_as_stored(adapted)
    after = step(adapted)
    alike = [
        torch.cosine_similarity(before[n].flatten(), after[n].flatten(), dim=0).item()
        for n in after
        if before[n].norm() > 0
    ]
    assert min(alike) < 0.99, "bitsandbytes has repaired it; say so in docs/tuning.md"


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="not Linux")
def test_a_model_that_was_quantized_while_loading_holds_no_file_of_floats(
    tmp_path: Path, model: Path
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "floats"))
    quantized = while_loading(folder, tmp_path)
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert quantized.get_input_embeddings().weight.isfinite().all()


@pytest.mark.parametrize("double", [True, False])
def test_gradients_through_four_bits_are_those_through_the_floats_that_they_stand_for(
    tmp_path: Path, model: Path, double: bool
) -> None:
    small = quantize.to_nf4(model, tmp_path / "nf4", double_quantization=double)
    adapted = load_pytorch(small)
    floats = load_pytorch(quantize.dequantize(small, tmp_path / "floats"))
    gradients = []
    for one in (adapted, floats):
        torch.manual_seed(0)
        add_adapters(one, rank=4)
        gradients.append(step(one))
    ours, theirs = gradients
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_head_that_was_repacked_is_not_read(model: Path, tmp_path: Path) -> None:
    four_bit = while_loading(model, tmp_path)
    head: Any = four_bit.model.layers[0].mlp.up_proj
    four_bit.lm_head = head
    read_head(four_bit)
    head.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ArchitectureError, match="has repacked a 4-bit layer"):
        read_head(four_bit)


# --- codes that are held as numbers of the other weights' type -----------------------------------


def four_bit_layers(model: Any) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_held_as_floats_are_those_that_bitsandbytes_stores_so(
    dtype: torch.dtype, model: Path
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    ours: Any = load_spread(open_folder(model), torch.float32, {"": "cpu"}, nf4=True)
    bytes_before = {name: one.weight.data.clone() for name, one in four_bit_layers(ours).items()}
    assert hold_codes_as(ours, dtype) == len(bytes_before) == 14
    theirs = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_storage=dtype,
        ),
    )
    stored = four_bit_layers(theirs)
    state = ours.state_dict()
    for name, layer in four_bit_layers(ours).items():
        assert layer.weight.dtype == layer.quant_storage == dtype
        # Where bitsandbytes finds it when FSDP has made another tensor of the weight.
        assert layer.quant_state is layer.weight.quant_state
        codes = layer.weight.data.view(torch.uint8)
        assert torch.equal(codes, stored[name].weight.data.view(torch.uint8))
        # What a checkpoint holds is read again as the codes that came.
        held = state[f"{name}.weight"].view(torch.uint8).reshape(-1, 1)
        assert torch.equal(held, bytes_before[name])


def test_the_gradients_are_those_of_codes_in_bytes(model: Path) -> None:
    found = []
    for floats in (False, True):
        torch.manual_seed(3)
        loaded: Any = load_spread(open_folder(model), torch.float32, {"": "cpu"}, nf4=True)
        if floats:
            hold_codes_as(loaded, torch.float32)
        add_adapters(loaded, 4)
        for name, parameter in loaded.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        assert {one.dtype for one in loaded.parameters() if one.requires_grad} == {torch.float32}
        loaded.requires_grad_(False)
        trained = {name: one for name, one in loaded.named_parameters() if ".lora_" in name}
        for parameter in trained.values():
            parameter.requires_grad_(True)
        loss = loaded(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        found.append({name: one.grad.clone() for name, one in trained.items()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, found[1][name]), name


def test_codes_that_fill_no_floats_are_refused() -> None:
    layer: Any = modules.Linear4bit(2, 3, bias=False, quant_type="nf4").to("cpu")
    assert layer.weight.numel() == 3
    with pytest.raises(ArchitectureError, match="3 bytes of 4-bit codes do not fill"):
        hold_codes_as(torch.nn.Sequential(layer), torch.float32)
