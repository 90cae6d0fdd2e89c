"""Which layers can go, by what their absence costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from distill.student import greedy
from distill.student.greedy import Drop, greedy_drops
from mistill.errors import FolderError
from mistill.pytorch.layers import LayeredModel
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import Document, pack
from tests.reference import greedy_layers
from tests.tiny import tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "mistral with a sliding window": {"sliding_window": 4},
    "tied llama": {"model_type": "llama", "tie_word_embeddings": True},
}


def documents(*lengths: int) -> list[Document]:
    rng = np.random.default_rng(5)
    return [Document(rng.integers(0, 384, n), rng.random(n) < 0.7) for n in lengths]


def by_hand(folder: Path, texts: list[Document], count: int) -> list[tuple[int, float]]:
    pairs = [(text.ids.tolist(), text.mask.tolist()) for text in texts]
    return greedy_layers.greedy_drops(load_pytorch(folder), pairs, count)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_that_go_are_those_of_an_exhaustive_search(tmp_path: Path, kind: str) -> None:
    folder = tiny_model(tmp_path / "model", num_hidden_layers=5, scale=0.08, **KINDS[kind])
    texts = documents(9, 16, 5, 14, 12, 3, 16, 16)

    drops = greedy_drops(folder, pack(texts, 16), 3)

    expected = by_hand(folder, texts, 3)
    assert [drop.layer for drop in drops] == [layer for layer, _ in expected]
    # float32 sums in another order
    assert [drop.kl for drop in drops] == pytest.approx([kl for _, kl in expected], rel=1e-4)
    assert expected[0][1] > 0.01


def test_trials_that_cannot_win_are_stopped_early_and_the_outcome_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(tmp_path / "model", num_hidden_layers=6, scale=0.08)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer in (1, 4):  # two that hardly matter, so that the others are soon out of the race
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{part}.weight"].mul_(0.02)
    save_file(tensors, file, {"format": "pt"})
    blocks = pack(documents(*[16] * 8), 16)
    searches = []

    class Watched(greedy._Search):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            searches.append(self)

    monkeypatch.setattr(greedy, "_Search", Watched)
    raced = greedy_drops(folder, blocks, 2)
    monkeypatch.setattr(greedy, "_MOST_PARTS", 1)
    whole = greedy_drops(folder, blocks, 2)

    assert [drop.layer for drop in raced] == [drop.layer for drop in whole]
    assert {drop.layer for drop in raced} == {1, 4}
    assert [drop.kl for drop in raced] == pytest.approx([drop.kl for drop in whole], rel=1e-4)
    one, other = (search.passes / search.parts for search in searches)
    assert one < 0.5 * other


def test_a_search_goes_on_from_what_is_known(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", num_hidden_layers=5, scale=0.08)
    blocks = pack(documents(16, 16, 16), 16)
    all_at_once = greedy_drops(folder, blocks, 3)

    assert greedy_drops(folder, blocks, 3, known=all_at_once[:2]) == all_at_once
    # What is known is taken as it is, even where a search would have found otherwise.
    other = Drop(all_at_once[2].layer, 9.0)
    assert greedy_drops(folder, blocks, 1, known=[other]) == [other]
    assert greedy_drops(folder, blocks, 2, known=[other])[1].layer != other.layer


def test_layers_stay_in_memory_only_where_all_fit(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", num_hidden_layers=2)
    layer_bytes = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64)

    for room, stays in ((2 * layer_bytes, True), (2 * layer_bytes - 1, False)):
        model = LayeredModel(folder, hold_bytes=room)
        with model.layer(1) as layer:
            weight = layer.mlp.up_proj.weight
            assert not weight.is_meta
        assert layer.mlp.up_proj.weight.is_meta is not stays


def test_a_broken_teacher_is_named(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", num_hidden_layers=3)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})

    with pytest.raises(FolderError, match="not a number"):
        greedy_drops(folder, pack(documents(16), 16), 1)
