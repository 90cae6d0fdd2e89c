"""The plain model that a model of peft is, against peft's own merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mistill.errors import FolderError
from mistill.pytorch.loading import load_pytorch
from mistill.pytorch.reward_model import new_reward_model
from mistill.training.adapters import merged_parameters
from tune.settings import TrainerSettings
from tune.trainers.adapters import adapter_config
from tune.trainers.tuned_folder import rounded, write_merged

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def trained(model: Any, kind: str) -> Any:
    """A model of peft whose adapters, and whose head, are not what they began as."""
    from peft import get_peft_model

    config = adapter_config(model, TrainerSettings(lora_rank=4, lora_alpha=12), kind=kind)
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return peft_model


@pytest.mark.parametrize("kind", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_what_peft_makes_of_it(kind: str, tied: bool, tmp_path: Path) -> None:
    from tests.tiny import tiny_model

    folder = tiny_model(tmp_path / "model", seed=2, tie_word_embeddings=tied)
    start = load_pytorch(folder) if kind == "CAUSAL_LM" else new_reward_model(folder, 2, seed=3)
    before = {name: one.detach().clone() for name, one in start.named_parameters()}
    model = trained(start, kind)
    ours = {name: tensor.clone() for name, tensor in merged_parameters(model)}
    theirs = {
        name: one.detach()
        for name, one in model.merge_and_unload(safe_merge=True).named_parameters()
    }
    assert list(ours) == list(theirs) == list(before)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    moved = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert moved == {name for name in ours if "_proj" in name or name == "score.weight"}


def test_a_model_without_adapters_is_itself(model: Path) -> None:
    plain = load_pytorch(model)
    ours = dict(merged_parameters(plain))
    assert list(ours) == [name for name, _ in plain.named_parameters()]
    for name, parameter in plain.named_parameters():
        assert torch.equal(ours[name], parameter)


def test_what_is_written_is_the_merged_model_and_the_adapters_stay(
    model: Path, tmp_path: Path
) -> None:
    adapted = trained(load_pytorch(model), "CAUSAL_LM")
    ids = torch.arange(30)[None] + 7
    with torch.no_grad():
        expected = adapted.eval()(ids, use_cache=False).logits
    (tmp_path / "out").mkdir()
    write_merged(adapted, model, tmp_path / "out")
    written: Any = load_pytorch(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(
            written(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(adapted(ids, use_cache=False).logits, expected)
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == dict(merged_parameters(adapted)).keys()
    )


def test_a_sum_that_its_type_cannot_hold_is_refused_by_name() -> None:
    large = torch.tensor([1.0, 1e5])
    assert torch.equal(rounded("weight", large, torch.bfloat16), large.bfloat16())
    with pytest.raises(FolderError, match=r"weight became too large for torch\.float16; lower"):
        rounded("weight", large, torch.float16)
