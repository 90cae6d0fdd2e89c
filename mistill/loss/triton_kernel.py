"""Forward KL and its gradient in one pass over the logits of a few rows, on a GPU.

There the softmaxes, products and sums of a chunk are bound by memory. The least that must move is
both models' logits in and the gradient out, 3 n V floats; PyTorch's operators one by one move
about 18 n V. This kernel reads both logits twice, once for the two normalizers and once for the
rest, and writes the gradient over the student's: 5 n V. ``mistill.loss.divergences`` is its slow
twin, and what everything else runs on.

n is rows of one chunk, V vocabulary.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 16


@triton.jit
def _forward_kl_rows(
    student, teacher, divergence, stride, V, inverse, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    z_student, z_teacher = student + row * stride, teacher + row * stride
    lanes = tl.arange(0, BLOCK)
    highest_q = tl.full((BLOCK,), -float("inf"), tl.float32)
    highest_p = tl.full((BLOCK,), -float("inf"), tl.float32)
    total_q = tl.zeros((BLOCK,), tl.float32)
    total_p = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + lanes < V
        q = tl.load(z_student + start + lanes, mask=inside, other=-1e30) * inverse
        p = tl.load(z_teacher + start + lanes, mask=inside, other=-1e30) * inverse
        higher_q, higher_p = tl.maximum(highest_q, q), tl.maximum(highest_p, p)
        total_q = total_q * tl.exp(highest_q - higher_q) + tl.exp(q - higher_q)
        total_p = total_p * tl.exp(highest_p - higher_p) + tl.exp(p - higher_p)
        highest_q, highest_p = higher_q, higher_p
    top_q, top_p = tl.max(highest_q, axis=0), tl.max(highest_p, axis=0)
    norm_q = top_q + tl.log(tl.sum(total_q * tl.exp(highest_q - top_q), axis=0))
    norm_p = top_p + tl.log(tl.sum(total_p * tl.exp(highest_p - top_p), axis=0))
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + lanes < V
        log_q = tl.load(z_student + start + lanes, mask=inside, other=0.0) * inverse - norm_q
        log_p = tl.load(z_teacher + start + lanes, mask=inside, other=0.0) * inverse - norm_p
        p = tl.exp(log_p)
        sums += tl.where(inside, p * (log_p - log_q), 0.0)
        if GRADIENT:
            tl.store(z_student + start + lanes, tl.exp(log_q) - p, mask=inside)
    tl.store(divergence + row, tl.sum(sums, axis=0))


def forward_kl_rows(
    student: Tensor, teacher: Tensor, temperature: float, *, gradient: bool
) -> Tensor:
    """KL(teacher || student) of each row of logits, and its gradient in place of the student's.

    Args:
        student: Logits, float32, shape (n, V), rows contiguous; hold the gradient with respect
            to the softened logits afterwards, if it is asked for.
        teacher: Logits, of the same shape and strides; left alone.
        temperature: Above 0; divides both.
        gradient: Whether to compute it.

    Returns:
        Shape (n,), float32, in nats, never negative.
    """
    n, V = student.shape
    assert student.stride() == teacher.stride() == (student.stride(0), 1)
    row = torch.empty(n, dtype=torch.float32, device=student.device)
    if n:
        block = min(_BLOCK, triton.next_power_of_2(V))
        _forward_kl_rows[(n,)](
            student,
            teacher,
            row,
            student.stride(0),
            V,
            1 / temperature,
            GRADIENT=gradient,
            BLOCK=block,
            num_warps=_WARPS,
        )
    return row.clamp_(min=0)
