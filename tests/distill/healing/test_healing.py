"""Students healed in closed form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill import heal, new_student
from distill.healing import healed_folder
from distill.healing.walk import HealedLayer, Origin, heal_layers, judging_blocks
from distill.student.pruning import copy_layers
from distill.student.width import KeptWidth
from mistill.errors import FolderError, MistillError, SettingsError, VocabularyError
from mistill.folders.lineage import fingerprint, read_lineage
from mistill.pytorch.layers import LayeredModel
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import Document, TokenBlocks, joined, pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary
from tests.reference import healing as by_hand
from tests.tiny import tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "mistral with a sliding window": {"sliding_window": 5},
    "tied llama with biases": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
}
FLOAT = {"self_attn.o_proj": torch.float32, "mlp.down_proj": torch.float32}


def documents(*lengths: int, seed: int = 3) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [Document(rng.integers(5, 384, n), np.ones(n, bool)) for n in lengths]


def some_blocks(length: int = 16) -> TokenBlocks:
    """Several documents in a block, and padding behind the last."""
    blocks = pack(documents(9, 16, 5, 14, 12, 3, 16, 16, 11, 7, 13), length)
    assert blocks.tokens < blocks.ids.size
    return blocks


def healed(
    teacher: Path, student: Path, origin: Origin, blocks: TokenBlocks, **options: Any
) -> list[HealedLayer]:
    models = LayeredModel(teacher), LayeredModel(student)
    options = {"types": FLOAT, "ridges": (0.1,), **options}
    with torch.inference_mode():
        return list(heal_layers(*models, origin, blocks, **options))


def some_width() -> KeptWidth:
    """Half of a tiny teacher's neurons and heads, and most of its channels."""
    rng = np.random.default_rng(9)

    def places(count: int, total: int) -> torch.Tensor:
        return torch.from_numpy(np.sort(rng.choice(total, count, replace=False)))

    return KeptWidth(
        neurons=torch.stack([places(64, 128) for _ in range(5)]),
        groups=torch.stack([places(1, 2) for _ in range(5)]),
        channels=places(48, 64),
        head_dim=16,
        queries_per_group=2,
        hidden_size=64,
    )


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_is_that_of_a_slow_twin_with_everything_in_memory(
    tmp_path: Path, kind: str, narrow: bool
) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=5, scale=0.08, **KINDS[kind])
    width = some_width() if narrow else None
    keep, student = (0, 1, 4) if narrow else (0, 2), tmp_path / "student"
    student.mkdir()
    copy_layers(teacher, student, keep, width)
    texts = documents(40, 61, 33, 50, 64)
    channels = None if width is None else width.channels

    layers = healed(teacher, student, Origin(keep, channels), pack(texts, 64))

    twin: Any = load_pytorch_double(student)
    by_hand.heal(
        load_pytorch_double(teacher),
        twin,
        keep,
        [text.ids.tolist() for text in texts],
        0.1,
        None if channels is None else channels.tolist(),
    )
    before = load_file(student / "model.safetensors")
    for layer in layers:
        for name, weight in layer.weights.items():
            expected = twin.model.layers[layer.index].get_submodule(name).weight.float()
            moved = (expected - before[f"model.layers.{layer.index}.{name}.weight"]).abs().max()
            assert (weight - expected).abs().max() < 0.01 * moved + 1e-6
    assert any(fit["missed_before"] > 0.001 for layer in layers for fit in layer.fits.values())


