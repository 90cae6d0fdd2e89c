"""Students cut from their teacher, and fresh ones."""

from __future__ import annotations

import copy
import json
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill import StudentSettings, new_student
from distill.student.pruning import copy_layers
from mistill.engine.pytorch_model import PytorchModel
from mistill.errors import (
    ArchitectureError,
    FolderError,
    MistillError,
    SettingsError,
    TargetExistsError,
    TextError,
)
from mistill.folders.folder import describe, problems
from mistill.folders.lineage import read_lineage
from mistill.pytorch.loading import load_pytorch
from mistill.text.vocabulary import load_vocabulary, same_vocabulary
from tests.tiny import tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "mistral with a sliding window": {"sliding_window": 5},
    "mistral with wide heads": {"head_dim": 24},
    "tied mistral": {"tie_word_embeddings": True},
    "llama": {"model_type": "llama"},
    "tied llama with biases": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
}
IDS = np.random.default_rng(0).integers(0, 384, (2, 17))
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def edit_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def cut_by_hand(teacher: Path, keep: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Logits of a loaded teacher whose other layers are taken out."""
    model: Any = load_pytorch(teacher)
    model.model.layers = torch.nn.ModuleList([model.model.layers[layer] for layer in keep])
    model.config.num_hidden_layers = len(keep)
    with torch.inference_mode():
        logits: np.ndarray[Any, Any] = model(torch.from_numpy(IDS), use_cache=False).logits.numpy()
    return logits


def open_with_transformers(folder: Path) -> Any:
    """The folder as any tool would open it, with nothing missing and nothing left over."""
    from transformers import AutoModelForCausalLM

    opener: Any = AutoModelForCausalLM
    model, report = opener.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


# --- some of the teacher's layers ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_is_its_teacher_without_the_other_layers(tmp_path: Path, kind: str) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=5, **KINDS[kind])

    student = new_student(teacher, tmp_path / "student", choose="named", keep=(0, 2, 3))

    model = open_with_transformers(student)
    assert model.config.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    with torch.inference_mode():
        logits = model(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_array_equal(logits, cut_by_hand(teacher, (0, 2, 3)))


def test_a_student_writes_with_its_cache_what_it_writes_without(
    teacher: Path, tmp_path: Path
) -> None:
    student = new_student(teacher, tmp_path / "student", choose="even", layers=3)
    assert read_lineage(student)[-1]["kept_layers"] == [0, 2, 3]
    model = PytorchModel(student)

    text = [7, 9, 40]
    for _ in range(10):
        text.append(int(model.logits(np.array([text]))[0, -1].argmax()))

    assert text[3:] == list(islice(model.stream([7, 9, 40]), 10))


def test_kept_weights_are_kept_to_the_bit_in_their_own_types(tmp_path: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=4)
    types = [torch.float32, torch.bfloat16, torch.float16]
    tensors = {
        name: tensor.to(types[number % 3])
        for number, (name, tensor) in enumerate(load_file(teacher / "model.safetensors").items())
    }
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})

    student = new_student(teacher, tmp_path / "student", choose="named", keep=(1, 3))

    kept = load_file(student / "model.safetensors")
    names = {name: name.replace("layers.0.", "layers.1.") for name in kept if "layers.0." in name}
    names |= {name: name.replace("layers.1.", "layers.3.") for name in kept if "layers.1." in name}
    assert len(names) == 2 * 9
    assert kept.keys() == names.keys() | {name for name in tensors if "layers" not in name}
    for name, tensor in kept.items():
        original = tensors[names.get(name, name)]
        assert tensor.dtype == original.dtype
        assert torch.equal(tensor, original), name


def test_tensors_lie_where_their_type_can_be_read(tmp_path: Path) -> None:
    # Three bytes and more before numbers of four, as a file may hold them that others wrote.
    parts = [
        ("model.layers.0.odd", "U8", b"abc"),
        ("model.layers.1.odd", "U8", b"defgh"),
        ("model.layers.1.wide", "F32", np.array([1.5, 2.5], np.float32).tobytes()),
    ]
    header, data = {}, b""
    for name, kind, content in parts:
        shape = [len(content) // (4 if kind == "F32" else 1)]
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (tmp_path / "config.json").write_text("{}")
    target = tmp_path / "target"
    target.mkdir()

    copy_layers(tmp_path, target, [1])

    kept = load_file(target / "model.safetensors")
    assert kept["model.layers.0.wide"].tolist() == [1.5, 2.5]
    assert bytes(kept["model.layers.0.odd"].tolist()) == b"defgh"
    file = (target / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(file[:8], "little")
    entry = json.loads(file[8:start])["model.layers.0.wide"]
    assert (start + entry["data_offsets"][0]) % 4 == 0


def test_the_weights_of_a_teacher_in_shards_stay_in_shards(tmp_path: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=5)
    model = open_with_transformers(teacher)
    (teacher / "model.safetensors").unlink()
    model.save_pretrained(teacher, max_shard_size="60KB")

    student = new_student(teacher, tmp_path / "student", choose="named", keep=(0, 4))

    shards = sorted(file.name for file in student.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[-1] == f"model-{len(shards):05}-of-{len(shards):05}.safetensors"
    index = json.loads((student / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    held = 0
    for shard in shards:
        with safe_open(student / shard, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        tensors = load_file(student / shard)
        assert {index["weight_map"][name] for name in tensors} == {shard}
        held += sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_size"] == held
    assert problems(student) == []
    open_with_transformers(student)
    np.testing.assert_array_equal(PytorchModel(student).logits(IDS), cut_by_hand(teacher, (0, 4)))


def test_the_layers_with_the_least_influence_go(tmp_path: Path, chats: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=5)
    tensors = load_file(teacher / "model.safetensors")
    for layer in (1, 3):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{part}.weight"].zero_()
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})

    student = new_student(
        teacher,
        tmp_path / "student",
        layers=3,
        texts=chats,
        calibration_tokens=200,
        block_length=32,
    )

    # What was taken out did nothing, so nothing is missed.
    np.testing.assert_array_equal(
        PytorchModel(student).logits(IDS), PytorchModel(teacher).logits(IDS)
    )
    entry = read_lineage(student)[-1]
    assert entry["step"] == "student"
    assert entry["kept_layers"] == [0, 2, 4]
    assert entry["influence"][1] == entry["influence"][3] == 0
    assert min(entry["influence"][layer] for layer in (0, 2, 4)) > 0.01
    assert entry["calibration_tokens"] == 200
    assert entry["texts"] == [chats.name]
    assert entry["settings"]["layers"] == 3
    assert entry["source"] == teacher.name


def test_too_little_text_is_measured_and_said(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "short.txt").write_text("The mistral is a strong, cold wind.")

    with caplog.at_level(logging.WARNING):
        student = new_student(teacher, tmp_path / "student", layers=2, texts=tmp_path / "short.txt")

    tokens = read_lineage(student)[-1]["calibration_tokens"]
    assert 5 < tokens < 40
    assert f"scores are measured on {tokens} tokens" in caplog.text


def test_the_vocabulary_is_the_teachers(teacher: Path, tmp_path: Path) -> None:
    student = new_student(teacher, tmp_path / "student", choose="even", layers=2)

    for name in COMPANIONS:
        assert (student / name).read_bytes() == (teacher / name).read_bytes()
    assert same_vocabulary(load_vocabulary(student), load_vocabulary(teacher)) == []
    assert load_vocabulary(student).end_ids == load_vocabulary(teacher).end_ids


def test_only_the_layers_change_in_the_config(tmp_path: Path) -> None:
    teacher = tiny_model(
        tmp_path / "teacher", num_hidden_layers=4, sliding_window=9, head_dim=24, seed=3
    )
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    edit_config(teacher, layer_types=kinds, _name_or_path="/somewhere/else")

    student = new_student(teacher, tmp_path / "student", choose="named", keep=(0, 1, 3))

    expected = config_of(teacher)
    expected.pop("_name_or_path")
    expected["num_hidden_layers"] = 3
    expected["layer_types"] = ["full_attention", "sliding_attention", "sliding_attention"]
    assert config_of(student) == expected


def test_a_target_that_exists_is_replaced_only_where_asked(teacher: Path, tmp_path: Path) -> None:
    target = tmp_path / "student"
    new_student(teacher, target, choose="even", layers=3)

    with pytest.raises(TargetExistsError):
        new_student(teacher, target, choose="even", layers=2)
    assert describe(target).layers == 3

    assert new_student(teacher, target, choose="even", layers=2, overwrite=True) == target
    assert describe(target).layers == 2
    assert [entry["settings"]["layers"] for entry in read_lineage(target)] == [2]


def test_layers_go_as_a_block_where_asked(tmp_path: Path, chats: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=6)
    tensors = load_file(teacher / "model.safetensors")
    for layer in (2, 3):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{part}.weight"].zero_()
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})

    student = new_student(
        teacher,
        tmp_path / "student",
        choose="angular",
        layers=4,
        texts=chats,
        calibration_tokens=200,
        block_length=32,
    )

    np.testing.assert_array_equal(
        PytorchModel(student).logits(IDS), PytorchModel(teacher).logits(IDS)
    )
    entry = read_lineage(student)[-1]
    assert entry["kept_layers"] == [0, 1, 4, 5]
    assert entry["dropped_layers"] == [2, 3]
    assert entry["angular_distance"] == pytest.approx(0, abs=1e-6)


def test_layers_go_by_their_cost_where_asked(tmp_path: Path, chats: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=5)
    tensors = load_file(teacher / "model.safetensors")
    for layer in (0, 3):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{part}.weight"].zero_()
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})

    student = new_student(
        teacher,
        tmp_path / "student",
        choose="greedy_kl",
        layers=3,
        texts=chats,
        calibration_tokens=200,
        block_length=32,
    )

    np.testing.assert_array_equal(
        PytorchModel(student).logits(IDS), PytorchModel(teacher).logits(IDS)
    )
    entry = read_lineage(student)[-1]
    assert entry["kept_layers"] == [1, 2, 4]
    assert sorted(entry["dropped_layers"]) == [0, 3]
    assert entry["kl_without_them"] == pytest.approx([0, 0], abs=1e-6)
    assert entry["calibration_tokens"] == 200
    assert entry["texts"] == [chats.name]


# --- a fresh student ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_student_has_its_own_sizes_and_the_rest_from_its_teacher(
    tmp_path: Path, kind: str
) -> None:
    teacher = tiny_model(tmp_path / "teacher", **KINDS[kind])

    student = new_student(
        teacher,
        tmp_path / "student",
        fresh=True,
        layers=3,
        hidden_size=48,
        intermediate_size=80,
        attention_heads=6,
        key_value_heads=3,
    )

    model = open_with_transformers(student)
    weights = model.model.layers[2]
    assert weights.self_attn.q_proj.weight.shape == (48, 48)
    assert weights.self_attn.k_proj.weight.shape == (24, 48)
    assert weights.mlp.up_proj.weight.shape == (80, 48)
    changed = {
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    }
    theirs, ours = config_of(teacher), config_of(student)
    assert {name for name in ours if ours[name] != theirs.get(name)} == changed
    assert theirs.keys() - ours.keys() == set()
    assert same_vocabulary(load_vocabulary(student), load_vocabulary(teacher)) == []
    for name in COMPANIONS:
        assert (student / name).read_bytes() == (teacher / name).read_bytes()
    assert read_lineage(student)[-1]["hidden_size"] == 48
    assert PytorchModel(student).logits(IDS).shape == (2, 17, 384)


def test_sizes_that_are_not_given_are_the_teachers(tmp_path: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", head_dim=24, num_hidden_layers=3)

    student = new_student(teacher, tmp_path / "student", fresh=True, intermediate_size=32)

    ours, theirs = config_of(student), config_of(teacher)
    assert {name for name in ours if ours[name] != theirs[name]} == {"intermediate_size"}


def test_a_pruned_student_has_a_random_twin(tmp_path: Path, chats: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=3)
    pruned = new_student(
        teacher,
        tmp_path / "pruned",
        layers=2,
        hidden_size=48,
        intermediate_size=80,
        key_value_heads=1,
        texts=chats,
    )

    twin = new_student(pruned, tmp_path / "twin", fresh=True)

    ours, theirs = load_file(twin / "model.safetensors"), load_file(pruned / "model.safetensors")
    assert {name: weight.shape for name, weight in ours.items()} == {
        name: weight.shape for name, weight in theirs.items()
    }
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(ours[name], theirs[name])
    differing = {
        name for name, value in config_of(twin).items() if value != config_of(pruned)[name]
    }
    assert differing <= {"dtype"}


def test_a_fresh_student_has_as_many_layers_as_fit(teacher: Path, tmp_path: Path) -> None:
    student = new_student(teacher, tmp_path / "student", fresh=True, parameters=400_000)

    assert describe(student).layers == 9
    assert describe(student).parameters == 382_144  # 49,216 and 9 layers of 36,992


def test_fresh_weights_are_random_by_their_seed_alone(teacher: Path, tmp_path: Path) -> None:
    made = []
    for number, seed in enumerate((1, 1, 2)):
        torch.rand(number)
        state = torch.get_rng_state()
        target = new_student(teacher, tmp_path / f"student{number}", fresh=True, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        made.append(load_file(target / "model.safetensors"))

    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(made[0][name], made[2][name])
    assert {tensor.dtype for tensor in made[0].values()} == {torch.float32}
    # 8,192 draws from a normal distribution: the deviation is within 4 %, five of its own
    assert made[0][name].std().item() == pytest.approx(0.02, rel=0.04)


def test_the_padding_tokens_row_is_as_random_as_the_others(teacher: Path, tmp_path: Path) -> None:
    student = new_student(teacher, tmp_path / "student", fresh=True)

    assert config_of(student)["pad_token_id"] == 2
    table = load_file(student / "model.safetensors")["model.embed_tokens.weight"]
    assert table[2].std().item() == pytest.approx(0.02, rel=0.5)


def test_a_fresh_student_of_a_quantized_teacher_is_a_float_model(
    teacher: Path, tmp_path: Path
) -> None:
    from mistill.weights.gptq_layout import GptqFormat

    quantized = tiny_model(tmp_path / "quantized")
    layout = GptqFormat(bits=4, group_size=16)
    edit_config(quantized, quantization_config=layout.to_config(), dtype="float16")

    student = new_student(quantized, tmp_path / "student", fresh=True, layers=1)

    assert describe(student).form == "model"
    assert "quantization_config" not in config_of(student)
    assert config_of(student)["dtype"] == "float32"


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, not 0"),
        (
            {"choose": "best"},
            "choose must be influence, angular, greedy_kl, healed, even or named, not 'best'",
        ),
        ({"choose": "named"}, "needs keep"),
        ({"keep": (0, 1)}, "choose asks for 'influence'"),
        ({"choose": "named", "keep": (0, 2, 2)}, "ascending order and name no layer twice"),
        ({"choose": "named", "keep": (2, 0)}, "ascending order .* not 2, 0"),
        ({"choose": "named", "keep": (-1, 0)}, "counts layers from 0"),
        ({"choose": "named", "keep": (0, 1), "layers": 3}, "names 2 layers and layers asks for 3"),
        ({"attention_heads": 2}, "give key_value_heads, and they follow"),
        ({"parameters": 0}, "parameters must be at least 1, not 0"),
        ({"megabytes_at_4_bits": 0}, "megabytes_at_4_bits must be above 0, not 0"),
        ({"megabytes_at_4_bits": float("nan")}, "must be above 0, not nan"),
        ({"layers": 2, "parameters": 9}, "layers and parameters each say how many layers"),
        (
            {"choose": "named", "keep": (0, 1), "megabytes_at_4_bits": 1.5},
            "megabytes_at_4_bits has nothing to decide",
        ),
        ({"fresh": True, "choose": "even"}, "keeps no layer of its teacher"),
        ({"fresh": True, "hidden_size": 0}, "hidden_size must be at least 1, not 0"),
        ({"fresh": True, "seed": -1}, "seed must be at least 0"),
        ({"calibration_tokens": 0}, "calibration_tokens must be at least 1"),
        ({"block_length": 1}, "block_length must be at least 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        StudentSettings(**options)


def test_settings_are_made_of_the_lists_that_a_recipe_holds() -> None:
    assert StudentSettings(choose="named", keep=[0, 2]).keep == (0, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, SettingsError, "between 1 and 3, fewer than the teacher's 4; say how many"),
        ({"layers": 4}, SettingsError, "fewer than the teacher's 4; got 4"),
        ({"layers": 2}, SettingsError, "give texts, such as @demo-train, or choose 'even'"),
        ({"layers": 2, "texts": "none.txt"}, TextError, r"none\.txt"),
        ({"layers": 2, "texts": ()}, TextError, "no text"),
        ({"layers": 2, "texts": "x.txt", "block_length": 513}, SettingsError, "context of 512"),
        ({"layers": 2, "choose": "angular"}, SettingsError, "give texts"),
        ({"layers": 2, "choose": "greedy_kl"}, SettingsError, "give texts"),
        ({"intermediate_size": 64}, SettingsError, "neurons, heads and channels .* give texts"),
        ({"intermediate_size": 129}, SettingsError, "at most the teacher's 128, .* got 129"),
        ({"hidden_size": 65}, SettingsError, "hidden_size must be at most the teacher's 64"),
        ({"key_value_heads": 3}, SettingsError, "key_value_heads must be at most the teacher's 2"),
        ({"layers": 5, "intermediate_size": 64}, SettingsError, "no more than the teacher's 4"),
        ({"intermediate_size": 128}, SettingsError, "say how many to keep"),
        (
            {"parameters": 86_207, "texts": "x.txt"},
            SettingsError,
            "parameters 86,207: one layer makes it 86,208, of which 49,216 are no layer's",
        ),
        ({"parameters": 197_184}, SettingsError, "the whole teacher .* has 197,184 parameters"),
        ({"megabytes_at_4_bits": 9.0}, SettingsError, "the whole teacher .* ask for less"),
        (
            {"fresh": True, "megabytes_at_4_bits": 0.1},
            SettingsError,
            "no student of this width fits megabytes_at_4_bits 0.1",
        ),
        (
            {"choose": "named", "keep": (0, 4)},
            SettingsError,
            "layer 4, and the teacher's last is 3",
        ),
        ({"choose": "named", "keep": (0, 1, 2, 3)}, SettingsError, "between 1 and 3"),
        ({"fresh": True, "hidden_size": 50}, SettingsError, "multiple of attention_heads; got 50"),
        ({"fresh": True, "attention_heads": 3, "hidden_size": 48}, SettingsError, "got 3 and 2"),
        ({"fresh": True, "hidden_size": 36}, SettingsError, "must be even.* 36 / 4 = 9"),
        ({"layer": 2}, SettingsError, "did you mean layers"),
    ],
)
def test_what_does_not_fit_the_teacher_is_refused_before_its_weights_are_read(
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[MistillError],
    message: str,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("weights were read")

    for name in ("scores.measure_scores", "scores.greedy_drops"):
        monkeypatch.setattr(f"distill.student.{name}", never)
    for name in ("copy_layers", "write_healed", "write_fresh"):
        monkeypatch.setattr(f"distill.student.student_folder.{name}", never)

    with pytest.raises(error, match=message) as caught:
        new_student(teacher, tmp_path / "student", **options)

    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_layers_of_a_quantized_teacher_are_refused(tmp_path: Path) -> None:
    from mistill.weights.gptq_layout import GptqFormat

    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=3)
    layout = GptqFormat(bits=4, group_size=16)
    edit_config(teacher, quantization_config=layout.to_config())

    with pytest.raises(FolderError, match=r"is a GPTQ folder, .* give the float model"):
        new_student(teacher, tmp_path / "student", choose="even", layers=2)
    assert not (tmp_path / "student").exists()


def test_a_teacher_of_another_architecture_is_refused(tmp_path: Path) -> None:
    teacher = edit_config(tiny_model(tmp_path / "teacher"), model_type="gpt_neox")

    with pytest.raises(ArchitectureError, match="gpt_neox"):
        new_student(teacher, tmp_path / "student", choose="even", layers=1)


def test_a_teacher_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=3)
    tensors = load_file(teacher / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})

    with pytest.raises(FolderError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        new_student(teacher, tmp_path / "student", choose="even", layers=2)


@pytest.mark.parametrize("options", [{"choose": "even", "layers": 2}, {"fresh": True}])
def test_a_full_disk_leaves_nothing_behind(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill.student.student_folder.copy_companions", full)

    with pytest.raises(FolderError, match="no room"):
        new_student(teacher, tmp_path / "student", **copy.deepcopy(options))
    assert list(tmp_path.iterdir()) == []
