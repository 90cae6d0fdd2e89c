"""A rotated model is the same model, in matrices without outliers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantize
from mistill.errors import FolderError, SettingsError
from mistill.folders.folder import open_folder
from mistill.folders.lineage import read_lineage
from mistill.pytorch.loading import load_pytorch
from quantize.rotation.hadamard import hadamard, random_rotation
from tests.tiny import tiny_model

IDS = torch.arange(5, 45)[None]


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_pytorch(folder, dtype=torch.float64)(IDS).logits
    return found


@pytest.mark.parametrize("size", [1, 2, 64, 12, 20, 24, 48, 80, 144, 576, 4096])
def test_hadamard_matrices_are_of_ones_at_right_angles(size: int) -> None:
    H = hadamard(size)
    assert H is not None
    assert torch.equal(H.abs(), torch.ones(size, size, dtype=torch.float64))
    if size <= 1024:
        assert torch.equal(H @ H.T, size * torch.eye(size, dtype=torch.float64))
    else:
        assert torch.equal(H[:3] @ H.T, size * torch.eye(size, dtype=torch.float64)[:3])


@pytest.mark.parametrize("size", [3, 6, 52, 100, 768 + 2])
def test_orders_out_of_reach_are_known_as_such(size: int) -> None:
    assert hadamard(size) is None


@pytest.mark.parametrize("size", [64, 144, 50])
def test_a_rotation_is_orthogonal_and_drawn_by_its_seed(size: int) -> None:
    Q = random_rotation(size, seed=3)
    torch.testing.assert_close(Q @ Q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(Q, random_rotation(size, seed=3))
    assert not torch.equal(Q, random_rotation(size, seed=4))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"hidden_size": 80, "head_dim": 16},
        {"hidden_size": 100, "head_dim": 20},
    ],
    ids=["mistral", "tied", "biases", "hadamard of 20 x 4", "no hadamard"],
)
def test_a_rotated_model_predicts_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    source = tiny_model(tmp_path / "source", **options)
    made = quantize.rotate(source, tmp_path / "rotated", seed=1)

    before, after = logits(source), logits(made)

    assert before.std() > 0.5, "a model that says nothing would prove nothing"
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5 * float(before.abs().max()))
    stored, own = load_file(made / "model.safetensors"), load_file(source / "model.safetensors")
    norms = [name for name in stored if "norm" in name]
    assert len(norms) == 5
    assert all(torch.equal(stored[name], torch.ones_like(stored[name])) for name in norms)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        assert not torch.allclose(stored[name], own[name], atol=1e-2)
    assert "lm_head.weight" in stored
    assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_direction_that_stands_out_is_spread_over_all(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "up_proj.weight")):
            tensor[:, 7] *= 30
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made = quantize.rotate(source, tmp_path / "rotated")
    name = "model.layers.0.self_attn.q_proj.weight"

    def peak(folder: Path) -> float:
        columns = load_file(folder / "model.safetensors")[name].square().sum(0)
        return float(columns.max() / columns.mean())

    assert peak(source) > 50
    assert peak(made) < 5


def test_its_lineage_says_what_was_done(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "source", tie_word_embeddings=True)
    made = quantize.rotate(source, tmp_path / "rotated", seed=2, dtype="bfloat16")
    step = read_lineage(made)[-1]
    assert (step["step"], step["hadamard"], step["untied"]) == ("rotate", True, True)
    assert step["settings"] == {"seed": 2, "dtype": "bfloat16"}
    assert {t.dtype for t in load_file(made / "model.safetensors").values()} == {torch.bfloat16}
    assert open_folder(made).form == "model"


def test_it_can_be_quantized_like_any_other(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "source")
    rotated = quantize.rotate(source, tmp_path / "rotated")
    made = quantize.to_rounding(rotated, tmp_path / "small", bits=8, group_size=32)
    torch.testing.assert_close(logits(made), logits(source), rtol=0, atol=0.4)


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "source")
    with pytest.raises(SettingsError, match="dtype must be float32, float16 or bfloat16"):
        quantize.rotate(source, tmp_path / "out", dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="seed must be at least 0"):
        quantize.rotate(source, tmp_path / "out", seed=-1)
    small = quantize.to_rounding(source, tmp_path / "small", group_size=32)
    with pytest.raises(FolderError, match="is gptq already"):
        quantize.rotate(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
