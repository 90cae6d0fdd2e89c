"""Adapters: what they compute, what is saved of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import distill
from distill.settings import TrainSettings
from distill.teacher.teacher import LiveTeacher
from distill.training.step import DistillationStep, accumulate_gradients
from mistill.folders.lineage import read_lineage
from mistill.loss.heads import read_head
from mistill.pytorch.loading import load_pytorch
from mistill.training.adapters import add_adapters, merged
from mistill.training.processes import accelerating
from tests.distill.training.test_step import make_blocks
from tests.distill.training.test_trained_folder import QUICK
from tests.tiny import tiny_model


def shake_adapters(student: Any) -> None:
    """Give B values, so that the adapters say something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("tied", [False, True])
def test_merged_weights_are_those_that_peft_merges(tmp_path: Path, tied: bool) -> None:
    from peft import PeftModel, get_peft_model  # noqa: F401
    from peft.tuners.lora import LoraLayer

    folder = tiny_model(tmp_path / "student", tie_word_embeddings=tied)
    student = load_pytorch(folder)
    torch.manual_seed(1)
    add_adapters(student, rank=3)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert any("lm_head" in name for name in trained) != tied
    shake_adapters(student)
    plain = merged(student.state_dict())
    assert plain.keys() == load_pytorch(folder).state_dict().keys()
    for module in student.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    for name, module in student.named_modules():
        if isinstance(module, LoraLayer):
            theirs = module.get_base_layer().weight
            torch.testing.assert_close(plain[f"{name}.weight"], theirs, rtol=1e-6, atol=1e-7)


def test_gradients_through_adapters_are_those_of_peft(tmp_path: Path, teacher: Path) -> None:
    folder = tiny_model(tmp_path / "student", seed=3)
    blocks, live = make_blocks(), LiveTeacher(load_pytorch(teacher))
    settings = TrainSettings(batch_size=4, cross_entropy=1.0)
    models = []
    for _ in range(2):
        torch.manual_seed(2)
        models.append(load_pytorch(folder))
        add_adapters(models[-1], rank=4)
        shake_adapters(models[-1])
    ours, theirs = models
    assert read_head(ours).adapter is not None
    with accelerating(settings, Path()) as accelerator:
        module = accelerator.prepare(DistillationStep(ours, settings))
        accumulate_gradients(module, live, blocks, settings, accelerator)
    ids, positions = torch.tensor(blocks.ids), torch.tensor(blocks.position_ids)
    logits = theirs(ids, position_ids=positions, use_cache=False).logits
    kept = torch.tensor(blocks.kept)
    following = ids[:, 1:][kept[:, :-1]]
    torch.nn.functional.cross_entropy(logits[kept], following).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-4, atol=1e-7, msg=name
            )
        else:
            assert parameter.grad is None


def test_a_student_trained_through_adapters_is_a_plain_folder(
    tmp_path: Path, teacher: Path, model: Path, chats: Path
) -> None:
    made = distill.train(
        model, tmp_path / "out", teacher=teacher, texts=chats, lora_rank=8, **QUICK
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (model, made))
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if "proj" in name or "lm_head" in name}
    for name in changed:
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert values[8] < 1e-4 * values[0], f"the change of {name} has more than rank 8"
    facts = read_lineage(made)[-1]
    assert facts["after"]["kl"] < facts["before"]["kl"]
    assert json.loads((made / "config.json").read_text()).get("quantization_config") is None
