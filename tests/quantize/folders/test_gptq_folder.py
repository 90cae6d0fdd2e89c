from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mistill.errors import (
    ArchitectureError,
    FolderError,
    SettingsError,
    TargetExistsError,
    TextError,
)
from mistill.folders.folder import QUANTIZE_REPORT_FILE, describe, open_folder, read_json
from mistill.folders.lineage import read_lineage
from mistill.pytorch.loading import load_pytorch
from mistill.text.vocabulary import load_vocabulary
from mistill.weights.gptq_layout import QuantizedWeight, read_quantization, unpack
from mistill.weights.tensor_writer import TensorWriter
from quantize import GptqSettings, RoundingSettings, to_gptq, to_nf4, to_rounding
from quantize.calibration_text import draw_blocks, equal_shares
from quantize.gptq.rounding import round_weight
from tests.tiny import tiny_model

SMALL: dict[str, Any] = {"group_size": 16, "samples": 6, "block_length": 64}


def stored(folder: Path, module: str) -> QuantizedWeight:
    layout = read_quantization(read_json(folder / "config.json"))
    assert layout is not None
    tensors = load_file(folder / "model.safetensors")
    parts = {
        name.rpartition(".")[2]: tensor.numpy()
        for name, tensor in tensors.items()
        if name.startswith(f"{module}.")
    }
    return unpack(parts, layout.bits, layout.group_size, layout.checkpoint_format)


