"""What is estimated of KL from one backward pass is what is measured, one matrix at a time."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from mistill.measures.kl import compare, predict
from mistill.pytorch.loading import load_pytorch
from mistill.weights.gptq_layout import EMBEDDING, HEAD, ModuleFormat
from quantize.calibration_text import draw_blocks
from quantize.folders.float_model import open_float
from quantize.folders.plan import round_table
from quantize.gptq.rounding import round_weight
from quantize.mixed.sensitivity import _through_head, estimate_costs
from quantize.settings import GptqSettings
from tests.tiny import tiny_model

SETTINGS = GptqSettings(samples=24, block_length=64)
FORMS = (ModuleFormat(bits=4, group_size=32), ModuleFormat(bits=8, group_size=64))


def ranks(values: Any) -> NDArray[np.int64]:
    return np.argsort(np.argsort(values))


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_estimates_rank_the_matrices_and_have_the_size_of_what_is_measured(
    tied: bool, chats: Path, tmp_path: Path
) -> None:
    folder = tiny_model(tmp_path / "model", tie_word_embeddings=tied, seed=5)
    model = open_float(folder)
    blocks = draw_blocks(chats, folder, SETTINGS)
    tables = (EMBEDDING,) if tied else (EMBEDDING, HEAD)
    candidates = dict.fromkeys((*model.matrices, *tables), FORMS)
    generator = torch.Generator().manual_seed(0)
    costs = estimate_costs(model, blocks, candidates, SETTINGS, generator)
    assert costs.keys() == candidates.keys()

    loaded = load_pytorch(folder)
    plain = {"plain": predict(loaded, blocks)}
    measured: dict[str, list[float]] = {}
    for name in candidates:
        module = cast(Any, loaded.get_submodule(name))
        kept = module.weight.data
        for form in FORMS:
            if name in tables:
                weight = round_table(kept, SETTINGS, form)
            else:
                weight = round_weight(kept, SETTINGS.with_format(form))
            module.weight.data = torch.from_numpy(weight.dequantize())
            found = compare(plain, {"rounded": predict(loaded, blocks)}, blocks)
            measured.setdefault(name, []).append(found["rounded"]["plain"].kl)
        module.weight.data = kept

    for place, form in enumerate(FORMS):
        estimated = np.array([costs[name][form] for name in candidates])
        real = np.array([measured[name][place] for name in candidates])
        correlation = np.corrcoef(ranks(estimated), ranks(real))[0, 1]
        assert correlation > 0.9
        # Tokens are drawn: a single estimate may be off by a third, all of them together not.
        assert (np.abs(np.log(estimated / real)) < np.log(2)).all()
        assert estimated.sum() == pytest.approx(real.sum(), rel=0.2)
        # Of tables there are more weights to take the mean over.
        assert estimated[-len(tables) :] == pytest.approx(real[-len(tables) :], rel=0.2)


def test_a_shared_table_costs_what_it_costs_in_both_places(chats: Path, tmp_path: Path) -> None:
    tied = tiny_model(tmp_path / "tied", tie_word_embeddings=True, seed=5)
    apart = tmp_path / "apart"
    shutil.copytree(tied, apart)
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, apart / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((apart / "config.json").read_text("utf-8"))
    (apart / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    found = []
    for folder, tables in ((tied, (EMBEDDING,)), (apart, (EMBEDDING, HEAD))):
        blocks = draw_blocks(chats, folder, SETTINGS)
        generator = torch.Generator().manual_seed(0)
        asked = dict.fromkeys(tables, FORMS)
        costs = estimate_costs(open_float(folder), blocks, asked, SETTINGS, generator)
        found.append([[costs[name][form] for form in FORMS] for name in tables])
    assert min(found[1][1]) > 1e-6
    assert found[0][0] == pytest.approx(np.sum(found[1], axis=0), rel=1e-5)


def test_gradients_of_tokens_drawn_from_the_model_are_nought_on_average() -> None:
    """That is what makes their squares the Fisher information."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 5000, 8, generator=generator).mul_(0.1)
    table = torch.randn(50, 8, generator=generator) + 1.0
    kept = [torch.ones(1, 5000, dtype=torch.bool)]
    (gradient,) = _through_head([hidden], torch.nn.Identity(), table, kept, generator)
    spread = gradient[0].std(0) / 5000**0.5
    assert (gradient[0].mean(0).abs() < 4 * spread).all()


def test_only_what_is_asked_for_is_estimated(model: Path, chats: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    blocks = draw_blocks(chats, model, replace(SETTINGS, samples=2))
    generator = torch.Generator().manual_seed(0)
    costs = estimate_costs(open_float(model), blocks, {name: FORMS[:1]}, SETTINGS, generator)
    assert costs.keys() == {name}
    assert costs[name].keys() == {FORMS[0]}
