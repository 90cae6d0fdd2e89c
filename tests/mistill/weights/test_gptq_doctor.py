from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export import to_onnx
from mistill.cli.inspection import inspect_folder
from mistill.errors import FolderError
from mistill.pytorch.loading import load_pytorch
from mistill.weights.code_words import pack_rows, unpack_rows
from mistill.weights.gptq_doctor import examine, require_sound
from mistill.weights.gptq_layout import (
    CheckpointFormat,
    GptqFormat,
    QuantizedWeight,
    ScaleType,
)
from tests.gptq_matrix import Way, matrix_folder, simple_folder

PLAIN = Way(4, True, 32, "none", "float16")
SKEWED = Way(4, False, 32, "none", "float16")
OTHER: dict[CheckpointFormat, CheckpointFormat] = {"gptq": "gptq_v2", "gptq_v2": "gptq"}


def claim(folder: Path, **facts: Any) -> Path:
    """Let config.json say something else about the codes."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= facts
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def edit(folder: Path, module: str, **tensors: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    stored = load_file(file)
    for name, tensor in tensors.items():
        if tensor is None:
            stored.pop(f"{module}.{name}")
        else:
            stored[f"{module}.{name}"] = tensor.contiguous()
    save_file(stored, file, {"format": "pt"})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_symmetric_zeros_tell_their_format(
    bits: int, stored: CheckpointFormat, tmp_path: Path
) -> None:
    way = Way(bits, True, 32, "none", "bfloat16")
    folder, _ = simple_folder(tmp_path / "m", way, stored)
    found = examine(folder)
    assert (found.checkpoint_format, found.symmetric) == (stored, True)
    assert (found.bits, found.scale_types) == ({bits: 14}, {"bfloat16": 14})
    assert (found.order, found.index, found.matrices) == ("plain", True, 14)
    assert found.contradictions == ()

    claim(folder, checkpoint_format=OTHER[stored])
    said = f"config.json says checkpoint_format {OTHER[stored]}, but the data is {stored}"
    with pytest.raises(FolderError, match=said):
        load_pytorch(folder)
    with pytest.raises(FolderError, match=said):
        to_onnx(folder, tmp_path / "onnx")
    assert said in inspect_folder(folder).problems[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_zeros_that_vary_are_told_by_their_codes(
    bits: int, stored: CheckpointFormat, tmp_path: Path
) -> None:
    way = Way(bits, False, 32, "none", "float16")
    folder, _ = simple_folder(tmp_path / "m", way, stored, intermediate_size=512)
    found = examine(folder)
    assert (found.checkpoint_format, found.symmetric) == (stored, False)
    assert found.contradictions == ()
    claim(folder, checkpoint_format=OTHER[stored])
    with pytest.raises(FolderError, match=f"but the data is {stored}: as many codes lie above"):
        require_sound(folder)


@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_8_bit_zeros_that_vary_are_told_where_there_are_enough_codes(
    stored: CheckpointFormat, tmp_path: Path
) -> None:
    way = Way(8, False, -1, "none", "float16")
    small, _ = simple_folder(tmp_path / "small", way, stored)
    assert examine(small).checkpoint_format is None
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    large, _ = simple_folder(tmp_path / "large", way, stored, num_key_value_heads=4, **sizes)
    assert examine(large).checkpoint_format == stored


@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_every_way_to_store_a_matrix_is_sound(stored: CheckpointFormat, tmp_path: Path) -> None:
    folder, weights = matrix_folder(tmp_path / "m", stored)
    found = examine(folder)
    assert found.contradictions == ()
    assert found.matrices == len(weights)
    assert found.bits == {
        bits: sum(weight.bits == bits for weight in weights.values()) for bits in (4, 8)
    }
    assert found.order == "mixed"
    assert not found.symmetric
    kinds: tuple[ScaleType, ...] = ("float16", "bfloat16", "float32")
    assert found.scale_types == {
        kind: sum(weight.scale_type == kind for weight in weights.values()) for kind in kinds
    }


def test_zeros_of_0_that_borrowed_are_counted_and_sound(tmp_path: Path) -> None:
    folder, weights = simple_folder(tmp_path / "m", SKEWED, "gptq")
    zeros = sum(int((weight.zeros == 0).sum()) for weight in weights.values())
    assert zeros > 100
    found = examine(folder)
    assert found.borrowed == zeros
    assert found.overwritten == 0
    assert "decodes their neighbours wrongly" in found.notes[0]
    assert found.contradictions == ()
    second, _ = simple_folder(tmp_path / "second", SKEWED, "gptq_v2")
    assert examine(second).borrowed == 0


def overwrite_as_autogptq_did(folder: Path, weights: dict[str, QuantizedWeight]) -> int:
    """Store zeros less one as a wrapped 32-bit number, ored into the word: AutoGPTQ before 0.5."""
    words = 0
    for module, weight in weights.items():
        less_one = weight.zeros.T.astype(np.uint32) - np.uint32(1)
        packed = np.zeros((len(less_one), less_one.shape[1] // 8), np.uint32)
        for lane in range(8):
            packed |= less_one[:, lane::8] << np.uint32(4 * lane)
        words += int((less_one.reshape(len(packed), -1, 8)[:, :, :-1] > 15).any(-1).sum())
        edit(folder, module, qzeros=torch.from_numpy(packed.view(np.int32)))
    return words


def test_zeros_that_were_overwritten_cannot_be_recovered(tmp_path: Path) -> None:
    folder, weights = simple_folder(tmp_path / "m", SKEWED, "gptq")
    words = overwrite_as_autogptq_did(folder, weights)
    found = examine(folder)
    assert found.overwritten == words
    with pytest.raises(FolderError, match=f"{words} words of zero points were overwritten"):
        load_pytorch(folder)


def test_mixed_groups_are_told_from_a_trivial_index(tmp_path: Path) -> None:
    mixed, _ = simple_folder(tmp_path / "mixed", Way(4, True, 32, "dynamic", "float16"), "gptq")
    assert examine(mixed).order == "mixed"
    claim(mixed, desc_act=False)
    with pytest.raises(FolderError, match=r"desc_act false, but g_idx mixes groups in .* 13 more"):
        require_sound(mixed)
    trivial, _ = simple_folder(tmp_path / "plain", Way(4, True, 32, "static", "float16"), "gptq")
    found = examine(trivial)
    assert found.order == "plain"
    assert found.notes == (
        "config.json says desc_act, but the groups are in order: readers may ignore g_idx",
    )


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("group", [0, 1])
def test_an_index_that_was_not_filled_in_is_named(
    group: int, ordered: bool, tmp_path: Path
) -> None:
    folder, _ = simple_folder(tmp_path / "m", PLAIN, "gptq")
    claim(folder, desc_act=not ordered)
    groups = torch.full((64,), group, dtype=torch.int32)
    edit(folder, "model.layers.0.mlp.up_proj", g_idx=groups)
    words = "g_idx leaves groups without a column in .*up_proj: it was not filled in"
    with pytest.raises(FolderError, match=words):
        require_sound(folder)
    edit(folder, "model.layers.0.mlp.up_proj", g_idx=None)
    require_sound(folder)


@pytest.mark.parametrize(
    ("way", "change", "said"),
    [
        (SKEWED, {"sym": True}, r"says sym, but the zero points vary in .* and 13 more"),
        (PLAIN, {"bits": 8}, "says 8 bits, but .* has codes of 4"),
        (PLAIN, {"bits": 3}, "says 3 bits, but .* has codes of 4"),
        (
            PLAIN,
            {"group_size": 64},
            r"group_size 64, which gives .* \(2, 64\), but they have the shape \(4,",
        ),
        (PLAIN, {"lm_head": True}, "lm_head is quantized, but"),
        (PLAIN, {"embedding": True}, "embedding is quantized, but"),
        (PLAIN, {"dynamic": {"-:.*down_proj": {}}}, "leaves .*down_proj float, but"),
        (PLAIN, {"dynamic": {"+:.*down_proj": {"bits": 8}}}, "down_proj has codes of 4"),
    ],
)
def test_what_config_json_says_of_other_codes_is_refused(
    way: Way, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder, _ = simple_folder(tmp_path / "m", way, "gptq_v2")
    require_sound(folder)
    claim(folder, **change)
    with pytest.raises(FolderError, match=said):
        require_sound(folder)
    assert inspect_folder(folder).problems


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"scales": torch.full((2, 128), float("nan"))}, "scales holds a value that is not"),
        ({"scales": torch.full((2, 128), float("inf"), dtype=torch.bfloat16)}, "not a finite"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "beyond the 2 that have scales"),
        ({"qzeros": torch.zeros((2, 15), dtype=torch.int32)}, r"qzeros should have the shape"),
        ({"qzeros": None}, "qzeros is missing"),
        ({"qweight": torch.zeros(8 * 128, dtype=torch.int32)}, "qweight should be a matrix"),
        ({"qweight": torch.zeros((8, 128), dtype=torch.int64)}, "qweight should be of type I32"),
        ({"scales": torch.zeros(2 * 128)}, "scales should be a matrix"),
        ({"scales": torch.zeros((2, 128), dtype=torch.int32)}, "should be of type float16"),
        ({"g_idx": torch.zeros((64, 2), dtype=torch.int32)}, "g_idx should be a vector"),
        ({"g_idx": torch.zeros(0, dtype=torch.int32)}, "g_idx should be a vector"),
        ({"g_idx": torch.zeros(64)}, "g_idx should be of type I32"),
    ],
)
def test_damaged_tensors_are_named(
    tensors: dict[str, torch.Tensor | None], said: str, tmp_path: Path
) -> None:
    folder, _ = simple_folder(tmp_path / "m", PLAIN, "gptq")
    edit(folder, "model.layers.0.mlp.up_proj", **tensors)
    with pytest.raises(FolderError, match=f"up_proj.*{said}"):
        require_sound(folder)


def test_a_second_config_that_says_otherwise_is_a_contradiction(tmp_path: Path) -> None:
    folder, _ = simple_folder(tmp_path / "m", PLAIN, "gptq")
    said = GptqFormat(bits=4, group_size=32).to_config()
    (folder / "quantize_config.json").write_text(json.dumps(said))
    require_sound(folder)
    (folder / "quantize_config.json").write_text(json.dumps(said | {"group_size": 128}))
    with pytest.raises(FolderError, match=r"group_size 32, but quantize_config\.json says 128"):
        require_sound(folder)


def test_both_kinds_of_zeros_in_one_folder_contradict(tmp_path: Path) -> None:
    folder, _ = simple_folder(tmp_path / "m", PLAIN, "gptq")
    other = np.full((2, 128), 8, np.uint8)
    edit(
        folder,
        "model.layers.0.mlp.up_proj",
        qzeros=torch.from_numpy(pack_rows(other, 4).view(np.int32)),
    )
    assert (unpack_rows(pack_rows(other, 4), 4) == other).all()
    with pytest.raises(
        FolderError, match="13 matrices store symmetric zero points minus one and 1 as"
    ):
        require_sound(folder)


def test_inspect_shows_what_the_codes_told(tmp_path: Path) -> None:
    from rich.console import Console

    folder, _ = simple_folder(tmp_path / "m", SKEWED, "gptq")
    found = inspect_folder(folder)
    assert found.problems == ()
    told = json.loads(json.dumps(found.to_dict()))["gptq"]
    assert told["checkpoint_format"] == "gptq"
    assert told["bits"] == {"4": 14}
    console = Console(width=200, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as shown:
        console.print(found.panel())
    assert "asymmetric, gptq: as many codes lie above" in shown.get()
    assert "float16 in 14" in shown.get()
