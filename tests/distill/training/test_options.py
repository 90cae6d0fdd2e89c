"""Ways to train that change memory, or the teacher, and what they must not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.mistral.modeling_mistral import MistralAttention

import distill
from distill.settings import TrainSettings
from distill.teacher import live_teacher
from distill.teacher.live_teacher import SpreadTeacher, load_teacher
from distill.teacher.teacher import LiveTeacher, Teacher
from distill.training import trainer
from distill.training.evaluation import score_positions
from mistill.errors import SettingsError, TextError
from mistill.folders.folder import describe
from mistill.folders.lineage import fingerprint, read_lineage
from mistill.loss.batches import Batch, make_batch
from mistill.loss.targets import DenseTargets
from mistill.pytorch.loading import load_pytorch
from mistill.text.vocabulary import load_vocabulary
from mistill.training.optimizers import make_optimizer
from mistill.training.processes import accelerating
from mistill.training.training_text import read_blocks
from tests.distill.training.test_step import CPU, make_blocks, step_gradients
from tests.distill.training.test_trained_folder import QUICK, Killed, assert_same_run, kill_when
from tests.reference import distillation as reference
from tests.tiny import tiny_model

SHORT: dict[str, Any] = {**QUICK, "tokens": 600}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logits_of(folder: Path, batch: Batch) -> torch.Tensor:
    """All logits at the kept positions, in float64."""
    model: Any = load_pytorch(folder)
    with torch.no_grad():
        # with a cache, transformers would let attention cross from document to document
        logits: torch.Tensor = model(
            batch.ids, position_ids=batch.positions, use_cache=False
        ).logits
    kept: torch.Tensor = logits[batch.kept].double()
    return kept


# --- what is lowered ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mixture"), [("reverse_kl", 0.5), ("jsd", 0.2), ("skew_kl", 0.1), ("tvd", 0.5)]
)
def test_a_step_lowers_the_divergence_that_is_asked_for(
    model: Path, teacher: Path, name: Any, mixture: float
) -> None:
    blocks = make_blocks()
    _, (loss, apart, _) = step_gradients(
        model, teacher, blocks, divergence=name, mixture=mixture, temperature=2.0
    )
    batch = make_batch(blocks, CPU)
    p, q = (logits_of(folder, batch) / 2 for folder in (teacher, model))
    rows = [
        reference.divergence_of_position(student, taught, name, mixture)
        for student, taught in zip(q, p, strict=True)
    ]
    mean = torch.stack(rows).mean().item()
    assert loss == pytest.approx(4 * mean, rel=1e-5)
    assert apart == pytest.approx(loss, rel=1e-6)


def test_without_a_share_in_the_loss_the_teacher_is_only_asked_to_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Path, model: Path, chats: Path
) -> None:
    asked = []
    original = LiveTeacher.targets

    def counting(self: LiveTeacher, blocks: Any, batch: Any) -> DenseTargets:
        asked.append(len(blocks))
        return original(self, blocks, batch)

    monkeypatch.setattr(LiveTeacher, "targets", counting)
    options = {**SHORT, "cross_entropy": 1.0, "held_out_tokens": 64, "learning_rate": 1e-3}
    made = distill.train(model, tmp_path / "out", teacher=teacher, texts=chats, **options)
    assert asked == [1]
    steps = [line for line in metrics(made) if "loss" in line]
    assert all("kl" not in line for line in steps)
    assert all(line["loss"] == pytest.approx(line["cross_entropy"]) for line in steps)


class Remembering:
    """A teacher that notes what it was told to expect, and what it was asked."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.expected, self.asked = teacher, [], []  # type: ignore[var-annotated]

    def expect(self, blocks: Any) -> None:
        self.expected.append(blocks.ids.tobytes())

    def targets(self, blocks: Any, batch: Any) -> Any:
        self.asked.append((blocks.ids.tobytes(), len(self.expected)))
        return self.teacher.targets(blocks, batch)


def test_the_teacher_hears_of_every_micro_batch_a_step_ahead(
    tmp_path: Path, model: Path, teacher: Path, chats: Path
) -> None:
    settings = TrainSettings(**{**SHORT, "evaluate_every": 0})
    training, judged = read_blocks(chats, None, load_vocabulary(model), settings)
    told = Remembering(LiveTeacher(load_pytorch(teacher)))
    with accelerating(settings, tmp_path) as accelerator:
        trainer.train_student(
            load_pytorch(model), told, training, judged, settings,
            accelerator=accelerator, work=tmp_path,
        )  # fmt: skip
    assert [ids for ids, _ in told.asked] == told.expected
    held_out = -(-len(judged) // 2)
    ahead = [known - number - 1 for number, (_, known) in enumerate(told.asked)]
    assert min(ahead[held_out:-2]) >= 2, "two micro-batches make a step"


# --- memory -------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_gradient(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teacher: Path, chats: Path
) -> None:
    student = tiny_model(tmp_path / "student", seed=2, attention_dropout=0.1)
    original, calls = MistralAttention.forward, [0]

    def counting(self: MistralAttention, *arguments: Any, **options: Any) -> Any:
        calls[-1] += torch.is_grad_enabled()
        return original(self, *arguments, **options)

    monkeypatch.setattr(MistralAttention, "forward", counting)
    made = []
    for name in ("plain", "checkpointed"):
        options = {**SHORT, "gradient_checkpointing": name == "checkpointed"}
        target = tmp_path / name
        made.append(distill.train(student, target, teacher=teacher, texts=chats, **options))
        calls.append(0)
    assert calls[1] == 2 * calls[0] > 0
    plain, checkpointed = (load_file(folder / "model.safetensors") for folder in made)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_eight_bit_adamw_goes_where_adamw_goes_in_a_quarter_of_the_bytes(model: Path) -> None:
    weights, states = {}, {}
    for name in ("adamw", "adamw_8bit"):
        student = load_pytorch(model)
        optimizer = make_optimizer(student, name=name, learning_rate=1e-3, weight_decay=0.01)
        generator = torch.Generator().manual_seed(0)
        before = {key: value.clone() for key, value in student.state_dict().items()}
        for _ in range(20):
            for parameter in student.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator) + 0.5
            optimizer.step()
        weights[name] = torch.cat(
            [(value - before[key]).flatten() for key, value in student.state_dict().items()]
        )
        states[name] = sum(
            tensor.numel() * tensor.element_size()
            for state in optimizer.state.values()
            for key, tensor in state.items()
            if isinstance(tensor, torch.Tensor) and not key.startswith("qmap")
        )
    assert torch.cosine_similarity(weights["adamw"], weights["adamw_8bit"], dim=0) > 0.99
    assert states["adamw_8bit"] < 0.31 * states["adamw"]


