"""Which layers can go, by what healing leaves of their absence."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill import new_student
from distill.student import healed_choice, scores
from distill.student.healed_choice import RIDGE, healed_choices
from mistill.errors import FolderError, TextError
from mistill.folders.lineage import read_lineage
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import Document, TokenBlocks, pack
from tests.reference import healed_layers
from tests.tiny import changed_tensors, tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "mistral with a sliding window": {"sliding_window": 5},
    "tied llama with biases": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
}


def documents(count: int, length: int = 16, seed: int = 3) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [Document(rng.integers(5, 384, length), np.ones(length, bool)) for _ in range(count)]


def some_blocks(count: int = 8) -> TokenBlocks:
    return pack(documents(count), 16)


def uneven_gains(tensors: dict[str, torch.Tensor]) -> None:
    """Norms that let some channels through and others hardly at all."""
    generator = torch.Generator().manual_seed(4)
    for name, tensor in tensors.items():
        if name.endswith("input_layernorm.weight"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator).mul(1.5).exp())


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_that_stay_are_those_of_the_search_written_out(tmp_path: Path, kind: str):
    folder = tiny_model(tmp_path / "model", num_hidden_layers=5, scale=0.15, **KINDS[kind])
    changed_tensors(folder, folder, uneven_gains)
    texts = [document.ids.tolist() for document in documents(8)]
    judged = [texts[place] for place in (3, 7)]
    fitted = [text for text in texts if text not in judged]

    choices = healed_choices(folder, some_blocks(), 2)

    model = load_pytorch(folder).double()
    expected = healed_layers.healed_choices(model, fitted, judged, 2, RIDGE)
    assert [choice.keep for choice in choices] == [keep for keep, _ in expected]
    # float32 products and factors against float64 ones; nothing gone leaves nothing but rounding.
    assert choices[0].kl == pytest.approx(0, abs=1e-6)
    assert [choice.kl for choice in choices[1:]] == pytest.approx(
        [kl for _, kl in expected[1:]], rel=2e-4
    )
    assert expected[1][1] > 0.01


def test_of_two_layers_that_do_nothing_both_go(tmp_path: Path):
    folder = tiny_model(tmp_path / "model", num_hidden_layers=6, scale=0.08)

    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (2, 4):
            for part in ("self_attn.o_proj", "mlp.down_proj"):
                tensors[f"model.layers.{layer}.{part}.weight"].zero_()

    changed_tensors(folder, folder, silence)
    keeps = [choice.keep for choice in healed_choices(folder, some_blocks(), 2)]
    assert keeps[0] == (0, 1, 2, 3, 4, 5)
    assert keeps[1] in ((0, 1, 3, 4, 5), (0, 1, 2, 3, 5))
    assert keeps[2] == (0, 1, 3, 5)


def test_a_choice_does_not_depend_on_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tiny_model(tmp_path / "model", num_hidden_layers=4, scale=0.08)
    whole = healed_choices(folder, some_blocks(), 1)
    monkeypatch.setattr("mistill.pytorch.layers.TOKENS_AT_ONCE", 32)
    parts = healed_choices(folder, some_blocks(), 1)
    assert [choice.keep for choice in parts] == [choice.keep for choice in whole]
    assert [choice.kl for choice in parts] == pytest.approx(
        [choice.kl for choice in whole], rel=1e-4, abs=1e-6
    )


def test_padding_changes_nothing(tmp_path: Path):
    folder = tiny_model(tmp_path / "model", num_hidden_layers=4, scale=0.08)
    texts = [*documents(4), *documents(3, 13, seed=5), *documents(1, 16, seed=6)]
    found = healed_choices(folder, pack(texts, 16), 1)
    blocks = pack(texts, 16)
    blocks.ids[blocks.documents < 0] = 9
    again = healed_choices(folder, blocks, 1)
    assert again == found


def test_a_student_is_made_of_the_layers_chosen_and_the_choice_is_remembered(
    tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tiny_model(tmp_path / "model", num_hidden_layers=5, scale=0.08)
    options: dict[str, Any] = {"texts": chats, "choose": "healed", "block_length": 32}
    student = new_student(folder, tmp_path / "two", layers=3, **options)
    entry = read_lineage(student)[-1]
    assert entry["kept_layers"][0] == 0
    assert len(entry["kept_layers"]) == 3
    assert sorted([*entry["kept_layers"], *entry["dropped_layers"]]) == [0, 1, 2, 3, 4]
    assert entry["kl_when_healed"] > 0
    assert entry["scores_reused"] is False
    assert tuple(entry["kept_layers"]) in list(combinations(range(5), 3))

    def again(*_: Any) -> None:
        raise AssertionError("the search for two layers holds the answer for one")

    monkeypatch.setattr(scores, "healed_choices", again)
    entry = read_lineage(new_student(folder, tmp_path / "one", layers=4, **options))[-1]
    assert entry["scores_reused"] is True
    assert len(entry["kept_layers"]) == 4


def test_a_single_block_leaves_none_to_judge(tmp_path: Path, chats: Path):
    folder = tiny_model(tmp_path / "model", num_hidden_layers=3, scale=0.08)
    options: dict[str, Any] = {"choose": "healed", "block_length": 64, "calibration_tokens": 20}
    with pytest.raises(TextError, match="two blocks of text, one to fit and one to judge"):
        new_student(folder, tmp_path / "student", texts=chats, layers=2, **options)
    assert not (tmp_path / "student").exists()


def test_values_that_are_no_numbers_name_the_layer(tmp_path: Path):
    folder = tiny_model(tmp_path / "model", num_hidden_layers=3)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38)

    changed_tensors(folder, folder, spoil)
    with pytest.raises(FolderError, match=r"layer 1 of .* computes values that are not numbers"):
        healed_choices(folder, some_blocks(), 1)


def test_every_state_that_is_kept_is_used_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The work is that of the module's own account: L (n + 1) healed layers at most."""
    folder = tiny_model(tmp_path / "model", num_hidden_layers=6, scale=0.08)
    left: list[tuple[int, int]] = []
    leave = healed_choice._Search._heal_and_drop

    def counted(self: Any, depth: int, dropped: int, *rest: Any) -> None:
        left.append((depth, dropped))
        leave(self, depth, dropped, *rest)

    monkeypatch.setattr(healed_choice._Search, "_heal_and_drop", counted)
    healed_choices(folder, some_blocks(), 2)
    assert len(set(left)) == len(left)
    # (d, k) is reached with k layers gone behind the first: d > k, or nothing gone yet.
    assert set(left) == {(d, k) for d in range(6) for k in range(3) if k == 0 or d > k}
