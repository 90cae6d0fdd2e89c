"""One optimizer step: packing, gradients, and how they are added up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distill.settings import TrainSettings
from distill.teacher.teacher import LiveTeacher
from distill.training.step import DistillationStep, accumulate_gradients
from mistill.errors import SettingsError
from mistill.loss.batches import last_hidden_states, make_batch
from mistill.loss.heads import read_head
from mistill.loss.losses import forward_kl
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import TokenBlocks
from mistill.training.optimizers import make_optimizer
from mistill.training.processes import accelerating
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def make_blocks(seed: int = 0, rows: int = 4, length: int = 24) -> TokenBlocks:
    """Blocks of several documents, with padding, and with very different numbers of kept tokens."""
    generator = np.random.default_rng(seed)
    documents = np.sort(generator.integers(0, 3, (rows, length)), axis=1).astype(np.int32)
    documents[-1, length // 2 :] = -1
    mask = generator.random((rows, length)) < np.linspace(0.05, 0.95, rows)[:, None]
    mask[0, :] = False
    mask[0, 3] = documents[0, 3] == documents[0, 2]
    return TokenBlocks(
        ids=generator.integers(5, 300, (rows, length)), mask=mask, documents=documents
    )


# --- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"model_type": "mistral", "sliding_window": 4}, {"model_type": "mistral"},
     {"model_type": "llama"}],
)  # fmt: skip
def test_packed_documents_are_read_as_if_each_stood_alone(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = load_pytorch(tiny_model(tmp_path / "model", **options))
    blocks = make_blocks(rows=3)
    batch = make_batch(blocks, CPU)
    with torch.inference_mode():
        weight = read_head(model).plain
        assert weight is not None
        packed = last_hidden_states(model, batch.ids, batch.positions) @ weight.t()
        for row in range(3):
            for document in set(blocks.documents[row].tolist()) - {-1}:
                columns = np.flatnonzero(blocks.documents[row] == document)
                alone = model(torch.tensor(blocks.ids[row, columns][None])).logits[0]
                # float32 sums in another order
                torch.testing.assert_close(packed[row, columns], alone, rtol=1e-4, atol=1e-4)


def test_a_batch_pairs_each_kept_position_with_the_token_after_it() -> None:
    blocks = TokenBlocks(
        ids=np.array([[10, 11, 12, 13, 14, 15]]),
        mask=np.array([[False, True, True, False, True, False]]),
        documents=np.array([[0, 0, 0, 1, 1, -1]], dtype=np.int32),
    )
    batch = make_batch(blocks, CPU)
    assert batch.kept.tolist() == [[True, True, False, True, False, False]]
    assert batch.next_ids.tolist() == [11, 12, 14]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]]


# --- one optimizer step -------------------------------------------------------------------------


def step_gradients(
    student: Path, teacher: Path, blocks: TokenBlocks, **options: Any
) -> tuple[dict[str, torch.Tensor], list[float]]:
    settings = TrainSettings(batch_size=len(blocks), **options)
    model = load_pytorch(student)
    live = LiveTeacher(load_pytorch(teacher))
    with accelerating(settings, Path()) as accelerator:
        module = accelerator.prepare(DistillationStep(model, settings))
        sums = accumulate_gradients(module, live, blocks, settings, accelerator)
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    name = "kl" if settings.divergence == "forward_kl" else settings.divergence
    return gradients, [sums.loss, sums.parts.get(name, 0.0), sums.parts.get("cross_entropy", 0.0)]


@pytest.mark.parametrize("tied", [False, True])
def test_one_step_has_the_gradient_of_the_definition(
    tmp_path: Path, teacher: Path, tied: bool
) -> None:
    student = tiny_model(tmp_path / "student", seed=7, tie_word_embeddings=tied)
    blocks = make_blocks()
    ours, (loss, kl, _) = step_gradients(student, teacher, blocks, temperature=2.0)

    model, large = load_pytorch(student), load_pytorch(teacher)
    batch = make_batch(blocks, CPU)
    # with a cache, transformers would let attention cross from document to document
    student_logits = model(batch.ids, position_ids=batch.positions, use_cache=False).logits
    teacher_logits = large(batch.ids, position_ids=batch.positions, use_cache=False).logits
    expected = forward_kl(student_logits, teacher_logits, batch.kept, 2.0)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert kl == pytest.approx(expected.item(), rel=1e-5)
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_four_micro_batches_of_one_have_the_gradient_of_two_of_two(
    model: Path, teacher: Path
) -> None:
    blocks = make_blocks()
    kept = blocks.kept.sum(axis=1)
    assert kept.min() <= 1, "the micro-batches should be very unequal"
    assert kept.max() > 10
    options = {"cross_entropy": 0.2}
    whole, whole_sums = step_gradients(model, teacher, blocks, micro_batch_size=4, **options)
    for size in (1, 2):
        parts, sums = step_gradients(model, teacher, blocks, micro_batch_size=size, **options)
        assert sums == pytest.approx(whole_sums, rel=1e-5)
        for name, gradient in whole.items():
            # float32 sums in another order
            torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_padding_and_neighbours_change_no_gradient(model: Path, teacher: Path) -> None:
    generator = np.random.default_rng(3)
    first, second = generator.integers(5, 300, 10), generator.integers(5, 300, 14)

    def blocks_of(*rows: list[tuple[Any, int]], length: int) -> TokenBlocks:
        ids = np.zeros((len(rows), length), np.int64)
        documents = np.full((len(rows), length), -1, np.int32)
        for row, pieces in enumerate(rows):
            column = 0
            for piece, number in pieces:
                ids[row, column : column + len(piece)] = piece
                documents[row, column : column + len(piece)] = number
                column += len(piece)
        mask = documents >= 0
        mask[:, 0] = False
        return TokenBlocks(ids, mask, documents)

    packed = blocks_of([(first, 0), (second, 1)], length=24)
    apart = blocks_of([(first, 0)], [(second, 1)], length=30)
    one, one_sums = step_gradients(model, teacher, packed)
    two, two_sums = step_gradients(model, teacher, apart)
    assert one_sums == pytest.approx(two_sums, rel=1e-5)
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_whose_blocks_cannot_be_shared_among_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import accelerate

    state = SimpleNamespace(num_processes=3, device=CPU)
    monkeypatch.setattr(accelerate, "PartialState", lambda **_: state)
    with (
        pytest.raises(SettingsError, match=r"3 processes .* multiple of 3"),
        accelerating(TrainSettings(batch_size=4), Path()),
    ):
        pass


# --- the optimizer ------------------------------------------------------------------------------


def test_only_matrices_decay(tmp_path: Path) -> None:
    student = load_pytorch(tiny_model(tmp_path / "student", tie_word_embeddings=True))
    optimizer = make_optimizer(student, name="adamw", learning_rate=3e-4, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decayed, spared = (
        {names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups
    )
    assert decayed | spared == set(names.values())
    assert all("proj" in name for name in decayed)
    assert "model.embed_tokens.weight" in spared
    assert all("norm" in name or "embed" in name for name in spared)