# --- the teacher --------------------------------------------------------------------------------


def test_a_teacher_turned_into_four_bits_says_what_that_cost(
    tmp_path: Path, teacher: Path, model: Path, chats: Path
) -> None:
    import quantize

    options = {**SHORT, "teacher_precision": "nf4"}
    made = distill.train(model, tmp_path / "out", teacher=teacher, texts=chats, **options)
    facts = read_lineage(made)[-1]
    assert facts["after"]["kl"] < facts["before"]["kl"]

    small = quantize.to_nf4(teacher, tmp_path / "nf4")
    _, judged = read_blocks(chats, None, load_vocabulary(model), TrainSettings(**SHORT), 0.05)
    batch = make_batch(judged, CPU)
    p, q = (logits_of(folder, batch)[None] for folder in (teacher, small))
    everywhere = torch.ones(p.shape[:2], dtype=torch.bool)
    expected = reference.mean_kl(q, p, everywhere, 1.0).item()
    assert facts["teacher_kl_of_four_bits"] == pytest.approx(expected, rel=1e-3)
    assert facts["teacher_kl_of_four_bits"] > 0.001


@pytest.mark.parametrize("tied", [False, True])
def test_a_teacher_spread_over_memory_and_disk_says_the_same(tmp_path: Path, tied: bool) -> None:
    folder = tiny_model(tmp_path / "teacher", seed=1, tie_word_embeddings=tied)
    settings = TrainSettings(teacher_device_map="auto", micro_batch_size=2)
    places = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "disk",
        "lm_head": "cpu" if tied else "disk",
    }
    blocks = make_blocks()
    batch = make_batch(blocks, CPU)
    whole = LiveTeacher(load_pytorch(folder)).targets(blocks, batch)
    with accelerating(settings, tmp_path) as accelerator:
        for device_map in (None, places):
            spread = load_teacher(describe(folder), settings, accelerator, device_map=device_map)
            assert isinstance(spread, SpreadTeacher)
            said = spread.targets(blocks, batch)
            (scores,) = score_positions(said.hidden, said.head, whole, batch.next_ids)
            assert scores.kl.max() < 1e-6


# --- what a teacher said, on disk ---------------------------------------------------------------


def test_a_student_learns_from_cached_targets_and_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Path, model: Path, chats: Path
) -> None:
    targets = distill.cache_targets(
        teacher, tmp_path / "targets", texts=chats, block_length=QUICK["block_length"]
    )
    monkeypatch.setattr(live_teacher, "load_teacher", None)
    whole = distill.train(model, tmp_path / "whole", targets=targets, texts=chats, **QUICK)
    facts = read_lineage(whole)[-1]
    assert facts["teacher_fingerprint"] == fingerprint(teacher)
    assert facts["targets"] == Path(targets).name
    assert facts["after"]["kl"] < 0.9 * facts["before"]["kl"]
    assert facts["after"]["agreement"] is None
    assert facts["after"]["perplexity"] > 1

    resumed = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        kill_when(patch, trainer, "accumulate_gradients", 5, after=True)
        with pytest.raises(Killed):
            distill.train(model, resumed, targets=targets, texts=chats, **QUICK)
    distill.train(model, resumed, targets=targets, texts=chats, **QUICK)
    assert_same_run(resumed, whole)


def test_other_texts_than_those_of_the_targets_are_refused(
    tmp_path: Path, teacher: Path, model: Path, chats: Path
) -> None:
    targets = distill.cache_targets(
        teacher, tmp_path / "targets", texts=chats, block_length=QUICK["block_length"]
    )
    other = tmp_path / "other.txt"
    other.write_text("A wind that no target has heard of.\n" * 20)
    with pytest.raises(TextError, match="not in the targets"):
        distill.train(model, tmp_path / "out", targets=targets, texts=other, **QUICK)
    with pytest.raises(SettingsError, match="temperature"):
        distill.train(
            model, tmp_path / "out", targets=targets, texts=chats, temperature=2.0, **QUICK
        )
    assert not (tmp_path / "out").exists()
