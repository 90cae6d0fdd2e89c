from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mistill.errors import SettingsError
from mistill.folders.folder import QUANTIZE_REPORT_FILE, QUANTIZE_TABLE_FILE, open_folder, read_json
from mistill.pytorch.loading import load_pytorch
from mistill.weights.gptq_layout import ModuleFormat, QuantizedWeight, read_quantization, unpack
from quantize import GptqSettings, RoundingSettings, to_gptq, to_rounding
from quantize.gptq.rounding import round_weight
from quantize.overrides import parse_override
from tests.tiny import tiny_model

SMALL: dict[str, Any] = {"group_size": 16, "samples": 4, "block_length": 32}
PLAIN = ModuleFormat(bits=4, group_size=16)


def stored(folder: Path, module: str) -> QuantizedWeight:
    layout = read_quantization(read_json(folder / "config.json"))
    assert layout is not None
    form = layout.format_of(module)
    assert form is not None
    tensors = load_file(folder / "model.safetensors")
    parts = {
        name.rpartition(".")[2]: tensor.numpy()
        for name, tensor in tensors.items()
        if name.startswith(f"{module}.")
    }
    return unpack(parts, form.bits, form.group_size, layout.checkpoint_format)


@pytest.mark.parametrize(
    ("text", "pattern", "form"),
    [
        ("a.*: bits=8, group_size=32", "a.*", ModuleFormat(bits=8, group_size=32)),
        ("a: bits=3", "a", ModuleFormat(bits=3, group_size=16)),
        (
            "(?:a|b): symmetric=false",
            "(?:a|b)",
            ModuleFormat(bits=4, group_size=16, symmetric=False),
        ),
        (" a : group_size = -1 ", "a", ModuleFormat(bits=4, group_size=-1)),
        ("a: keep", "a", None),
    ],
)
def test_an_override_says_what_differs(text: str, pattern: str, form: ModuleFormat | None) -> None:
    assert parse_override(text, PLAIN) == (pattern, form)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("down_proj", "reads 'REGEX: bits=8"),
        ("down_proj:", "reads 'REGEX: bits=8"),
        (": bits=8", "reads 'REGEX: bits=8"),
        ("down_proj: bits=5", "bits must be 2, 3, 4 or 8, not 5"),
        ("down_proj: group_size=0", "group_size must be 1 or more"),
        ("down_proj: bits=many", "bits in an override must be a whole number, not 'many'"),
        ("down_proj: symmetric=2", "symmetric in an override must be true or false"),
        ("down_proj: order=none", "may set bits, group_size and symmetric"),
        ("(down_proj: bits=8", "not a regular expression"),
    ],
)
def test_an_override_of_another_form_is_refused(text: str, said: str) -> None:
    for settings in (GptqSettings, RoundingSettings):
        with pytest.raises(SettingsError, match=said):
            settings(overrides=(text,))
    with pytest.raises(SettingsError, match="must be a list of texts"):
        GptqSettings(overrides="a: bits=8")  # type: ignore[arg-type]


def test_the_first_override_that_matches_from_the_start_decides() -> None:
    settings = GptqSettings(overrides=(r".*layers\.1\..*: keep", ".*down_proj: bits=8"))
    assert settings.format_of("model.layers.1.mlp.down_proj") is None
    down = settings.format_of("model.layers.0.mlp.down_proj")
    assert down == ModuleFormat(bits=8, group_size=128)
    up = settings.format_of("model.layers.0.mlp.up_proj")
    assert up == ModuleFormat(bits=4, group_size=128)