def load_pytorch_double(folder: Path) -> Any:
    """A model in float64; the student's folder has no tokenizer and needs none."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def test_a_student_of_which_nothing_was_cut_is_unchanged(tmp_path: Path, chats: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=3)

    whole = heal(
        teacher,
        tmp_path / "whole",
        teacher=teacher,
        texts=chats,
        kept_layers=(0, 1, 2),
        tokens=500,
        block_length=64,
    )

    ours, theirs = load_file(whole / "model.safetensors"), load_file(teacher / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-6, rtol=0)


def test_batches_and_padding_do_not_change_the_result(tmp_path: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=4, scale=0.08)
    origin, student = Origin((0, 3)), tmp_path / "student"
    student.mkdir()
    copy_layers(teacher, student, origin.layers)
    texts = documents(12, 16, 9, 16, 14, 16, 16, 5)

    results = [
        healed(teacher, student, origin, pack(texts, length), at_once=at_once)
        for length, at_once in ((16, None), (16, 1), (16, 3), (64, 1))
    ]

    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            for name in FLOAT:
                torch.testing.assert_close(
                    ours.weights[name], theirs.weights[name], atol=2e-4, rtol=1e-3
                )


def test_healing_takes_off_most_of_what_a_cut_costs(tmp_path: Path, chats: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=6, scale=0.05)
    options: dict[str, Any] = {
        "choose": "named",
        "keep": (0, 2, 3, 5),
        "texts": chats,
        "block_length": 64,
    }
    cut = new_student(teacher, tmp_path / "cut", heal=False, **options)
    mended = new_student(teacher, tmp_path / "mended", **options)
    later = heal(cut, tmp_path / "later", teacher=teacher, texts=chats, block_length=64)

    text = pack(read_documents(chats, load_vocabulary(teacher)), 64)
    ids = torch.from_numpy(text.ids[:8])
    with torch.inference_mode():
        expected = load_pytorch(teacher)(ids).logits
        errors = [
            float((load_pytorch(folder)(ids).logits - expected).square().mean())
            for folder in (cut, mended)
        ]
    assert errors[1] < 0.8 * errors[0]
    # The two ways give the same student.
    ours, theirs = load_file(mended / "model.safetensors"), load_file(later / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    whole = load_file(cut / "model.safetensors")
    changed = {name for name in ours if not torch.equal(ours[name], whole[name])}
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)
    entry = read_lineage(mended)[-1]
    assert entry["step"] == "student"
    assert len(entry["healed"]) == 4
    assert entry["healed"][-1]["mlp.down_proj"]["missed_after"] > 0
    entry = read_lineage(later)[-1]
    assert entry["step"] == "heal"
    assert entry["teacher_fingerprint"] == fingerprint(teacher)
    assert entry["source_fingerprint"] == fingerprint(cut)


def test_matrices_keep_the_type_they_are_stored_in(tmp_path: Path, chats: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=3)
    file = teacher / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})

    student = new_student(
        teacher, tmp_path / "student", layers=2, choose="even", texts=chats, block_length=64
    )

    weights = load_file(student / "model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.bfloat16}


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
    tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=5)
    options: dict[str, Any] = {
        "layers": 4,
        "choose": "even",
        "texts": chats,
        "block_length": 64,
    }
    expected = new_student(teacher, tmp_path / "whole", **options)
    keep, done = healed_folder._keep_layer, list[int]()

    def stop_at_the_third(work: Path, layer: HealedLayer) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(layer.index)
        keep(work, layer)

    monkeypatch.setattr(healed_folder, "_keep_layer", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        new_student(teacher, tmp_path / "student", **options)
    assert not (tmp_path / "student").exists()
    with pytest.raises(SettingsError, match="heal_tokens"):
        new_student(teacher, tmp_path / "student", heal_tokens=100, **options)

    def go_on(work: Path, layer: HealedLayer) -> None:
        done.append(layer.index)
        keep(work, layer)

    monkeypatch.setattr(healed_folder, "_keep_layer", go_on)
    student = new_student(teacher, tmp_path / "student", **options)

    assert done == [0, 1, 2, 3]
    for name in ("model.safetensors", "config.json"):
        assert (student / name).read_bytes() == (expected / name).read_bytes()
    assert not list(tmp_path.glob(".student*"))


def test_a_damaged_layer_of_a_killed_run_is_healed_again(tmp_path: Path) -> None:
    layer = HealedLayer(1, {"mlp.down_proj": torch.ones(2, 2)}, {"mlp.down_proj": {"ridge": 1.0}})
    healed_folder._keep_layer(tmp_path, layer)
    assert healed_folder._read_layer(tmp_path, 1) is not None
    file = healed_folder._file(tmp_path, 1)
    file.write_bytes(file.read_bytes()[:-5])
    assert healed_folder._read_layer(tmp_path, 1) is None
    assert healed_folder._read_layer(tmp_path, 2) is None


@pytest.mark.parametrize("blocks", [0, 1, 2, 7, 8, 96])
def test_an_eighth_of_the_blocks_judges(blocks: int) -> None:
    assert int(judging_blocks(blocks).sum()) == {0: 0, 1: 0, 2: 1, 7: 1, 8: 1, 96: 12}[blocks]


def test_texts_take_turns_so_that_any_run_of_blocks_holds_them_all() -> None:
    parts = [pack(documents(*[8] * count, seed=count), 8) for count in (6, 3)]

    blocks = joined(parts)

    owner = ["a" if row in parts[0].ids.tolist() else "b" for row in blocks.ids.tolist()]
    assert "".join(owner) == "abaabaaba" or owner.count("a") == 6
    assert "bb" not in "".join(owner)
    assert sorted(set(blocks.documents.ravel().tolist())) == list(range(9))
    assert blocks.tokens == sum(part.tokens for part in parts)


def refusals(tmp_path: Path, teacher: Path, student: Path) -> dict[str, tuple[Any, ...]]:
    other = tiny_model(tmp_path / "wider", num_hidden_layers=3, hidden_size=32)
    shutil.copytree(student, tmp_path / "no lineage")
    (tmp_path / "no lineage" / "lineage.json").unlink()
    broken = shutil.copytree(teacher, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    words = shutil.copytree(teacher, tmp_path / "other words")
    tokenizer = json.loads((words / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (words / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    return {
        "a teacher of another width": (student, other, {}, SettingsError, "channels"),
        "no lineage": (tmp_path / "no lineage", teacher, {}, SettingsError, "kept_layers"),
        "layers that the teacher has not": (
            student,
            teacher,
            {"kept_layers": (0, 7)},
            SettingsError,
            "3 layers",
        ),
        "weights that are not numbers": (student, broken, {}, FolderError, "not a number"),
        "other words": (student, words, {}, VocabularyError, "different vocabularies"),
        "blocks that are too long": (
            student,
            teacher,
            {"block_length": 1024},
            SettingsError,
            "context of 512",
        ),
        "no ridge": (student, teacher, {"ridge": 0.0}, SettingsError, "ridge"),
    }


def test_what_cannot_be_healed_is_refused_in_one_line(tmp_path: Path, chats: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=3)
    student = new_student(teacher, tmp_path / "student", layers=2, choose="even", heal=False)
    for case, (small, large, options, error, words) in refusals(tmp_path, teacher, student).items():
        with pytest.raises(MistillError, match=words) as raised:
            heal(
                small,
                tmp_path / "target",
                teacher=large,
                texts=chats,
                **{"tokens": 200, "block_length": 64, **options},
            )
        assert isinstance(raised.value, error), case
        assert "\n" not in str(raised.value), case
        assert not (tmp_path / "target").exists(), case


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heal": True}, "healed on text"),
        ({"fresh": True, "choose": "influence", "heal": True}, "nothing of its teacher"),
        ({"heal_tokens": 0}, "heal_tokens"),
    ],
)
def test_a_student_that_cannot_be_healed_is_refused(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    teacher = tiny_model(tmp_path / "teacher", num_hidden_layers=3)
    with pytest.raises(SettingsError, match=words):
        new_student(teacher, tmp_path / "student", **{"layers": 2, "choose": "even", **options})
