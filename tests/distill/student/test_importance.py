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

from distill.student.angular import angular_distances, least_turning_block, sampled_positions
from distill.student.importance import evenly_spaced, measure_scores, most_influential
from mistill.errors import FolderError
from mistill.pytorch.loading import empty_model, load_pytorch
from mistill.text.blocks import Document, TokenBlocks, pack
from mistill.weights.plain_weights import PlainWeights
from tests.reference import angular_distance, width_scores
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


def measure_influence(folder: Path, blocks: TokenBlocks) -> tuple[float, ...]:
    return measure_scores(folder, blocks).influence


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

    class Watched(PlainWeights):
        def read(self, *arguments: Any) -> Any:
            weights = [weight for model in skeletons for weight in model.parameters()]
            loaded.append(sum(not weight.is_meta for weight in weights))
            return super().read(*arguments)

    monkeypatch.setattr("mistill.pytorch.layers.empty_model", keep)
    monkeypatch.setattr("mistill.pytorch.layers.PlainWeights", Watched)
    measure_influence(folder, pack(documents(32), 16))

    # the embedding, the nine weights of four layers, and the final norm, each read while no other
    # layer is there
    assert loaded == [0] * (1 + 4 * 9 + 1)


def test_a_broken_teacher_is_named(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", num_hidden_layers=3)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})

    with pytest.raises(FolderError, match="not a number"):
        measure_influence(folder, pack(documents(32), 16))


@pytest.mark.parametrize("kind", KINDS)
def test_angular_distance_is_that_of_its_definition(tmp_path: Path, kind: str) -> None:
    folder = tiny_model(tmp_path / "model", num_hidden_layers=3, **KINDS[kind])
    texts = documents(7, 16, 5, 21, 3)

    measured = measure_scores(folder, pack(texts, 16)).angular

    expected = angular_distance.angular_distances(load_pytorch(folder), pieces(texts, 16))
    assert measured.shape == (4, 4)
    # arccos of float32 states: 1e-7 in a cosine near 1 would be 1e-4 in the angle; these are not
    np.testing.assert_allclose(measured.numpy(), expected, atol=2e-6)
    assert min(expected[0][1:]) > 0.1


def test_the_block_that_turns_least_is_found_among_all_of_its_length() -> None:
    # Directions in the plane, in degrees: behind layer 2 the state is back where it was.
    degrees = torch.tensor([0.0, 30.0, 90.0, 40.0, 130.0])
    states = [
        torch.stack([torch.cos(angle), torch.sin(angle)])[None] for angle in degrees.deg2rad()
    ]

    distances = angular_distances(states)

    assert distances[0, 2].item() == pytest.approx(90 / 180, abs=1e-6)
    assert distances[2, 0].item() == pytest.approx(90 / 180, abs=1e-6)
    assert least_turning_block(distances, 1) == 0  # 30, 60, 50, 90
    assert least_turning_block(distances, 2) == 1  # 90, 10, 40
    assert least_turning_block(distances, 3) == 0  # 40, 100


def test_sampled_positions_are_spread_over_the_text_and_never_padding() -> None:
    present = torch.ones(4, 25, dtype=torch.bool)
    present[1, 10:] = False

    chosen = sampled_positions(present, 9)

    assert int(chosen.sum()) == 9
    assert not (chosen & ~present).any()
    assert chosen[0, 0]
    assert chosen[3, 24]
    numbers = chosen[present].nonzero()[:, 0]  # places among the 85 tokens that there are
    assert numbers.diff().min() >= 10
    assert numbers.diff().max() <= 11
    assert torch.equal(sampled_positions(present, 100), present)


@pytest.mark.parametrize("kind", ["mistral", "mistral with wide heads"])
def test_activation_magnitudes_are_those_of_their_definition(tmp_path: Path, kind: str) -> None:
    folder = tiny_model(tmp_path / "model", num_hidden_layers=2, **KINDS[kind])
    texts = documents(*[12] * 6)

    measured = measure_scores(folder, pack(texts, 12)).width

    expected = width_scores.width_scores(load_pytorch(folder), pieces(texts, 12))
    for name, values in expected.items():
        # float32 sums in another order
        np.testing.assert_allclose(getattr(measured, name).numpy(), values, rtol=2e-5, err_msg=name)


def test_padding_has_no_part_in_activation_magnitudes(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    texts = documents(12, 12)

    whole = measure_scores(folder, pack(texts, 12))
    padded = measure_scores(folder, pack(texts, 20))

    for name, values in vars(whole.width).items():
        torch.testing.assert_close(getattr(padded.width, name), values, rtol=1e-5, atol=1e-7)
    assert padded.influence == pytest.approx(whole.influence, abs=1e-6)


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