def test_an_override_that_means_no_module_is_refused_with_a_hint(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"matches no module.*try '\.\*down_proj'"):
        to_gptq(model, tmp_path / "x", texts=chats, overrides=("down_proj: bits=8",), **SMALL)
    with pytest.raises(SettingsError, match=r"'no_such' matches no module; module names look like"):
        to_rounding(model, tmp_path / "x", group_size=16, overrides=("no_such: keep",))
    with pytest.raises(SettingsError, match="group_size 48 does not divide the 128 inputs of down"):
        to_rounding(model, tmp_path / "x", group_size=16, overrides=(".*down_proj: group_size=48",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("order", ["static", "group"])
def test_modules_get_the_grid_of_their_override_and_load_as_such(
    order: Any, model: Path, chats: Path, tmp_path: Path
) -> None:
    overrides = (
        ".*layers.0.self_attn.o_proj: keep",
        ".*k_proj: bits=8, group_size=32",
        ".*down_proj: bits=3, group_size=64, symmetric=false",
    )
    settings = GptqSettings(order=order, overrides=overrides, **SMALL)
    target = to_gptq(model, tmp_path / "mixed", texts=chats, settings=settings)
    assert open_folder(target).form == "gptq"
    tensors = load_file(target / "model.safetensors")
    before = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(tensors[name], before[name])
    key, down = (
        stored(target, f"model.layers.1.{part}") for part in ("self_attn.k_proj", "mlp.down_proj")
    )
    assert (key.bits, key.scales.shape, key.symmetric) == (8, (32, 2), True)
    assert (down.bits, down.scales.shape, down.symmetric) == (3, (64, 2), False)
    loaded = load_pytorch(target)
    for module in ("model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        weight = loaded.get_parameter(f"{module}.weight").detach()
        np.testing.assert_array_equal(weight.numpy(), stored(target, module).dequantize())
        # The weights are still those of this module.
        assert torch.corrcoef(
            torch.stack([weight.flatten(), before[f"{module}.weight"].flatten()])
        )[0, 1] > (0.99 if module.endswith("k_proj") else 0.9)
    # What comes first in the model has the codes that it has where all modules are like it.
    alike = to_gptq(
        model, tmp_path / "alike", texts=chats, **{**SMALL, "group_size": 32}, bits=8, order=order
    )
    first = "model.layers.0.self_attn.k_proj"
    np.testing.assert_array_equal(stored(target, first).codes, stored(alike, first).codes)
    report = read_json(target / QUANTIZE_REPORT_FILE)
    assert name in report["kept"]
    lines = {line["name"]: line for line in report["modules"]}
    assert lines["model.layers.0.self_attn.k_proj"]["bits"] == 8
    assert lines["model.layers.0.mlp.down_proj"]["group_size"] == 64
    assert len(lines) == 13


def test_the_table_of_the_report_has_a_line_for_each_module(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    target = to_gptq(model, tmp_path / "small", texts=chats, **SMALL)
    head, *lines = (target / QUANTIZE_TABLE_FILE).read_text().splitlines()
    assert head == "name,bits,group_size,loss,damping,dead_columns,seconds"
    modules = read_json(target / QUANTIZE_REPORT_FILE)["modules"]
    assert [line.split(",")[0] for line in lines] == [module["name"] for module in modules]
    assert [float(line.split(",")[3]) for line in lines] == [module["loss"] for module in modules]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_tables_are_quantized_when_asked_for(
    tied: bool, bits: int, chats: Path, tmp_path: Path
) -> None:
    source = tiny_model(tmp_path / "source", model_type="llama", seed=6, tie_word_embeddings=tied)
    tables: dict[str, Any] = {"embedding_bits": bits}
    if not tied:
        tables["head_bits"] = 8
    gptq = to_gptq(source, tmp_path / "gptq", texts=chats, **SMALL, **tables)
    plain = to_rounding(source, tmp_path / "plain", group_size=16, **tables)
    before = load_file(source / "model.safetensors")
    for folder in (gptq, plain):
        names = load_file(folder / "model.safetensors").keys()
        assert "model.embed_tokens.weight" not in names
        assert not {"lm_head.weight"} & names
        assert ("lm_head.qweight" in names) == (not tied)
        assert stored(folder, "model.embed_tokens").bits == bits
        loaded = load_pytorch(folder)
        for module in ("model.embed_tokens",) if tied else ("model.embed_tokens", "lm_head"):
            held = stored(folder, module).dequantize()
            weight = loaded.get_parameter(f"{module}.weight").detach().numpy()
            np.testing.assert_array_equal(weight, held)
            error = np.abs(held - before[f"{module}.weight"].numpy()).mean()
            assert error < (0.05 if module.startswith("model") and bits == 4 else 0.004)
        modules = [line["name"] for line in read_json(folder / QUANTIZE_REPORT_FILE)["modules"]]
        assert ("lm_head" in modules) == (not tied)
        assert modules.count("model.embed_tokens") == 1
    if not tied:  # an embedding is rounded on the best scales, with text or without
        own = RoundingSettings(bits=bits, group_size=16)
        expected = round_weight(before["model.embed_tokens.weight"], own, candidates=16)
        for folder in (gptq, plain):
            found = stored(folder, "model.embed_tokens")
            np.testing.assert_array_equal(found.codes, expected.codes)


def test_layers_are_calibrated_on_what_the_rounded_embedding_sends_them(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    target = to_gptq(model, tmp_path / "whole", texts=chats, embedding_bits=4, **SMALL)
    changed = tmp_path / "changed"
    shutil.copytree(model, changed)
    weights = load_file(changed / "model.safetensors")
    held = stored(target, "model.embed_tokens").dequantize()
    weights["model.embed_tokens.weight"] = torch.from_numpy(held)
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    twin = to_gptq(changed, tmp_path / "twin", texts=chats, **SMALL)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (target, twin))
    for name in ours.keys() & theirs.keys():
        assert torch.equal(ours[name], theirs[name])
    assert "model.layers.1.mlp.down_proj.qweight" in ours.keys() & theirs.keys()


def test_a_head_is_quantized_for_what_reaches_it(chats: Path, tmp_path: Path) -> None:
    from tests.quantize.folders.test_gptq_folder import divergence

    source = tiny_model(tmp_path / "source", model_type="llama", seed=6)
    kept = (".*: keep",)
    options: dict[str, Any] = {"head_bits": 4, "group_size": 32, "overrides": kept}
    gptq = to_gptq(source, tmp_path / "gptq", texts=chats, samples=16, block_length=64, **options)
    plain = to_rounding(source, tmp_path / "plain", **options)
    assert divergence(gptq, source, chats) < 0.95 * divergence(plain, source, chats)


def test_one_table_cannot_have_two_numbers_of_bits(chats: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "source", model_type="llama", tie_word_embeddings=True)
    with pytest.raises(SettingsError, match="are one table, which cannot have 8 and 4 bits"):
        to_rounding(source, tmp_path / "x", group_size=16, head_bits=4, embedding_bits=8)
    with pytest.raises(SettingsError, match="head_bits must be 4 or 8, not 3"):
        GptqSettings(head_bits=3)
    target = to_rounding(source, tmp_path / "one", group_size=16, head_bits=8)
    assert stored(target, "model.embed_tokens").bits == 8
