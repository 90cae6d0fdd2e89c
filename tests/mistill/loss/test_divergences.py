"""Every divergence against its definition, and its gradient against autograd, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mistill.loss.divergences import MIXING, NAMES, Divergence
from mistill.loss.heads import as_head
from mistill.loss.losses import head_loss
from mistill.loss.names import DivergenceName
from mistill.loss.targets import DenseTargets
from tests.reference import distillation as reference

ROWS, V, D = 7, 41, 12


def logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def computed(
    divergence: Divergence, student: Tensor, teacher: Tensor, gradient: bool = True
) -> tuple[Tensor, Tensor]:
    log_q = torch.log_softmax(student, dim=-1)
    buffers = tuple(torch.full_like(student, torch.nan) for _ in range(divergence.buffers - 1))
    row = divergence.rows(torch.log_softmax(teacher, dim=-1), log_q, buffers, gradient=gradient)
    return row, log_q


CASES = [(name, 0.5) for name in NAMES] + [(name, share) for name in MIXING for share in (0.1, 0.9)]


@pytest.mark.parametrize(("name", "mixture"), CASES)
def test_a_divergence_and_its_gradient_are_those_of_the_definition(
    name: DivergenceName, mixture: float
) -> None:
    student, teacher = logits(0, ROWS, V).requires_grad_(), logits(1, ROWS, V)
    expected = torch.stack(
        [
            reference.divergence_of_position(q, p, name, mixture)
            for q, p in zip(student, teacher, strict=True)
        ]
    )
    (slope,) = torch.autograd.grad(expected.sum(), student)
    row, gradient = computed(Divergence(name, mixture), student.detach(), teacher)
    torch.testing.assert_close(row, expected.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-13)
    alone, _ = computed(Divergence(name, mixture), student.detach(), teacher, gradient=False)
    torch.testing.assert_close(alone, row, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_at_no_distance_from_itself_and_no_position_is_below_zero(
    name: DivergenceName,
) -> None:
    same = logits(2, 500, V, scale=8.0).float()
    for other in (same, same + 1e-5 * logits(3, 500, V).float(), logits(4, 500, V).float()):
        row, _ = computed(Divergence(name), other, same)
        assert (row >= 0).all()
    row, gradient = computed(Divergence(name), same, same)
    assert row.max() < 1e-6
    assert gradient.abs().max() < 1e-6 or name == "tvd"


@pytest.mark.parametrize("name", NAMES)
def test_distributions_that_share_no_token_give_numbers(name: DivergenceName) -> None:
    student, teacher = torch.zeros(1, 4), torch.zeros(1, 4)
    student[0, 0], teacher[0, 3] = 200.0, 200.0
    row, gradient = computed(Divergence(name), student, teacher)
    assert torch.isfinite(row).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("name", NAMES)
def test_the_head_loss_lowers_what_it_is_asked_to(
    name: DivergenceName, share: float, temperature: float
) -> None:
    hidden, head = logits(5, ROWS, D, scale=1), logits(6, V, D, scale=1)
    teacher_hidden, teacher_head = logits(7, ROWS, D, scale=1), logits(8, V, D, scale=1)
    next_ids = torch.arange(ROWS)
    theirs = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    student_logits = theirs[0] @ theirs[1].t()
    teacher_logits = teacher_hidden @ teacher_head.t()
    apart = sum(
        reference.divergence_of_position(q / temperature, p / temperature, name, 0.3)
        for q, p in zip(student_logits, teacher_logits, strict=True)
    )
    text = torch.nn.functional.cross_entropy(student_logits, next_ids, reduction="sum")
    expected = ((1 - share) * temperature**2 * apart + share * text) / 9
    expected.backward()

    ours = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    result = head_loss(
        *ours,
        DenseTargets(teacher_hidden, as_head(teacher_head)),
        next_ids,
        positions_in_step=9,
        divergence=Divergence(name, 0.3),
        temperature=temperature,
        cross_entropy=share,
        memory_mib=5 * 3 * V * 8 / 2**20,
    )
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-10, atol=0)
    for mine, his in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, his.grad, rtol=1e-8, atol=1e-13)


def test_every_divergence_is_described_where_users_read_of_them() -> None:
    for name in NAMES:
        assert f"``{name}``" in (Divergence.__doc__ or "")
