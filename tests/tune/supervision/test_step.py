"""One step of supervised tuning has the gradient of its definition, however it is divided."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mistill.folders.folder import open_folder
from mistill.pytorch.loading import load_pytorch
from mistill.pytorch.spread import load_spread
from mistill.text.blocks import Document, TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary
from mistill.training.adapters import add_adapters
from mistill.training.lean import remember_less
from mistill.training.processes import accelerating
from tests.reference import supervised as reference
from tests.tiny import tiny_model
from tune.settings import SupervisedSettings
from tune.supervision.noise import Place, noise_for
from tune.supervision.step import SupervisedStep, accumulate_gradients, held_out_cost
from tune.supervision.trainer import adapter_plan

Gradients = dict[str, torch.Tensor]


def conversations(folder: Path, chats: Path, count: int = 7) -> list[Document]:
    """Conversations of very different lengths."""
    documents = list(read_documents(chats, load_vocabulary(folder)))[:count]
    longer = np.concatenate([documents[0].ids, documents[1].ids])
    mask = np.concatenate([documents[0].mask, documents[1].mask])
    return [*documents, Document(longer, mask)]


def alone(documents: Sequence[Document], length: int) -> TokenBlocks:
    """Each document in a block of its own, padded."""
    rows = [pack([document], length) for document in documents]
    numbers = [np.where(row.documents < 0, -1, n) for n, row in enumerate(rows)]
    return TokenBlocks(
        ids=np.concatenate([row.ids for row in rows]),
        mask=np.concatenate([row.mask for row in rows]),
        documents=np.concatenate(numbers).astype(np.int32),
    )


def prepared(folder: Path, settings: SupervisedSettings) -> Any:
    model = load_pytorch(folder)
    if settings.base == "nf4":
        model = load_spread(open_folder(folder), torch.float32, {"": "cpu"}, nf4=True)
    if settings.lora_rank:
        torch.manual_seed(5)
        add_adapters(model, settings.lora_rank, adapter_plan(settings))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients_of(model: Any) -> Gradients:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def our_step(
    folder: Path, blocks: TokenBlocks, settings: SupervisedSettings, step: int = 0
) -> tuple[Gradients, float]:
    model = prepared(folder, settings)
    remember_less(model)
    model.train()
    with accelerating(settings, Path()) as accelerator:
        module = accelerator.prepare(SupervisedStep(model, settings))
        sums = accumulate_gradients(module, blocks, settings, accelerator, step)
    return gradients_of(model), sums.loss


def assert_same(ours: Gradients, theirs: Gradients, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=rtol, atol=atol, msg=name)


WAYS: list[dict[str, Any]] = [
    {"lora_rank": 0},
    {"lora_rank": 4},
    {"lora_rank": 4, "base": "nf4"},
    {"lora_rank": 4, "dora": True},
    {"lora_rank": 4, "rslora": True, "lora_ranks": ("up_proj=2",)},
]


@pytest.mark.parametrize("options", WAYS, ids=lambda options: "-".join(options))
def test_packed_conversations_have_the_gradient_of_each_read_alone(
    model: Path, chats: Path, options: dict[str, Any]
) -> None:
    documents = conversations(model, chats)
    blocks = pack(documents, 256)
    assert len(blocks) < len(documents), "some documents share a block"
    settings = SupervisedSettings(batch_size=len(blocks), block_length=256, **options)
    ours, loss = our_step(model, blocks, settings)
    slow = prepared(model, settings)
    expected = reference.loss(slow, documents)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same(ours, gradients_of(slow))


@pytest.mark.parametrize("options", [{}, {"neftune": 5.0}], ids=["plain", "neftune"])
def test_four_steps_of_one_have_the_gradient_of_one_of_four(
    model: Path, chats: Path, options: dict[str, Any]
) -> None:
    blocks = alone(conversations(model, chats)[-4:], 192)
    counts = blocks.kept.sum(axis=1)
    assert counts.max() > 1.5 * counts.min()
    first, second = (
        our_step(model, blocks, SupervisedSettings(batch_size=4, micro_batch_size=size, **options))
        for size in (1, 4)
    )
    assert first[1] == pytest.approx(second[1], rel=1e-6)
    assert_same(first[0], second[0], rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("rank", [0, 4])
def test_a_step_has_the_gradient_of_trls_trainer_on_the_same_rows(
    tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_DISABLE_TELEMETRY", "1")
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    folder = tiny_model(tmp_path / "model", model_type="llama", seed=4)
    documents = conversations(folder, chats)
    settings = SupervisedSettings(batch_size=len(documents), lora_rank=rank)
    ours, loss = our_step(folder, alone(documents, 192), settings)

    rows = [
        {"input_ids": one.ids.tolist(), "labels": np.where(one.mask, one.ids, -100).tolist()}
        for one in documents
    ]
    theirs = prepared(folder, settings)
    trainer = trl.SFTTrainer(
        model=theirs,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=len(rows),
            max_length=None,
            max_steps=1,
            max_grad_norm=0.0,
            learning_rate=0.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
    )
    step, seen = trainer.training_step, []

    def looking(*arguments: Any, **options: Any) -> Any:
        value = step(*arguments, **options)
        seen.append((value.item(), gradients_of(theirs)))
        return value

    trainer.training_step = looking
    trainer.train()
    ((their_loss, gradients),) = seen
    assert loss == pytest.approx(their_loss, rel=1e-5)
    assert_same(ours, gradients)
    largest = max(gradient.abs().max().item() for gradient in ours.values())
    assert largest > 1e-3


# --- noise --------------------------------------------------------------------------------------


def test_noise_has_the_length_of_the_paper_and_follows_from_its_place_alone() -> None:
    lengths, width, alpha = (6, 40, 82), 256, 5.0
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    noise = noise_for(positions, width, alpha, Place(seed=1, step=2, first=3))
    assert noise.shape == (1, 128, width)
    start = 0
    for length in lengths:
        part = noise[0, start : start + length]
        # its mean square over thousands of numbers is within some percent of what is expected
        expected = reference.noise_length([length], width, alpha)
        assert part.square().sum().item() == pytest.approx(expected, rel=0.1)
        assert part.abs().max() <= alpha / np.sqrt(length * width)
        start += length
    again = noise_for(positions.repeat(2, 1), width, alpha, Place(seed=1, step=2, first=2))
    assert torch.equal(again[1], noise[0]), "the fourth block, in whatever batch it stands"
    others = [Place(seed=1, step=3, first=3), Place(seed=2, step=2, first=3)]
    for place in others:
        assert not torch.equal(noise_for(positions, width, alpha, place), noise)


def test_noise_changes_a_step_and_never_an_evaluation(model: Path, chats: Path) -> None:
    blocks = pack(conversations(model, chats), 256)
    costs, gradients = [], []
    for neftune in (0.0, 5.0):
        settings = SupervisedSettings(batch_size=len(blocks), block_length=256, neftune=neftune)
        gradients.append(our_step(model, blocks, settings)[0])
        one = prepared(model, settings)
        one.train()
        with accelerating(settings, Path()) as accelerator:
            module = accelerator.prepare(SupervisedStep(one, settings))
            costs += [held_out_cost(module, blocks, settings, accelerator) for _ in range(2)]
        assert module.training
    assert len(set(costs)) == 1
    name = next(iter(gradients[0]))
    assert not torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-3)
    expected = reference.loss(prepared(model, SupervisedSettings()), conversations(model, chats))
    assert costs[0][0] == pytest.approx(expected.item(), rel=1e-5)
