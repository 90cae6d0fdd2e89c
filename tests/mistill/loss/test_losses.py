"""The loss against torch.distributions, against plain autograd, and against numbers by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mistill.errors import VocabularyError
from mistill.loss.heads import as_head
from mistill.loss.losses import HeadLoss, chunks, forward_kl, head_loss
from mistill.loss.targets import DenseTargets
from tests.reference import distillation as reference


def logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(hidden: Tensor, head: Tensor) -> DenseTargets:
    return DenseTargets(hidden, as_head(head))


MASK = torch.tensor([[True, False, True, True, False], [False, True, False, False, True]])


# --- forward_kl ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_forward_kl_is_that_of_torch_distributions(temperature: float) -> None:
    student, teacher = logits(0, 2, 5, 61), logits(1, 2, 5, 61)
    ours = forward_kl(student, teacher, MASK, temperature)
    theirs = reference.mean_kl(student, teacher, MASK, temperature)
    assert ours.dtype == torch.float32
    # float32 rows; the mean is taken in float64
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)


def test_forward_kl_of_a_coin_is_the_number_worked_by_hand() -> None:
    teacher = torch.tensor([[[math.log(3.0), 0.0]]])  # 3/4, 1/4
    student = torch.zeros(1, 1, 2)  # 1/2, 1/2
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert forward_kl(student, teacher, mask).item() == pytest.approx(kl, rel=1e-6)
    # at temperature 2 the odds are sqrt(3) to 1, and the result counts four times
    p = math.sqrt(3) / (1 + math.sqrt(3))
    soft = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert forward_kl(student, teacher, mask, 2.0).item() == pytest.approx(soft, rel=1e-6)


def test_the_teacher_is_the_first_argument_of_the_divergence() -> None:
    student, teacher = logits(2, 1, 1, 7), logits(3, 1, 1, 7)
    mask = torch.ones(1, 1, dtype=torch.bool)
    forward, backward = forward_kl(student, teacher, mask), forward_kl(teacher, student, mask)
    assert abs(forward - backward) > 0.1
    torch.testing.assert_close(
        forward.double(), reference.kl_of_position(student[0, 0], teacher[0, 0], 1.0), rtol=1e-6,
        atol=0,
    )  # fmt: skip


def test_what_the_mask_hides_changes_nothing() -> None:
    student, teacher = logits(4, 2, 5, 11).requires_grad_(), logits(5, 2, 5, 11)
    loss = forward_kl(student, teacher, MASK)
    loss.backward()
    assert student.grad is not None
    assert student.grad[~MASK].abs().max() == 0
    assert student.grad[MASK].abs().min() > 0
    other = student.detach().clone()
    other[~MASK] = 1e4
    assert forward_kl(other, teacher, MASK).item() == loss.item()


def test_forward_kl_is_a_mean_per_kept_position_whatever_the_batch_looks_like() -> None:
    student, teacher = logits(6, 1, 3, 9), logits(7, 1, 3, 9)
    once = forward_kl(student, teacher, torch.ones(1, 3, dtype=torch.bool))
    twice = forward_kl(
        student.repeat(2, 1, 1), teacher.repeat(2, 1, 1), torch.ones(2, 3, dtype=torch.bool)
    )
    torch.testing.assert_close(once, twice)


def test_a_model_does_not_differ_from_itself() -> None:
    same = logits(8, 2, 5, 1000, scale=20.0)
    assert 0 <= forward_kl(same, same.clone(), MASK).item() < 1e-6
    assert 0 <= forward_kl(same.bfloat16(), same.bfloat16(), MASK, 3.0).item() < 1e-6


def test_no_gradient_flows_into_the_teacher() -> None:
    student, teacher = logits(9, 2, 5, 11).requires_grad_(), logits(10, 2, 5, 11).requires_grad_()
    forward_kl(student, teacher, MASK).backward()
    assert teacher.grad is None


def test_forward_kl_refuses_what_has_no_meaning() -> None:
    with pytest.raises(VocabularyError, match="student has 7 tokens and the teacher 8"):
        forward_kl(logits(0, 2, 5, 7), logits(0, 2, 5, 8), MASK)
    with pytest.raises(ValueError, match="keeps none"):
        forward_kl(logits(0, 2, 5, 7), logits(0, 2, 5, 7), torch.zeros_like(MASK))
    with pytest.raises(ValueError, match="temperature should be above 0, not 0"):
        forward_kl(logits(0, 2, 5, 7), logits(0, 2, 5, 7), MASK, 0.0)


# --- head_loss ----------------------------------------------------------------------------------

N, V, D, TEACHER_D = 23, 97, 16, 24


def head_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden = logits(20, N, D, scale=1.0).to(dtype)
    head = logits(21, V, D, scale=1.0).to(dtype)
    teacher_hidden = logits(22, N, TEACHER_D, scale=1.0).to(dtype)
    teacher_head = logits(23, V, TEACHER_D, scale=1.0).to(dtype)
    next_ids = torch.randint(V, (N,), generator=torch.Generator().manual_seed(24))
    return hidden, head, teacher_hidden, teacher_head, next_ids


def few_rows(rows: int, dtype: torch.dtype = torch.float32) -> float:
    """Room for so many rows, in MiB."""
    return (rows + 0.5) * 3 * V * dtype.itemsize / 2**20


@pytest.mark.parametrize("rows", [1, 7, N, 10 * N])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_head_loss_and_its_gradients_are_those_of_autograd_over_full_logits(
    rows: int, share: float, temperature: float
) -> None:
    hidden, head, teacher_hidden, teacher_head, next_ids = head_inputs(torch.float64)
    theirs = (hidden.clone().requires_grad_(), head.clone().requires_grad_())
    expected = reference.head_loss(
        *theirs, teacher_hidden, teacher_head, next_ids, 40, temperature, share
    )
    (3 * expected).backward()

    ours = (hidden.clone().requires_grad_(), head.clone().requires_grad_())
    result = head_loss(
        *ours,
        dense(teacher_hidden, teacher_head),
        next_ids,
        positions_in_step=40,
        temperature=temperature,
        cross_entropy=share,
        memory_mib=few_rows(rows, torch.float64),
    )
    (3 * result.loss).backward()
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    for mine, his in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, his.grad, rtol=1e-9, atol=1e-12)


def test_head_loss_in_float32_is_exact_to_rounding() -> None:
    hidden, head, teacher_hidden, teacher_head, next_ids = head_inputs(torch.float32)
    theirs = (hidden.double().requires_grad_(), head.double().requires_grad_())
    expected = reference.head_loss(*theirs, teacher_hidden, teacher_head, next_ids, N)
    expected.backward()
    hidden.requires_grad_(), head.requires_grad_()
    result = head_loss(
        hidden,
        head,
        dense(teacher_hidden, teacher_head),
        next_ids,
        positions_in_step=N,
        memory_mib=few_rows(5),
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for mine, his in zip((hidden, head), theirs, strict=True):
        assert mine.grad is not None
        assert his.grad is not None
        cosine = torch.cosine_similarity(mine.grad.double().flatten(), his.grad.flatten(), dim=0)
        assert cosine > 0.99999
        assert mine.grad.norm().item() == pytest.approx(his.grad.norm().item(), rel=1e-5)


def test_head_loss_agrees_with_forward_kl_on_masked_logits() -> None:
    hidden, head = logits(30, 2, 5, D, scale=1.0), logits(31, V, D, scale=1.0)
    teacher_hidden, teacher_head = logits(32, 2, 5, D, scale=1.0), logits(33, V, D, scale=1.0)
    whole = forward_kl(hidden @ head.t(), teacher_hidden @ teacher_head.t(), MASK, 2.0)
    kept = int(MASK.sum())
    part = head_loss(
        hidden[MASK],
        head,
        dense(teacher_hidden[MASK], teacher_head),
        torch.zeros(kept, dtype=torch.int64),
        positions_in_step=kept,
        temperature=2.0,
    )
    torch.testing.assert_close(part.loss, whole, rtol=1e-6, atol=0)
    assert part.divergence.item() / kept == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_shared_head_receives_the_gradients_of_both_its_uses(tied: bool) -> None:
    ids = torch.tensor([3, 5, 3, 8])
    teacher = dense(logits(41, 4, D, scale=1.0).double(), logits(42, V, D, scale=1.0).double())
    gradients = []
    for loss_of in (_ours, _theirs):
        embedding = logits(40, V, D, scale=1.0).double().requires_grad_()
        head = embedding if tied else logits(43, V, D, scale=1.0).double().requires_grad_()
        hidden = torch.tanh(embedding[ids])
        loss_of(hidden, head, teacher, ids).backward()
        gradients.append((embedding.grad, head.grad))
    for mine, his in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-9, atol=1e-13)
    assert (gradients[0][0] is gradients[0][1]) == tied


def _ours(hidden: Tensor, head: Tensor, teacher: DenseTargets, ids: Tensor) -> Tensor:
    return head_loss(hidden, head, teacher, ids, positions_in_step=4, memory_mib=few_rows(1)).loss


def _theirs(hidden: Tensor, head: Tensor, teacher: DenseTargets, ids: Tensor) -> Tensor:
    assert teacher.head.plain is not None
    return reference.head_loss(hidden, head, teacher.hidden, teacher.head.plain, ids, 4)


def test_a_student_that_equals_its_teacher_loses_nothing_and_learns_nothing() -> None:
    hidden, head, *_, next_ids = head_inputs(torch.float32)
    hidden, head = (5 * hidden).requires_grad_(), head.requires_grad_()
    result = head_loss(
        hidden,
        head,
        dense(hidden.detach().clone(), head.detach().clone()),
        next_ids,
        positions_in_step=N,
    )
    result.loss.backward()
    assert abs(result.loss.item()) < 1e-6
    assert head.grad is not None
    assert head.grad.abs().max() < 1e-6


def test_a_micro_batch_without_kept_positions_is_exactly_zero_and_has_a_graph() -> None:
    hidden = torch.randn(4, D, requires_grad=True)
    head = torch.randn(V, D, requires_grad=True)
    result = head_loss(
        hidden[torch.zeros(4, dtype=torch.bool)],
        head,
        dense(torch.randn(0, D), torch.randn(V, D)),
        torch.zeros(0, dtype=torch.int64),
        positions_in_step=10,
        cross_entropy=0.5,
    )
    assert result.loss.item() == 0
    assert result.divergence.item() == 0
    result.loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    assert hidden.grad.abs().max() == 0
    assert head.grad.abs().max() == 0


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_still_do() -> None:
    hidden, head, teacher_hidden, teacher_head, next_ids = head_inputs(torch.float64)
    hidden.requires_grad_()
    result = head_loss(
        hidden, head, dense(teacher_hidden, teacher_head), next_ids, positions_in_step=N
    )
    result.loss.backward()
    theirs = hidden.detach().clone().requires_grad_()
    reference.head_loss(theirs, head, teacher_hidden, teacher_head, next_ids, N).backward()
    assert head.grad is None
    torch.testing.assert_close(hidden.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_half_precision_weights_still_give_sums_in_float32() -> None:
    hidden, head, teacher_hidden, teacher_head, next_ids = head_inputs(torch.bfloat16)
    expected = reference.head_loss(hidden, head, teacher_hidden, teacher_head, next_ids, N)
    hidden.requires_grad_(), head.requires_grad_()
    result = head_loss(
        hidden, head, dense(teacher_hidden, teacher_head), next_ids, positions_in_step=N
    )
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert head.grad is not None
    assert head.grad.dtype == torch.bfloat16


def test_micro_batches_add_up_to_the_batch_however_unequal_they_are() -> None:
    hidden, head, teacher_hidden, teacher_head, next_ids = head_inputs(torch.float64)
    gradients = []
    for cuts in ([0, N], [0, 2, 3, 3, N]):
        weights = head.clone().requires_grad_()
        total = 0.0
        for start, stop in pairwise(cuts):
            rows = slice(start, stop)
            part = head_loss(
                hidden[rows],
                weights,
                dense(teacher_hidden[rows], teacher_head),
                next_ids[rows],
                positions_in_step=N,
            )
            part.loss.backward()
            total += part.loss.item()
        gradients.append((weights.grad, total))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-10, atol=1e-14)
    assert gradients[0][1] == pytest.approx(gradients[1][1], rel=1e-12)


def test_the_gradient_can_be_taken_only_once() -> None:
    hidden, head, teacher_hidden, teacher_head, next_ids = head_inputs(torch.float32)
    result = head_loss(
        hidden.requires_grad_(),
        head,
        dense(teacher_hidden, teacher_head),
        next_ids,
        positions_in_step=N,
    )
    result.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        result.loss.backward()


def test_head_loss_needs_no_gradient() -> None:
    hidden, head, teacher_hidden, teacher_head, next_ids = head_inputs(torch.float32)
    targets = dense(teacher_hidden, teacher_head)
    with torch.no_grad():
        result = head_loss(hidden, head, targets, next_ids, positions_in_step=N)
    assert isinstance(result, HeadLoss)
    expected = reference.head_loss(hidden, head, teacher_hidden, teacher_head, next_ids, N)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_head_loss_refuses_models_that_do_not_fit() -> None:
    hidden, head, teacher_hidden, teacher_head, next_ids = head_inputs(torch.float32)
    with pytest.raises(VocabularyError, match="97 tokens and the teacher 96"):
        head_loss(
            hidden, head, dense(teacher_hidden, teacher_head[:-1]), next_ids,
            positions_in_step=N,
        )  # fmt: skip
    with pytest.raises(ValueError, match="equally many"):
        head_loss(
            hidden, head, dense(teacher_hidden[:-1], teacher_head), next_ids,
            positions_in_step=N,
        )  # fmt: skip


def test_chunks_keep_to_their_memory_and_miss_no_row() -> None:
    seen: list[int] = []
    for rows, buffers in chunks(10, V, torch.float32, torch.device("cpu"), few_rows(3), 3):
        assert all(buffer.shape == (rows.stop - rows.start, V) for buffer in buffers)
        seen += range(10)[rows]
    assert seen == list(range(10))
    first = next(chunks(10, V, torch.float32, torch.device("cpu"), few_rows(3), 3))
    assert first[0] == slice(0, 3)
    tight = next(chunks(10, V, torch.float32, torch.device("cpu"), 1e-9, 3))
    assert tight[0] == slice(0, 1)
