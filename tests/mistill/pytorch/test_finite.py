"""A weight that is no finite number: every step that reads it names it, and leaves nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distill
import export
import quantize
from mistill.engine.language_model import greedy
from mistill.engine.sampling import SamplingSettings, candidates
from mistill.errors import FolderError
from mistill.pytorch.loading import load_pytorch, require_finite
from quantize import dequantize, to_rounding
from quantize.settings import RoundingSettings
from tests.tiny import changed_tensors

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
SHORT: dict[str, Any] = {"block_length": 32, "group_size": 32}


def spoilt(
    model: Path, target: Path, name: str, value: float, dtype: torch.dtype = torch.float32
) -> Path:
    def change(tensors: dict[str, Any]) -> None:
        for other, tensor in tensors.items():
            tensors[other] = tensor.to(dtype)
        tensors[name].view(-1)[-1] = value

    return changed_tensors(model, target, change)


Step = Callable[[Path, Path, Path, Path], object]
STEPS: dict[str, Step] = {
    "rounding": lambda bad, _, chats, out: to_rounding(bad, out, group_size=32),
    "rounding of tables": lambda bad, _, chats, out: to_rounding(
        bad, out, group_size=32, embedding_bits=8
    ),
    "gptq": lambda bad, _, chats, out: quantize.to_gptq(bad, out, texts=chats, samples=4, **SHORT),
    "nf4": lambda bad, _, chats, out: quantize.to_nf4(bad, out),
    "rotate": lambda bad, _, chats, out: quantize.rotate(bad, out),
    "mixed": lambda bad, _, chats, out: quantize.to_mixed(
        bad,
        out,
        texts=chats,
        bits_per_weight=30,
        block_length=32,
        formats=("bits=4,group_size=32", "bits=8,group_size=32"),
    ),
    "tune": lambda bad, good, chats, out: quantize.tune(
        to_rounding(good, out.parent / "small", group_size=32),
        out,
        teacher=bad,
        texts=chats,
        block_length=32,
        steps=2,
    ),
    "targets": lambda bad, _, chats, out: distill.cache_targets(
        bad, out, texts=chats, block_length=32
    ),
    "generate": lambda bad, _, chats, out: distill.generate_conversations(
        bad, chats, out.with_suffix(".jsonl"), max_new_tokens=2
    ),
    "load": lambda bad, _, chats, out: load_pytorch(bad),
    "onnx": lambda bad, _, chats, out: export.to_onnx(bad, out),
    "gguf": lambda bad, _, chats, out: export.to_gguf(bad, out),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("name", "value"), [(UP, float("inf")), (EMBEDDING, float("nan")), (NORM, float("-inf"))]
)
def test_a_step_names_the_weight_and_leaves_nothing(
    name: str, value: float, step: str, model: Path, chats: Path, tmp_path: Path
):
    bad = spoilt(model, tmp_path / "bad", name, value)
    work = tmp_path / "work"
    work.mkdir()
    module = name.removesuffix(".weight")
    with pytest.raises(FolderError, match=f"{module}.*not a number"):
        STEPS[step](bad, model, chats, work / "out")
    assert [path.name for path in work.iterdir() if path.name != "small"] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_weight_of_any_type_is_looked_at(dtype: torch.dtype, model: Path, tmp_path: Path):
    bad = spoilt(model, tmp_path / "bad", UP, float("inf"), dtype)
    with pytest.raises(FolderError, match=UP):
        to_rounding(bad, tmp_path / "out", group_size=32)
    to_rounding(spoilt(model, tmp_path / "good", UP, 1.0, dtype), tmp_path / "out", group_size=32)


def test_floats_beside_codes_are_looked_at_too(model: Path, tmp_path: Path):
    small = to_rounding(model, tmp_path / "small", settings=RoundingSettings(group_size=32))
    bad = changed_tensors(
        small, tmp_path / "bad", lambda tensors: tensors[NORM].fill_(float("nan"))
    )
    for step in (load_pytorch, lambda folder: dequantize(folder, tmp_path / "out")):
        with pytest.raises(FolderError, match=NORM):
            step(bad)


def test_whole_numbers_and_nothing_are_finite():
    require_finite("whole", torch.arange(4))
    require_finite("nothing", torch.empty(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_choose_no_token(value: float):
    logits = np.zeros(400, np.float32)
    logits[7] = value
    with pytest.raises(FolderError, match="logits that are infinite or not numbers"):
        greedy(logits)
    for settings in (
        SamplingSettings(temperature=0),
        SamplingSettings(),
        SamplingSettings(top_k=3),
    ):
        with pytest.raises(FolderError, match="logits that are infinite or not numbers"):
            candidates(logits, settings)
    forbidden = np.full(400, -np.inf, np.float32)
    forbidden[7] = 1
    assert greedy(forbidden) == 7
    assert candidates(forbidden, SamplingSettings()).probabilities.max() == 1
