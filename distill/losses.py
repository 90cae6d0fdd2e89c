"""How far a student's predictions are from its teacher's, and which way is downhill.

The loss is the Kullback-Leibler divergence KL(teacher || student) of next-token distributions:
the nats that are lost by coding what the teacher says with the student's probabilities. It is
averaged over kept positions only. ``forward_kl`` is the definition, for logits that are there
already. ``head_loss`` is what the trainer uses: it starts from hidden states and output heads,
makes logits a few rows at a time and finishes their gradient before it makes the next, so that
neither model's logits are ever held for a whole batch.

B is batch, T positions, N kept positions, n rows of one chunk, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.teacher import TeacherTargets, multiply, soften
from mistill.errors import VocabularyError

_MIB = 2**20
_BUFFERS = 3


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float = 1.0
) -> Tensor:
    """Mean KL(teacher || student) per kept position, in nats.

    Both distributions are softened by ``temperature``, and the result is multiplied by its
    square so that gradients keep their size when it changes (Hinton et al., 2015, section 2,
    https://arxiv.org/abs/1503.02531).

    Args:
        student_logits: Shape (B, T, V), any float dtype.
        teacher_logits: Shape (B, T, V); no gradient flows into it.
        mask: Shape (B, T), True where the position counts.
        temperature: Above 0; 1 leaves both distributions as they are.

    Returns:
        Scalar float32 tensor (float64 for float64 logits), 0 when the two models agree at every
        kept position.

    Raises:
        VocabularyError: If the two vocabularies differ in size.
        ValueError: If ``mask`` keeps no position.
    """
    _check_sizes(student_logits.shape[-1], teacher_logits.shape[-1])
    _check_temperature(temperature)
    if not bool(mask.any()):
        raise ValueError(
            f"the mask of {mask.numel()} positions keeps none; a mean needs at least one"
        )
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    q = torch.log_softmax(student_logits[mask].to(dtype) / temperature, dim=-1)
    p = torch.log_softmax(teacher_logits[mask].detach().to(dtype) / temperature, dim=-1)
    per_position = (p.exp() * (p - q)).sum(dim=-1)
    return (per_position.double().mean() * temperature**2).to(dtype)


class HeadLoss(NamedTuple):
    """The loss of some positions, and what it is made of.

    Attributes:
        loss: Scalar with a graph; the positions' share of the step's mean.
        kl: Sum of KL(teacher || student) over the positions, times temperature squared, in nats;
            scalar float64 without a graph.
        cross_entropy: Sum of the student's -log p(next token) over the positions, in nats;
            scalar float64 without a graph, 0 where the cross-entropy has no share in the loss.
    """

    loss: Tensor
    kl: Tensor
    cross_entropy: Tensor


def head_loss(
    hidden: Tensor,
    head: Tensor,
    targets: TeacherTargets,
    next_ids: Tensor,
    *,
    positions_in_step: int,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    memory_mib: float = 128.0,
) -> HeadLoss:
    """The distillation loss from hidden states, without ever holding all logits.

    ``loss = ((1 - c) * T^2 * sum KL + c * sum CE) / positions_in_step``, the sums over the N
    positions given, T the temperature of the KL alone, c the share of the cross-entropy. Dividing
    by the positions of the whole optimizer step, and not by N, makes the gradients of several
    micro-batches add up to the gradient of one large batch, however the kept positions are
    spread over them.

    The gradient is computed in the forward pass, chunk by chunk: softmax(student) minus
    softmax(teacher) is at hand there, and the backward pass has only to scale it.

    Args:
        hidden: The student's last hidden states at the kept positions, shape (N, D).
        head: The student's output head, shape (V, D); may be shared with the embedding.
        targets: What the teacher says at the same positions.
        next_ids: The token that follows each position, shape (N,).
        positions_in_step: Kept positions of the whole optimizer step, over all micro-batches and
            processes.
        temperature: Above 0.
        cross_entropy: Share of the cross-entropy with the text itself, 0 to 1.
        memory_mib: Room for chunks of logits; it decides how many rows a chunk has.

    Returns:
        The loss and its parts; exactly 0, with a graph, where N is 0.

    Raises:
        VocabularyError: If the two vocabularies differ in size.
        ValueError: If the teacher speaks of another number of positions.
    """
    _check_sizes(head.shape[0], targets.vocabulary_size)
    _check_temperature(temperature)
    if not len(targets) == len(next_ids) == len(hidden):
        raise ValueError(
            f"{len(hidden)} hidden states, {len(targets)} targets and {len(next_ids)} next ids "
            "should be equally many"
        )
    loss, kl, nll = _HeadLoss.apply(
        hidden, head, targets, next_ids, positions_in_step, temperature, cross_entropy, memory_mib
    )
    return HeadLoss(loss, kl, nll)


class _HeadLoss(torch.autograd.Function):
    """Gradient in the forward pass: see ``head_loss``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: TeacherTargets,
        next_ids: Tensor,
        positions_in_step: int,
        temperature: float,
        cross_entropy: float,
        memory_mib: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum the loss and its gradients over chunks of rows."""
        H, W = matmul_operands(hidden.detach(), head.detach())
        wide = torch.float64 if H.dtype == torch.float64 else torch.float32
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        dH = torch.empty(H.shape, dtype=wide, device=H.device) if wants_hidden else None
        dW = torch.zeros(W.shape, dtype=wide, device=W.device) if wants_head else None
        kl = torch.zeros((), dtype=torch.float64, device=H.device)
        nll = torch.zeros_like(kl)

        for rows, (a, b, c) in chunks(len(H), W.shape[0], wide, H.device, memory_mib):
            targets.log_probabilities(rows, temperature, out=a, scratch=b)
            log_q = soften(multiply(H[rows], W.t(), out=b), temperature, out=c)
            p = torch.exp(a, out=b)
            kl += a.sub_(log_q).mul_(p).sum(dim=-1).double().sum()
            if dH is None and dW is None and cross_entropy == 0:
                continue
            # d(T^2 KL)/d logits = T (q - p)
            G = log_q.exp_().sub_(p).mul_((1 - cross_entropy) * temperature / positions_in_step)
            if cross_entropy > 0:
                share = cross_entropy / positions_in_step
                log_q = soften(multiply(H[rows], W.t(), out=b), 1.0, out=a)
                picked = next_ids[rows, None]
                nll -= log_q.gather(1, picked).double().sum()
                # d CE/d logits = q - onehot, at temperature 1
                G.add_(log_q.exp_(), alpha=share)
                G.scatter_add_(1, picked, torch.full_like(picked, -share, dtype=wide))
            G = G.to(W.dtype)
            if dH is not None:
                multiply(G, W, out=dH[rows])
            if dW is not None:
                _add_product(dW, G.t(), H[rows])

        kl *= temperature**2
        loss = ((1 - cross_entropy) * kl + cross_entropy * nll) / positions_in_step
        ctx.gradients = dH, dW
        ctx.dtypes = hidden.dtype, head.dtype
        ctx.mark_non_differentiable(kl, nll)
        return loss.to(wide), kl, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass left, in place, and let go of them."""
        if ctx.gradients is None:
            raise RuntimeError("the gradient of head_loss can be taken once; compute it again")
        (dH, dW), ctx.gradients = ctx.gradients, None
        hidden_dtype, head_dtype = ctx.dtypes
        return (
            None if dH is None else dH.mul_(loss_gradient).to(hidden_dtype),
            None if dW is None else dW.mul_(loss_gradient).to(head_dtype),
            *(None,) * 6,
        )


def chunks(
    positions: int, vocabulary: int, dtype: torch.dtype, device: torch.device, memory_mib: float
) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor]]]:
    """Walk over positions so few at a time that three (n, V) buffers fit in a memory budget.

    Args:
        positions: N; at 0 there is nothing to walk over.
        vocabulary: V.
        dtype: Of the buffers.
        device: Of the buffers.
        memory_mib: Bytes of the three buffers together, in MiB; a chunk has one row at least.

    Yields:
        The rows of a chunk, and three buffers (n, V) that the next chunk reuses.
    """
    room = int(memory_mib * _MIB / (_BUFFERS * vocabulary * dtype.itemsize))
    n = max(1, min(room, positions))
    buffers = torch.empty((_BUFFERS, n, vocabulary), dtype=dtype, device=device)
    for start in range(0, positions, n):
        rows = slice(start, min(start + n, positions))
        a, b, c = buffers[:, : rows.stop - start]
        yield rows, (a, b, c)


def matmul_operands(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and head in the dtype that their product is computed in.

    Args:
        hidden: Shape (N, D).
        head: Shape (V, D).

    Returns:
        Both in autocast's dtype where it is on, else in the wider of their own.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, head.dtype)
    return hidden.to(dtype), head.to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a matrix product to a sum kept in float32 or better."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += multiply(a, b, out=torch.empty_like(total))


def _check_sizes(student: int, teacher: int) -> None:
    if student != teacher:
        raise VocabularyError(
            f"the student has {student} tokens and the teacher {teacher}; make the student with "
            "distill.new_student so that both share one tokenizer"
        )


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature should be above 0, not {temperature}")
