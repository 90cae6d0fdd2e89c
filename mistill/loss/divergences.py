"""How far one distribution is from another, and its gradient: the divergences to choose from.

Each takes the log-probabilities of teacher and student and gives one number per position and the
gradient with respect to the student's (softened) logits, worked out by hand, in the buffers that
it is given. With q = softmax(z) and g = dL/dq that gradient is q * (g - sum(q * g)).

p is the teacher's distribution, q the student's, n rows of one chunk, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from mistill.loss.names import DivergenceName

NAMES: tuple[DivergenceName, ...] = get_args(DivergenceName)
MIXING: tuple[DivergenceName, ...] = ("jsd", "skew_kl", "skew_reverse_kl")


@dataclass(frozen=True)
class Divergence:
    """Which divergence to lower.

    - ``forward_kl``: KL(p || q), the default: the student covers all that the teacher may say.
    - ``reverse_kl``: KL(q || p): the student keeps to what the teacher is sure of (Gu et al.,
      2023, section 2.1, https://arxiv.org/abs/2306.08543).
    - ``jsd``: b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q, b the mixture (Agarwal
      et al., 2023, equation 1, https://arxiv.org/abs/2306.13649).
    - ``skew_kl``: KL(p || b p + (1 - b) q), ``skew_reverse_kl``: KL(q || b q + (1 - b) p) (Ko et
      al., 2024, section 3.1, https://arxiv.org/abs/2402.03898).
    - ``tvd``: half the sum of |p - q| (Wen et al., 2023, https://arxiv.org/abs/2307.15190).

    Attributes:
        name: Which one.
        mixture: b, above 0 and below 1; of no meaning to those without a mixture.
    """

    name: DivergenceName = "forward_kl"
    mixture: float = 0.5

    @property
    def buffers(self) -> int:
        """Tensors of the shape of a chunk's logits that ``rows`` needs beside the student's."""
        return 3 if self.name in MIXING else 2

    def rows(
        self, log_p: Tensor, log_q: Tensor, scratch: tuple[Tensor, ...], *, gradient: bool
    ) -> Tensor:
        """The divergence of each row, and its gradient in place of the student's distribution.

        Args:
            log_p: The teacher's log-probabilities, shape (n, V), float32 or better; overwritten.
            log_q: The student's, of the same shape; holds the gradient with respect to the
                student's logits afterwards, if it is asked for, and nothing of use if not.
            scratch: ``buffers - 1`` tensors of the same shape; overwritten.
            gradient: Whether to compute it.

        Returns:
            Shape (n,), in nats (``tvd``: 0 to 1), never negative.
        """
        row = _ROWS[self.name](log_p, log_q, scratch, self.mixture, gradient)
        # Rounding may leave what is never below zero a hair below it.
        return row.clamp_(min=0)


def _forward_kl(
    log_p: Tensor, log_q: Tensor, scratch: tuple[Tensor, ...], _: float, gradient: bool
) -> Tensor:
    p = torch.exp(log_p, out=scratch[0])
    row = log_p.sub_(log_q).mul_(p).sum(dim=-1)
    if gradient:
        log_q.exp_().sub_(p)
    return row


def _reverse_kl(
    log_p: Tensor, log_q: Tensor, scratch: tuple[Tensor, ...], _: float, gradient: bool
) -> Tensor:
    ratio = torch.sub(log_q, log_p, out=log_p)
    q = log_q.exp_()
    row = torch.mul(ratio, q, out=scratch[0]).sum(dim=-1)
    if gradient:
        q.mul_(ratio.sub_(row[:, None]))
    return row


def _jsd(
    log_p: Tensor, log_q: Tensor, scratch: tuple[Tensor, ...], mixture: float, gradient: bool
) -> Tensor:
    other, log_m = scratch
    _log_mixture(log_p, log_q, mixture, out=log_m)
    p = torch.exp(log_p, out=other)
    row = log_p.sub_(log_m).mul_(p).sum(dim=-1).mul_(mixture)
    ratio = torch.sub(log_q, log_m, out=log_m)
    q = log_q.exp_()
    reverse = torch.mul(ratio, q, out=other).sum(dim=-1)
    if gradient:
        # dL/dq = (1 - b) log(q / m): the mixture's own part cancels.
        q.mul_(ratio.sub_(reverse[:, None])).mul_(1 - mixture)
    return row.add_(reverse, alpha=1 - mixture)


def _skew_kl(
    log_p: Tensor, log_q: Tensor, scratch: tuple[Tensor, ...], mixture: float, gradient: bool
) -> Tensor:
    other, log_m = scratch
    _log_mixture(log_p, log_q, mixture, out=log_m)
    p = torch.exp(log_p, out=other)
    ratio = log_p.sub_(log_m)
    if not gradient:
        return ratio.mul_(p).sum(dim=-1)
    # dL/dq = -(1 - b) p / m
    pull = torch.exp(ratio, out=log_m).mul_(mixture - 1)
    row = ratio.mul_(p).sum(dim=-1)
    _through_softmax(log_q.exp_(), pull, other)
    return row


def _skew_reverse_kl(
    log_p: Tensor, log_q: Tensor, scratch: tuple[Tensor, ...], mixture: float, gradient: bool
) -> Tensor:
    other, log_m = scratch
    _log_mixture(log_q, log_p, mixture, out=log_m)
    ratio = torch.sub(log_q, log_m, out=log_m)
    q = log_q.exp_()
    row = torch.mul(ratio, q, out=other).sum(dim=-1)
    if gradient:
        # dL/dq = log(q / m) + 1 - b q / m
        pull = torch.exp(ratio, out=log_p).mul_(-mixture).add_(ratio)
        _through_softmax(q, pull, other)
    return row


def _tvd(
    log_p: Tensor, log_q: Tensor, scratch: tuple[Tensor, ...], _: float, gradient: bool
) -> Tensor:
    q = log_q.exp_()
    difference = torch.sub(q, log_p.exp_(), out=log_p)
    row = torch.abs(difference, out=scratch[0]).sum(dim=-1).mul_(0.5)
    if gradient:
        _through_softmax(q, difference.sign_().mul_(0.5), scratch[0])
    return row


FORWARD_KL = Divergence()

_ROWS = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
}


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float, out: Tensor) -> Tensor:
    """log(share * a + (1 - share) * b), without ever leaving logarithms."""
    shift = math.log(share) - math.log1p(-share)
    torch.logaddexp(log_a.add_(shift), log_b, out=out).add_(math.log1p(-share))
    log_a.sub_(shift)
    return out


def _through_softmax(q: Tensor, pull: Tensor, scratch: Tensor) -> None:
    """Turn dL/dq, in ``pull``, into dL/dlogits, in place of ``q``."""
    mean = torch.mul(q, pull, out=scratch).sum(dim=-1, keepdim=True)
    q.mul_(pull.sub_(mean))
