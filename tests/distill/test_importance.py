"""Which layers matter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.importance import (
    attention_mask,
    evenly_spaced,
    measure_influence,
    most_influential,
)
from mistill.errors import FolderError
from mistill.pytorch import empty_model, load_pytorch, read_tensors
from mistill.text import Document, pack
from tests.reference.block_influence import block_influence
from tests.tiny import tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "mistral with a sliding window": {"sliding_window": 4},
    "mistral with wide heads": {"head_dim": 24},
    "tied llama with biases": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama with stretched positions": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
    },
}


def documents(*lengths: int) -> list[Document]:
    rng = np.random.default_rng(3)
    return [Document(rng.integers(0, 384, n), np.zeros(n, bool)) for n in lengths]


def pieces(texts: Sequence[Document], length: int) -> list[list[int]]:
    """What the model reads as one: documents, cut where they exceed a block."""
    return [
        text.ids[start : start + length].tolist()
        for text in texts
        for start in range(0, len(text.ids), length)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_influence_is_that_of_its_definition(tmp_path: Path, kind: str) -> None:
    folder = tiny_model(tmp_path / "model", num_hidden_layers=3, **KINDS[kind])
    # Six blocks, in which documents share blocks, fill them, exceed them, and leave padding.
    texts = documents(7, 16, 16, 5, 37, 1, 3)

    measured = measure_influence(folder, pack(texts, 16))

    expected = block_influence(load_pytorch(folder), pieces(texts, 16))
    assert min(expected) > 0.05
    # float32 sums in another order
    assert measured == pytest.approx(expected, abs=2e-6)


def test_influence_is_measured_in_float32_whatever_the_weights_are(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "half")
    file = folder / "model.safetensors"
    halved = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(halved, file, {"format": "pt"})
    texts = documents(16, 16)

    measured = measure_influence(folder, pack(texts, 16))

    model = load_pytorch(folder, torch.float32)
    assert measured == pytest.approx(block_influence(model, pieces(texts, 16)), abs=2e-6)


def test_a_layer_that_does_nothing_has_no_influence(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", num_hidden_layers=3)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{part}.weight"].zero_()
    save_file(tensors, file, {"format": "pt"})

    influence = measure_influence(folder, pack(documents(32), 16))

    assert influence[1] == pytest.approx(0, abs=1e-6)
    assert most_influential(influence, 2) == (0, 2)


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model(tmp_path / "model", num_hidden_layers=4)
    skeletons, loaded = [], []

    def keep(config: Any) -> Any:
        skeletons.append(empty_model(config))
        return skeletons[-1]

    def watch(where: Path, prefix: str) -> dict[str, torch.Tensor]:
        weights = [weight for model in skeletons for weight in model.parameters()]
        loaded.append(sum(not weight.is_meta for weight in weights))
        return read_tensors(where, prefix)

    monkeypatch.setattr("distill.importance.empty_model", keep)
    monkeypatch.setattr("distill.importance.read_tensors", watch)
    measure_influence(folder, pack(documents(32), 16))

    assert loaded == [0] * 5


def test_a_broken_teacher_is_named(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", num_hidden_layers=3)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})

    with pytest.raises(FolderError, match=r"layer 1 of .* values that are not numbers"):
        measure_influence(folder, pack(documents(32), 16))


def test_the_least_influential_layers_go() -> None:
    assert most_influential([0.9, 0.1, 0.3, 0.2, 0.8], 3) == (0, 2, 4)
    assert most_influential([0.1, 0.9, 0.9], 2) == (1, 2)


def test_of_layers_that_tie_the_first_ones_stay() -> None:
    assert most_influential([0.5, 0.5, 0.5, 0.5], 2) == (0, 1)


@pytest.mark.parametrize(
    ("total", "count", "layers"),
    [
        (5, 3, (0, 2, 4)),
        (4, 3, (0, 2, 3)),
        (6, 4, (0, 2, 3, 5)),
        (30, 1, (0,)),
        (30, 2, (0, 29)),
        (30, 15, (0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27, 29)),
    ],
)
def test_evenly_spaced_layers_worked_by_hand(
    total: int, count: int, layers: tuple[int, ...]
) -> None:
    assert evenly_spaced(total, count) == layers


def test_evenly_spaced_layers_are_distinct_and_hold_both_ends() -> None:
    for total in range(2, 40):
        for count in range(2, total):
            layers = evenly_spaced(total, count)
            gaps = {after - before for before, after in itertools.pairwise(layers)}
            assert len(layers) == count
            assert (layers[0], layers[-1]) == (0, total - 1)
            assert max(gaps) - min(gaps) <= 1
            assert min(gaps) >= 1


def test_attention_crosses_no_document_and_no_window() -> None:
    seen = attention_mask(torch.tensor([[0, 0, 0, 1, 1, -1]]), window=2)

    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
