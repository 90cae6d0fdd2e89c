"""How far a student's predictions are from its teacher's, and which way is downhill.

The loss is a divergence of next-token distributions, by default the Kullback-Leibler divergence
KL(teacher || student): the nats that are lost by coding what the teacher says with the student's
probabilities. It is averaged over kept positions only. ``forward_kl`` is the definition, for
logits that are there already. ``head_loss`` is what the trainer uses: it starts from hidden states
and output heads, makes logits a few rows at a time and finishes their gradient before it makes
the next, so that neither model's logits are ever held for a whole batch.

B is batch, T positions, N kept positions, n rows of one chunk, V vocabulary, D width, r the rank of
an adapter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mistill.errors import VocabularyError
from mistill.loss.divergences import FORWARD_KL, Divergence
from mistill.loss.heads import Head, as_head, compute_dtype, multiply, soften
from mistill.loss.targets import DenseTargets, TeacherTargets

_MIB = 2**20


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
        divergence: Sum of the divergences of the positions, times temperature squared; scalar
            float64 without a graph, 0 where only the text itself is learnt.
        cross_entropy: Sum of the student's -log p(next token) over the positions, in nats;
            scalar float64 without a graph, 0 where the cross-entropy has no share in the loss.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor


@dataclass(frozen=True)
class _Recipe:
    """What the loss is made of, but for its tensors."""

    targets: TeacherTargets | None
    next_ids: Tensor
    positions_in_step: int
    divergence: Divergence
    temperature: float
    cross_entropy: float
    memory_mib: float


def head_loss(
    hidden: Tensor,
    head: Head | Tensor,
    targets: TeacherTargets | None,
    next_ids: Tensor,
    *,
    positions_in_step: int,
    divergence: Divergence = FORWARD_KL,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    memory_mib: float = 128.0,
) -> HeadLoss:
    """The distillation loss from hidden states, without ever holding all logits.

    ``loss = ((1 - c) * T^2 * sum D + c * sum CE) / positions_in_step``, the sums over the N
    positions given, T the temperature of the divergence D alone, c the share of the
    cross-entropy. Dividing by the positions of the whole optimizer step, and not by N, makes the
    gradients of several micro-batches add up to the gradient of one large batch, however the
    kept positions are spread over them.

    The gradient is computed in the forward pass, chunk by chunk: both distributions are at hand
    there, and the backward pass has only to scale it.

    Args:
        hidden: The student's last hidden states at the kept positions, shape (N, D).
        head: The student's output head, or its matrix of shape (V, D); may be shared with the
            embedding.
        targets: What the teacher says at the same positions; None where ``cross_entropy`` is 1.
        next_ids: The token that follows each position, shape (N,).
        positions_in_step: Kept positions of the whole optimizer step, over all micro-batches and
            processes.
        divergence: What is lowered; forward KL, unless something else is asked for.
        temperature: Above 0.
        cross_entropy: Share of the cross-entropy with the text itself, 0 to 1.
        memory_mib: Room for chunks of logits; it decides how many rows a chunk has.

    Returns:
        The loss and its parts; exactly 0, with a graph, where N is 0.

    Raises:
        VocabularyError: If the two vocabularies differ in size.
        SettingsError: If the targets do not tell what the divergence needs.
        ValueError: If the teacher speaks of another number of positions.
    """
    head = as_head(head)
    _check_temperature(temperature)
    if cross_entropy < 1:
        if targets is None:
            raise ValueError("without targets the loss can only be the cross-entropy alone")
        _check_sizes(head.vocabulary_size, targets.vocabulary_size)
        targets.require(divergence, temperature)
    target_count = len(hidden) if targets is None else len(targets)
    if not target_count == len(next_ids) == len(hidden):
        raise ValueError(
            f"{len(hidden)} hidden states, {target_count} targets and {len(next_ids)} next ids "
            "should be equally many"
        )
    recipe = _Recipe(
        targets, next_ids, positions_in_step, divergence, temperature, cross_entropy, memory_mib
    )
    low = up = None
    if head.adapter is not None:
        down, up, size = head.adapter
        low = (hidden @ down.t().to(hidden.dtype)) * size
    loss, apart, nll = _HeadLoss.apply(hidden, head.plain, head.bias, low, up, head, recipe)
    return HeadLoss(loss, apart, nll)


class _HeadLoss(torch.autograd.Function):
    """Gradient in the forward pass: see ``head_loss``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        low: Tensor | None,
        up: Tensor | None,
        head: Head,
        recipe: _Recipe,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum the loss and its gradients over chunks of rows."""
        dtype = compute_dtype(hidden, head)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        H, head = hidden.detach().to(dtype), head.frozen(dtype)
        tensors = (hidden, weight, bias, low, up)
        gradients = [
            None
            if tensor is None or not wanted
            else torch.zeros(tensor.shape, dtype=wide, device=tensor.device)
            for tensor, wanted in zip(tensors, ctx.needs_input_grad[: len(tensors)], strict=True)
        ]
        low = None if low is None else low.detach().to(dtype)
        apart = torch.zeros((), dtype=torch.float64, device=H.device)
        nll = torch.zeros_like(apart)
        fused = _fuses(head, recipe, H.device, wide)
        count = _buffer_count(head, recipe, fused)
        for rows, buffers in chunks(
            len(H), head.vocabulary_size, wide, H.device, recipe.memory_mib, count
        ):
            wants = any(gradient is not None for gradient in gradients)
            compute = _fused_chunk if fused else _chunk
            chunk = compute(H, low, head, recipe, rows, buffers, wants)
            apart += chunk.divergence
            nll += chunk.cross_entropy
            if chunk.gradient is not None:
                _spread(chunk.gradient, H, low, head, rows, gradients)

        apart *= recipe.temperature**2
        c = recipe.cross_entropy
        loss = ((1 - c) * apart + c * nll) / recipe.positions_in_step
        ctx.gradients = gradients
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.mark_non_differentiable(apart, nll)
        return loss.to(wide), apart, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass left, in place, and let go of them."""
        if ctx.gradients is None:
            raise RuntimeError("the gradient of head_loss can be taken once; compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(loss_gradient).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


class _Chunk(NamedTuple):
    """Sums over the rows of a chunk, and the gradient of their logits before scale and cap."""

    divergence: Tensor
    cross_entropy: Tensor
    gradient: Tensor | None


def _fuses(head: Head, recipe: _Recipe, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one kernel can do what a chunk's logits go through."""
    return (
        isinstance(recipe.targets, DenseTargets)
        and recipe.divergence.name == "forward_kl"
        and recipe.cross_entropy == 0
        and head.soft_cap is None
        and dtype == torch.float32
        and runs_triton(device)
    )


@cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device.

    Args:
        device: Where the tensors are.

    Returns:
        True on a GPU with Triton installed, and anywhere under Triton's interpreter.
    """
    if find_spec("triton") is None:
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def _buffer_count(head: Head, recipe: _Recipe, fused: bool) -> int:
    """Buffers of (n, V) that a chunk is computed in."""
    if fused:
        return 2
    count = 1 + recipe.divergence.buffers
    if recipe.cross_entropy > 0:
        count += 1
    if head.soft_cap is not None:
        count += 1
    return count


def _chunk(
    H: Tensor,
    low: Tensor | None,
    head: Head,
    recipe: _Recipe,
    rows: slice,
    buffers: list[Tensor],
    wants_gradient: bool,
) -> _Chunk:
    """Loss and gradient of some rows, in buffers that the caller has."""
    T, c, total = recipe.temperature, recipe.cross_entropy, recipe.positions_in_step
    G, *scratch = buffers
    logits = head.logits(H[rows], scratch[0], None if low is None else low[rows])
    capped = scratch.pop().copy_(logits) if head.soft_cap is not None else None
    apart = nll = torch.zeros((), dtype=torch.float64, device=H.device)
    text = None
    if c > 0:
        text = torch.log_softmax(logits, dim=-1, out=scratch.pop())
        picked = recipe.next_ids[rows, None]
        nll = -text.gather(1, picked).double().sum()
    if c < 1:
        assert recipe.targets is not None
        log_q = soften(logits, T, out=G)
        apart = (
            recipe.targets.diverge(
                rows, log_q, recipe.divergence, T, tuple(scratch), gradient=wants_gradient
            )
            .double()
            .sum()
        )
    if not wants_gradient:
        return _Chunk(apart, nll, None)
    if c < 1:
        # d(T^2 D)/d logits = T dD/d(logits / T)
        G.mul_((1 - c) * T / total)
    else:
        G.zero_()
    if text is not None:
        # d CE/d logits = q - onehot, at temperature 1
        G.add_(text.exp_(), alpha=c / total)
        G.scatter_add_(1, picked, torch.full_like(picked, -c / total, dtype=G.dtype))
    if capped is not None and head.soft_cap is not None:
        # d cap * tanh(x / cap) / dx = 1 - (capped / cap)^2
        G.addcmul_(G * capped, capped, value=-1 / head.soft_cap**2)
    if head.scale != 1.0:
        G.mul_(head.scale)
    return _Chunk(apart, nll, G)


def _fused_chunk(
    H: Tensor,
    low: Tensor | None,
    head: Head,
    recipe: _Recipe,
    rows: slice,
    buffers: list[Tensor],
    wants_gradient: bool,
) -> _Chunk:
    """The same for forward KL alone, with everything between logits and gradient in one kernel."""
    from mistill.loss.triton_kernel import forward_kl_rows

    assert isinstance(recipe.targets, DenseTargets)
    G, p_logits = buffers
    head.logits(H[rows], G, None if low is None else low[rows])
    recipe.targets.head.logits(recipe.targets.hidden[rows], out=p_logits)
    T = recipe.temperature
    row = forward_kl_rows(G, p_logits, T, gradient=wants_gradient)
    if wants_gradient:
        G.mul_(T * head.scale / recipe.positions_in_step)
    zero = torch.zeros((), dtype=torch.float64, device=H.device)
    return _Chunk(row.double().sum(), zero, G if wants_gradient else None)


def _spread(
    G: Tensor,
    H: Tensor,
    low: Tensor | None,
    head: Head,
    rows: slice,
    gradients: list[Tensor | None],
) -> None:
    """Add what the logits of some rows say to the gradients of all that they were made from."""
    dH, dW, db, dlow, dup = gradients
    if db is not None:
        db += G.sum(dim=0)
    G = G.to(H.dtype)
    if dH is not None:
        head.pull_back(G, out=dH[rows])
    if dW is not None:
        _add_product(dW, G.t(), H[rows])
    if low is not None and head.adapter is not None:
        if dlow is not None:
            multiply(G, head.adapter[1], out=dlow[rows])
        if dup is not None:
            _add_product(dup, G.t(), low[rows])


def chunks(
    positions: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    memory_mib: float,
    count: int,
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Walk over positions so few at a time that buffers of (n, V) fit in a memory budget.

    Args:
        positions: N; at 0 there is nothing to walk over.
        vocabulary: V.
        dtype: Of the buffers.
        device: Of the buffers.
        memory_mib: Bytes of all buffers together, in MiB; a chunk has one row at least.
        count: How many buffers.

    Yields:
        The rows of a chunk, and ``count`` buffers (n, V) that the next chunk reuses.
    """
    room = int(memory_mib * _MIB / (count * vocabulary * dtype.itemsize))
    n = max(1, min(room, positions))
    buffers = torch.empty((count, n, vocabulary), dtype=dtype, device=device)
    for start in range(0, positions, n):
        rows = slice(start, min(start + n, positions))
        yield rows, list(buffers[:, : rows.stop - start])


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