def divergence(folder: Path, reference: Path, chats: Path) -> float:
    """Mean KL(reference || folder) over some tokens that neither was calibrated on."""
    ids = torch.tensor([load_vocabulary(reference).encode(chats.read_text("utf-8"))[-400:]])
    with torch.no_grad():
        logs = [torch.log_softmax(load_pytorch(f)(ids).logits, -1) for f in (reference, folder)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a few large channels, as trained models have them, and a tied head."""
    folder = tiny_model(
        tmp_path_factory.mktemp("outliers") / "model",
        model_type="llama",
        seed=3,
        tie_word_embeddings=True,
    )
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("layernorm.weight"):
            weight[::11] *= 6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_keeps_more_of_the_model_than_rounding_at_equal_bytes(
    bits: int, symmetric: bool, outliers: Path, chats: Path, tmp_path: Path
) -> None:
    grid: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "group_size": 32}
    gptq = to_gptq(outliers, tmp_path / "gptq", texts=chats, samples=16, block_length=64, **grid)
    plain = to_rounding(outliers, tmp_path / "plain", **grid)
    # 8 bits lose so little that one tiny model's luck decides how much of it is won back.
    share = 0.9 if bits == 4 else 1.0
    assert divergence(gptq, outliers, chats) < share * divergence(plain, outliers, chats)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (gptq, plain)]
    assert sizes[0] == sizes[1]


def test_a_gptq_folder_says_what_it_is_and_how_it_was_made(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    target = to_gptq(model, tmp_path / "small", texts=chats, bits=4, **SMALL)
    assert target == tmp_path / "small"
    info = open_folder(target)
    assert info.form == "gptq"
    assert info.parameters == describe(model).parameters
    quantization = read_json(target / "config.json")["quantization_config"]
    assert quantization["quant_method"] == "gptq"
    assert quantization["checkpoint_format"] == "gptq"
    assert (quantization["bits"], quantization["group_size"]) == (4, 16)
    assert (quantization["sym"], quantization["desc_act"]) == (True, False)
    step = read_lineage(target)[-1]
    assert step["step"] == "gptq"
    assert step["settings"]["group_size"] == 16
    assert step["texts"] == [chats.name]
    assert step["calibration"]["blocks"] == 6
    assert 300 < step["calibration"]["tokens"] <= 384
    assert "model.embed_tokens.weight" in step["kept_float"]
    assert "lm_head.weight" in step["kept_float"]
    assert "model.layers.*.input_layernorm.weight" in step["kept_float"]
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (target / name).read_bytes() == (model / name).read_bytes()


def test_text_in_memory_is_named_in_the_lineage_and_not_written_into_it(
    model: Path, tmp_path: Path
) -> None:
    texts = ["The mill grinds what the wind brings. " * 40, "A secret of its owner. " * 40]
    target = to_gptq(model, tmp_path / "quantized", texts=texts, held_out=texts, **SMALL)
    step = read_lineage(target)[-1]
    assert [text.partition(" (")[0] for text in step["texts"]] == ["2 rows in memory"]
    measured = read_json(target / QUANTIZE_REPORT_FILE)["measured"]
    assert measured["held_out"] == step["texts"]


def test_the_report_names_every_matrix_and_everything_that_stayed(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    target = to_gptq(model, tmp_path / "small", texts=chats, **SMALL)
    report = read_json(target / QUANTIZE_REPORT_FILE)
    assert len(report["modules"]) == 2 * 7
    for module in report["modules"]:
        assert 0 < module["loss"] < 1
        assert module["damping"] == 0.01
        assert module["dead_columns"] == 0
        assert module["seconds"] >= 0
    stayed = set(report["kept"])
    tensors = load_file(target / "model.safetensors")
    before = load_file(model / "model.safetensors")
    quantized = {f"{module['name']}.weight" for module in report["modules"]}
    assert stayed | quantized == before.keys()
    for name in stayed:
        assert torch.equal(tensors[name], before[name])


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_stores_the_codes_of_every_matrix(
    symmetric: bool, model: Path, tmp_path: Path
) -> None:
    settings = RoundingSettings(bits=8, group_size=32, symmetric=symmetric)
    target = to_rounding(model, tmp_path / "plain", settings=settings)
    weights = load_file(model / "model.safetensors")
    plain = load_pytorch(target)
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        expected = round_weight(weights[f"{module}.weight"], settings)
        found = stored(target, module)
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.zeros, expected.zeros)
        np.testing.assert_array_equal(found.scales, expected.scales)
        assert found.symmetric == symmetric
        loaded = plain.get_parameter(f"{module}.weight").detach().numpy()
        np.testing.assert_array_equal(loaded, expected.dequantize())
    assert (read_json(target / "config.json")["quantization_config"]["checkpoint_format"]) == (
        "gptq" if symmetric else "gptq_v2"
    )


def test_a_last_layer_that_reads_garbage_shows_in_no_other(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    # What a layer is given does not depend on the layers after it.
    whole = to_gptq(model, tmp_path / "whole", texts=chats, **SMALL)
    changed = tmp_path / "changed"
    shutil.copytree(model, changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 3
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    other = to_gptq(changed, tmp_path / "other", texts=chats, **SMALL)
    first, second = (load_file(f / "model.safetensors") for f in (whole, other))
    different = {name for name in first if not torch.equal(first[name], second[name])}
    assert different == {"model.layers.1.mlp.down_proj.scales"} | (
        {"model.layers.1.mlp.down_proj.qweight"} & different
    )


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    made = [
        to_gptq(model, tmp_path / name, texts=chats, seed=seed, **SMALL)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    a, b, c = ((folder / "model.safetensors").read_bytes() for folder in made)
    assert a == b
    assert a != c


def test_blocks_are_drawn_from_the_text_without_repetition(model: Path, chats: Path) -> None:
    settings = GptqSettings(group_size=16, samples=5, block_length=32, seed=3)
    blocks = draw_blocks(chats, model, settings)
    assert blocks.ids.shape == (5, 32)
    assert len({row.tobytes() for row in blocks.ids}) == 5


def test_less_text_than_asked_for_is_used_whole_and_said(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "short.txt").write_text("A cold wind blows from the north, and it is strong.")
    settings = GptqSettings(group_size=16, samples=50, block_length=16)
    with caplog.at_level(logging.WARNING):
        blocks = draw_blocks(tmp_path / "short.txt", model, settings)
    assert 0 < len(blocks) < 50
    assert f"only {len(blocks)} of the 50 blocks" in caplog.text


def test_several_texts_give_as_many_blocks_each_as_far_as_they_go(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("A cold wind blows from the north, and it is strong.")
    long.write_text("The sea is wide and the hills are green. " * 200)
    settings = GptqSettings(group_size=16, samples=20, block_length=16)
    texts = [chats, short, long]
    blocks = draw_blocks(texts, model, settings)
    pools = [draw_blocks(text, model, replace(settings, samples=200)) for text in texts]
    whole = [{row.tobytes() for row in pool.ids} for pool in pools]
    counts = [sum(row.tobytes() in rows for row in blocks.ids) for rows in whole]
    few = len(pools[1])
    assert few < 6
    assert counts == [(20 - few) // 2, few, 20 - few - (20 - few) // 2]


@pytest.mark.parametrize(
    ("total", "sizes", "shares"),
    [
        (6, [9, 9, 9], [2, 2, 2]),
        (7, [9, 9], [4, 3]),
        (10, [1, 20, 3], [1, 6, 3]),
        (50, [4, 5], [4, 5]),
        (1, [3, 3], [1, 0]),
    ],
)
def test_shares_are_as_equal_as_the_supplies_allow(
    total: int, sizes: list[int], shares: list[int]
) -> None:
    assert equal_shares(total, sizes) == shares


def test_a_tied_head_is_stored_once(outliers: Path, chats: Path, tmp_path: Path) -> None:
    target = to_gptq(outliers, tmp_path / "small", texts=chats, **SMALL)
    assert "lm_head.weight" not in load_file(target / "model.safetensors")
    assert "lm_head.weight" not in read_json(target / QUANTIZE_REPORT_FILE)["kept"]


def test_biases_stay_as_they_are(chats: Path, tmp_path: Path) -> None:
    source = tiny_model(
        tmp_path / "biased", model_type="llama", seed=4, attention_bias=True, mlp_bias=True
    )
    target = to_gptq(source, tmp_path / "small", texts=chats, **SMALL)
    before, after = (load_file(f / "model.safetensors") for f in (source, target))
    name = "model.layers.1.mlp.down_proj.bias"
    assert before[name].count_nonzero() > 0
    assert torch.equal(before[name], after[name])
    assert divergence(target, source, chats) < 1


def test_half_precision_models_are_quantized_from_their_own_values(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    source = tmp_path / "half"
    shutil.copytree(model, source)
    halves = {n: t.bfloat16() for n, t in load_file(source / "model.safetensors").items()}
    save_file(halves, source / "model.safetensors", metadata={"format": "pt"})
    target = to_gptq(source, tmp_path / "small", texts=chats, **SMALL)
    tensors = load_file(target / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16
    plain = to_rounding(source, tmp_path / "plain", group_size=16)
    expected = round_weight(
        halves["model.layers.0.mlp.up_proj.weight"].float(), RoundingSettings(group_size=16)
    )
    found = stored(plain, "model.layers.0.mlp.up_proj")
    np.testing.assert_array_equal(found.codes, expected.codes)


def test_large_models_are_written_in_several_files(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((100,), float(number)) for number in range(5)}
    with TensorWriter(tmp_path, shard_bytes=900) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 2000
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


# --- what is refused ----------------------------------------------------------------------------


def test_a_group_size_that_does_not_divide_names_the_layers_and_one_that_does(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    for refused in (
        lambda: to_gptq(model, tmp_path / "x", texts=chats, group_size=128),
        lambda: to_rounding(model, tmp_path / "x", group_size=128),
    ):
        with pytest.raises(
            SettingsError, match=r"128 does not divide the 64 inputs of q_proj.*take 64, or -1"
        ):
            refused()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 5}, "bits must be 2, 3, 4 or 8, not 5"),
        ({"bits": 16}, "bits must be 2, 3, 4 or 8, not 16"),
        ({"group_size": 0}, "group_size must be 1 or more"),
        ({"group_size": -2}, "group_size must be 1 or more"),
        ({"damp_percent": 0.0}, "damp_percent"),
        ({"damp_percent": 1.0}, "damp_percent"),
        ({"order": "act"}, "order must be static, dynamic, group or none, not 'act'"),
        ({"scale_search": 0}, "scale_search"),
        ({"samples": 0}, "samples"),
        ({"block_length": 1}, "block_length"),
        ({"block_length": 4096, "group_size": 16}, "exceeds the model's 512 positions"),
        ({"seed": -1}, "seed"),
        ({"bit": 4}, "no option bit; did you mean bits"),
    ],
)
def test_settings_out_of_range_are_refused(
    options: dict[str, Any], said: str, model: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=said):
        to_gptq(model, tmp_path / "x", texts=chats, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_source_is_refused_and_its_parent_named(model: Path, tmp_path: Path) -> None:
    once = to_rounding(model, tmp_path / "once", group_size=16)
    with pytest.raises(FolderError, match=f"is gptq already.*, {model.name}$"):
        to_rounding(once, tmp_path / "twice", group_size=16)
    with pytest.raises(FolderError, match="is gptq already"):
        to_nf4(once, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_an_unknown_architecture_is_refused(model: Path, chats: Path, tmp_path: Path) -> None:
    source = tmp_path / "gemma"
    shutil.copytree(model, source)
    config = read_json(source / "config.json")
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    with pytest.raises(ArchitectureError, match="'gemma'"):
        to_gptq(source, tmp_path / "x", texts=chats, group_size=16)


@pytest.mark.parametrize("texts", ["missing.txt", "empty.txt", []])
def test_missing_and_empty_texts_are_refused_before_any_weight_is_read(
    texts: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.txt").write_text("")
    monkeypatch.setattr("quantize.folders.gptq_folder.LayeredModel", None)
    given = str(tmp_path / texts) if isinstance(texts, str) else texts
    with pytest.raises(TextError):
        to_gptq(model, tmp_path / "x", texts=given, group_size=16)
    assert not (tmp_path / "x").exists()


def test_an_existing_target_is_kept_unless_it_may_be_overwritten(
    model: Path, tmp_path: Path
) -> None:
    target = tmp_path / "small"
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(TargetExistsError):
        to_rounding(model, target, group_size=16)
    with pytest.raises(FolderError, match="it is not replaced"):
        to_rounding(model, target, group_size=16, overwrite=True)
    assert (target / "mine").read_text() == "mine"
    to_rounding(model, tmp_path / "ours", bits=8, group_size=16)
    with pytest.raises(TargetExistsError):
        to_rounding(model, tmp_path / "ours", group_size=16)
    to_rounding(model, tmp_path / "ours", group_size=16, overwrite=True)
    config = read_json(tmp_path / "ours" / "config.json")
    assert config["quantization_config"]["bits"] == 4


def test_rounding_that_fails_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistill.weights.tensor_writer.TensorWriter._flush", no_room)
    with pytest.raises(FolderError, match="no room"):
        to_rounding(model, tmp_path / "small", group_size=16)
    assert list(tmp_path.iterdir()) == []


def no_room(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_model_that_computes_no_numbers_is_refused_with_the_place(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    source = tmp_path / "diverged"
    shutil.copytree(model, source)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][5] = float("inf")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FolderError, match=r"layers\.1\.input_layernorm\.weight holds a value"):
        to_gptq(source, tmp_path / "x", texts=chats, **SMALL)
    assert not (tmp_path / "x").exists()


def test_files_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    """Byte for byte, whatever the types and the order in which tensors come."""
    from safetensors.torch import save_file

    whole = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    types = (*whole, torch.float16, torch.bfloat16, torch.float32, torch.float64)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{dtype}": torch.randint(0, 2, (3, 5 + place), generator=generator).to(dtype)
        for place, dtype in enumerate(types)
        for name in ("zebra", "caf\u00e9")
    }
    tensors["scalar"] = torch.tensor(1.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["turned"] = torch.arange(12.0).reshape(3, 4).T
    with TensorWriter(tmp_path) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(kept, tmp_path / "theirs", metadata={"format": "pt"})
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["model.safetensors", "theirs"]
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
