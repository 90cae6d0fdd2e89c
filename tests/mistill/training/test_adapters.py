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
from mistill.training.adapters import (
    MATRICES,
    AdapterPlan,
    adapters_in,
    add_adapters,
    load_adapters,
    merged,
    principal_starts,
    save_adapters,
    scales_of,
    start_at,
)
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


PLANS = {
    "patterns": AdapterPlan(rank=4, alpha=6, targets=MATRICES, ranks={"down_proj": 2, "q_proj": 6}),
    "rslora": AdapterPlan(rank=3, alpha=5, targets=MATRICES, rslora=True, ranks={"up_proj": 5}),
    "dora": AdapterPlan(rank=4, targets=("q_proj", "up_proj"), dora=True),
    "pissa": AdapterPlan(rank=4, targets=MATRICES, pissa=True),
    "pissa_rslora": AdapterPlan(rank=4, targets=MATRICES, pissa=True, rslora=True),
    "head": AdapterPlan(rank=4, targets=(*MATRICES, "lm_head")),
}


def adapted(folder: Path, plan: AdapterPlan) -> tuple[Any, dict[str, Any]]:
    """A model whose adapters say something, and where PiSSA's have started."""
    model = load_pytorch(folder)
    torch.manual_seed(1)
    add_adapters(model, plan.rank, plan)
    starts = principal_starts(model) if plan.pissa else {}
    if starts:
        start_at(model, starts)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model, starts


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", PLANS)
def test_every_kind_of_adapter_is_merged_saved_and_read_as_peft_does(
    tmp_path: Path, model: Path, name: str
) -> None:
    """peft loads what was saved onto the model as it came, computes and merges the same."""
    from peft import PeftModel

    plan = PLANS[name]
    ours, starts = adapted(model, plan)
    weights, scales = ours.state_dict(), scales_of(ours)
    ids = torch.arange(30)[None] + 7
    with torch.no_grad():
        expected = ours.eval()(ids, use_cache=False).logits
    plain = load_pytorch(model)
    whole = merged(weights, scales)
    plain.load_state_dict(whole)
    with torch.no_grad():
        said = plain(ids, use_cache=False).logits
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)

    held = adapters_in(weights, scales)
    held = {key: one.since(starts[key]) if starts else one for key, one in held.items()}
    save_adapters(held, tmp_path / "adapter", str(model), dora=plan.dora)
    theirs: Any = PeftModel.from_pretrained(load_pytorch(model), str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4
        )
    theirs = theirs.merge_and_unload()
    before = load_pytorch(model).state_dict()
    read = load_adapters(tmp_path / "adapter")
    assert read.keys() == held.keys()
    moved = 0.0
    for key, weight in theirs.state_dict().items():
        torch.testing.assert_close(whole[key], weight, rtol=1e-5, atol=1e-5, msg=key)
        module = key.removesuffix(".weight")
        if module in read:
            again = read[module].merged_into(before[key])
            torch.testing.assert_close(again, weight, rtol=1e-5, atol=1e-5, msg=key)
            moved = max(moved, (weight - before[key]).abs().max().item())
    assert moved > 0.01


def test_pissa_starts_where_peft_starts(model: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    ours = load_pytorch(model)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    plan = AdapterPlan(rank=4, alpha=12, targets=MATRICES)
    add_adapters(ours, 4, plan)
    start_at(ours, principal_starts(ours))
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=list(MATRICES), init_lora_weights="pissa"
    )
    theirs: Any = load_pytorch(model)
    inject_adapter_in_model(config, theirs, adapter_name="default")
    expected = theirs.state_dict()
    for key, value in ours.state_dict().items():
        if "base_layer" in key:
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=key)
    for key, value in merged(ours.state_dict(), scales_of(ours)).items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-6, msg=key)
    gate: Any = ours.get_submodule("model.layers.0.mlp.gate_proj")
    left = torch.linalg.svdvals(gate.base_layer.weight.data)
    whole = torch.linalg.svdvals(before["model.layers.0.mlp.gate_proj.weight"])
    torch.testing.assert_close(left[: len(whole) - 4], whole[4:], rtol=1e-3, atol=1e-4)


def test_adapters_are_float32_beside_a_bfloat16_model_and_on_all_seven_matrices(
    model: Path,
) -> None:
    low = load_pytorch(model, torch.bfloat16)
    add_adapters(low, 4, AdapterPlan(rank=4, targets=MATRICES))
    trained = {n: p for n, p in low.named_parameters() if p.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    kinds = {name.split(".lora_")[0].rpartition(".")[2] for name in trained}
    assert kinds == set(MATRICES)


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
