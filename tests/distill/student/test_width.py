"""Students that are narrower than their teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill import new_student
from distill.student.width import WidthScores, keep_strongest, strongest
from mistill.engine.pytorch_model import PytorchModel
from mistill.errors import FolderError, SettingsError
from mistill.folders.folder import describe
from mistill.folders.lineage import read_lineage
from tests.tiny import tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "mistral with a sliding window": {"sliding_window": 5},
    "mistral with wide heads": {"head_dim": 24},
    "tied llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
}
IDS = np.random.default_rng(0).integers(0, 384, (2, 17))
MEASURE: dict[str, Any] = {"calibration_tokens": 160, "block_length": 32, "heal": False}


def change(folder: Path, edit: Any) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def open_with_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    opener: Any = AutoModelForCausalLM
    model, report = opener.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def logits_of(folder: Path) -> np.ndarray[Any, Any]:
    model = open_with_transformers(folder).float()
    with torch.inference_mode():
        logits: np.ndarray[Any, Any] = model(torch.from_numpy(IDS)).logits.numpy()
    return logits


# --- what is cut away ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_silent_neurons_are_not_missed(tmp_path: Path, chats: Path, kind: str) -> None:
    teacher = tiny_model(tmp_path / "teacher", **KINDS[kind])
    silent = {0: torch.arange(0, 128, 4), 1: torch.arange(1, 128, 4)}

    def edit(tensors: dict[str, Any]) -> None:
        for layer, places in silent.items():
            for last in ("weight", "bias"):  # up = 0, so that gate * up is
                name = f"model.layers.{layer}.mlp.up_proj.{last}"
                if name in tensors:
                    tensors[name][places] = 0

    change(teacher, edit)

    student = new_student(
        teacher, tmp_path / "student", intermediate_size=96, texts=chats, **MEASURE
    )

    assert config_of(student)["intermediate_size"] == 96
    weight = load_file(student / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    kept = [place for place in range(128) if place % 4 != 1]
    original = load_file(teacher / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(weight, original[:, kept])
    # The sums have fewer terms, in another order.
    np.testing.assert_allclose(logits_of(student), logits_of(teacher), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_silent_groups_are_not_missed(tmp_path: Path, chats: Path, kind: str) -> None:
    options = {"num_attention_heads": 8, "num_key_value_heads": 4, **KINDS[kind]}
    teacher = tiny_model(tmp_path / "teacher", **options)
    size = config_of(teacher)["head_dim"]

    def edit(tensors: dict[str, Any]) -> None:
        for layer, group in ((0, 1), (0, 2), (1, 0), (1, 2)):
            for last in ("weight", "bias"):
                name = f"model.layers.{layer}.self_attn.v_proj.{last}"
                if name in tensors:
                    tensors[name][group * size : (group + 1) * size] = 0

    change(teacher, edit)

    student = new_student(teacher, tmp_path / "student", key_value_heads=2, texts=chats, **MEASURE)

    changed = config_of(student)
    assert (changed["num_key_value_heads"], changed["num_attention_heads"]) == (2, 4)
    assert changed["head_dim"] == size
    np.testing.assert_allclose(logits_of(student), logits_of(teacher), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_silent_channels_are_not_missed(tmp_path: Path, chats: Path, kind: str) -> None:
    teacher = tiny_model(tmp_path / "teacher", rms_norm_eps=1e-3, **KINDS[kind])
    silent = torch.arange(3, 64, 4)

    def edit(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            module = name.rsplit(".", 1)[0].rsplit(".", 1)[-1]
            if module == "embed_tokens":
                tensor[:, silent] = 0
            elif module in ("o_proj", "down_proj"):
                tensor[silent] = 0

    change(teacher, edit)

    student = new_student(teacher, tmp_path / "student", hidden_size=48, texts=chats, **MEASURE)

    changed = config_of(student)
    assert (changed["hidden_size"], changed["head_dim"]) == (48, config_of(teacher)["head_dim"])
    assert changed["rms_norm_eps"] == pytest.approx(1e-3 * 64 / 48)
    table = load_file(student / "model.safetensors")["model.embed_tokens.weight"]
    kept = [place for place in range(64) if place % 4 != 3]
    original = load_file(teacher / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(table, original[:, kept])
    # float32: sums of fewer terms, and norms rescaled by a factor near sqrt(64 / 48)
    np.testing.assert_allclose(logits_of(student), logits_of(teacher), atol=1e-4)


def test_the_width_of_a_head_is_written_out(tmp_path: Path, chats: Path) -> None:
    # As in the config of Mistral 7B v0.1, which leaves it to be hidden_size / heads.
    teacher = tiny_model(tmp_path / "teacher")
    config = config_of(teacher)
    assert config.pop("head_dim") == 16
    (teacher / "config.json").write_text(json.dumps(config))

    student = new_student(teacher, tmp_path / "student", hidden_size=48, texts=chats, **MEASURE)

    assert config_of(student)["head_dim"] == 16
    assert open_with_transformers(student).model.layers[0].self_attn.q_proj.weight.shape == (64, 48)


def test_norms_make_up_for_the_channels_that_go(tmp_path: Path, chats: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher")

    student = new_student(teacher, tmp_path / "student", hidden_size=48, texts=chats, **MEASURE)

    ours = load_file(student / "model.safetensors")
    theirs = load_file(teacher / "model.safetensors")
    table = theirs["model.embed_tokens.weight"]
    kept = [
        int((table == column[:, None]).all(dim=0).nonzero()[0, 0])
        for column in ours["model.embed_tokens.weight"].T
    ]
    assert len(kept) == 48
    assert kept == sorted(set(kept))
    norms = [name for name in theirs if "norm" in name]
    assert len(norms) == 5
    for name in norms:
        np.testing.assert_allclose(
            (ours[name] / theirs[name][kept]).numpy(), (64 / 48) ** 0.5, rtol=1e-6
        )


# --- what is kept -------------------------------------------------------------------------------


def test_where_all_is_kept_nothing_is_cut() -> None:
    scores = WidthScores(torch.rand(2, 8), torch.rand(2, 2), torch.rand(16))
    config = {"num_attention_heads": 4, "hidden_size": 16}

    kept = keep_strongest(scores, config, intermediate_size=8, key_value_heads=2, hidden_size=16)

    assert (kept.neurons, kept.groups, kept.channels) == (None, None, None)


def test_a_student_with_all_of_the_width_but_one_neuron_is_nearly_its_teacher(
    tmp_path: Path, chats: Path
) -> None:
    teacher = tiny_model(tmp_path / "teacher")

    def edit(tensors: dict[str, Any]) -> None:
        for layer in range(2):
            tensors[f"model.layers.{layer}.mlp.gate_proj.weight"][77] = 0

    change(teacher, edit)
    student = new_student(
        teacher, tmp_path / "student", intermediate_size=127, texts=chats, **MEASURE
    )

    ours, theirs = (
        load_file(student / "model.safetensors"),
        load_file(teacher / "model.safetensors"),
    )
    for name, tensor in theirs.items():
        if "mlp" not in name:
            assert torch.equal(ours[name], tensor), name
    np.testing.assert_allclose(logits_of(student), logits_of(teacher), atol=2e-5)


def test_the_parts_with_the_largest_scores_stay_in_their_order() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9], [0.4, 0.4, 0.4, 0.4]])

    assert strongest(scores, 2).tolist() == [[1, 3], [0, 1]]
    assert strongest(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2]]


def test_depth_and_width_go_together(tmp_path: Path, chats: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=4)

    both = new_student(
        teacher,
        tmp_path / "both",
        choose="named",
        keep=(0, 2, 3),
        hidden_size=48,
        intermediate_size=80,
        key_value_heads=1,
        texts=chats,
        **MEASURE,
    )
    narrow = new_student(
        teacher,
        tmp_path / "narrow",
        hidden_size=48,
        intermediate_size=80,
        key_value_heads=1,
        texts=chats,
        **MEASURE,
    )
    # Cutting the width first and the depth then leaves the same student.
    later = new_student(narrow, tmp_path / "later", choose="named", keep=(0, 2, 3))

    ours, theirs = load_file(both / "model.safetensors"), load_file(later / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert config_of(both) == config_of(later)
    assert describe(narrow).layers == 4
    entry = read_lineage(both)[-1]
    assert entry["kept_layers"] == [0, 2, 3]
    assert (entry["hidden_size"], entry["num_attention_heads"]) == (48, 2)
    assert entry["parameters"] == describe(both).parameters
    ids = PytorchModel(both).logits(IDS)
    assert np.isfinite(ids).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kept_width_keeps_its_type_and_its_shards(
    tmp_path: Path, chats: Path, dtype: torch.dtype
) -> None:
    teacher = tiny_model(tmp_path / "teacher")
    model = open_with_transformers(teacher).to(dtype)
    (teacher / "model.safetensors").unlink()
    model.save_pretrained(teacher, max_shard_size="60KB")

    student = new_student(
        teacher,
        tmp_path / "student",
        intermediate_size=64,
        key_value_heads=1,
        hidden_size=48,
        texts=chats,
        **MEASURE,
    )

    shards = sorted(student.glob("*.safetensors"))
    assert len(shards) > 2
    tensors = [tensor for shard in shards for tensor in load_file(shard).values()]
    assert {tensor.dtype for tensor in tensors} == {dtype}
    index = json.loads((student / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
    assert open_with_transformers(student).config.intermediate_size == 64


# --- refusals -----------------------------------------------------------------------------------


def test_a_llama_that_transformers_would_not_load_is_refused(tmp_path: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", model_type="llama")

    with pytest.raises(SettingsError, match=r"multiple of its 4 attention heads.* near which 48"):
        new_student(teacher, tmp_path / "student", hidden_size=50, texts="none.txt")


def test_weights_of_a_type_that_is_not_cut_are_named(tmp_path: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher")

    def edit(tensors: dict[str, Any]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    change(teacher, edit)

    with pytest.raises(FolderError, match=r"mlp\.up_proj\.weight as F8_E4M3"):
        new_student(teacher, tmp_path / "student", hidden_size=48, texts="none.txt")
