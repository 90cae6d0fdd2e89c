"""What a teacher predicts at some positions: all logits, sampled tokens, or the top-k tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mistill.errors import SettingsError
from mistill.loss.divergences import Divergence
from mistill.loss.heads import Head, soften

if TYPE_CHECKING:
    pass


class TeacherTargets(Protocol):
    """What the teacher says at N kept positions."""

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that the distributions are over, V."""

    def __len__(self) -> int:
        """Number of kept positions, N."""

    def finite(self) -> Tensor:
        """At which positions the teacher predicts with finite numbers, bool, shape (N,)."""

    def require(self, divergence: Divergence, temperature: float) -> None:
        """Refuse a loss that cannot be computed from what is known of the teacher.

        Args:
            divergence: What is to be lowered.
            temperature: Of both distributions.

        Raises:
            SettingsError: If more would have to be known.
        """

    def diverge(
        self,
        rows: slice,
        log_q: Tensor,
        divergence: Divergence,
        temperature: float,
        scratch: tuple[Tensor, ...],
        *,
        gradient: bool,
    ) -> Tensor:
        """How far the student is from the teacher at some of the kept positions.

        Args:
            rows: Which of the N positions; n of them.
            log_q: The student's softened log-probabilities, shape (n, V), float32 or better;
                holds the gradient with respect to its softened logits afterwards, if it is asked
                for.
            divergence: Which divergence.
            temperature: Of both distributions.
            scratch: ``divergence.buffers`` tensors of the shape of ``log_q``; overwritten.
            gradient: Whether to compute it.

        Returns:
            Shape (n,), in nats.
        """


@dataclass(frozen=True)
class DenseTargets:
    """Full distributions, made when they are asked for.

    Attributes:
        hidden: The teacher's last hidden states at the kept positions, shape (N, D).
        head: Its output head, in the dtype of ``hidden``.
    """

    hidden: Tensor
    head: Head

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that the distributions are over, V."""
        return self.head.vocabulary_size

    def __len__(self) -> int:
        """Number of kept positions, N."""
        return self.hidden.shape[0]

    def finite(self) -> Tensor:
        """At which positions the last hidden states are finite; see ``TeacherTargets.finite``."""
        return self.hidden.isfinite().all(dim=-1)

    def require(self, divergence: Divergence, temperature: float) -> None:
        """Refuse nothing: whole distributions serve every loss."""

    def log_probabilities(
        self, rows: slice, temperature: float, out: Tensor, scratch: Tensor
    ) -> Tensor:
        """Project some hidden states through the head and normalise.

        Args:
            rows: Which of the N positions; n of them.
            temperature: Above 0; logits are divided by it.
            out: Shape (n, V), float32 or better; filled with the answer.
            scratch: Shape and dtype of ``out``; overwritten.

        Returns:
            ``out``.
        """
        return soften(self.head.logits(self.hidden[rows], out=scratch), temperature, out=out)

    def diverge(
        self,
        rows: slice,
        log_q: Tensor,
        divergence: Divergence,
        temperature: float,
        scratch: tuple[Tensor, ...],
        *,
        gradient: bool,
    ) -> Tensor:
        """The divergence over the whole vocabulary; see ``TeacherTargets.diverge``."""
        log_p = self.log_probabilities(rows, temperature, out=scratch[0], scratch=scratch[1])
        return divergence.rows(log_p, log_q, scratch[1:], gradient=gradient)


class _PartOfDistributions:
    """What both ways of storing a part of each distribution share.

    Attributes:
        ids: The stored tokens, int64, shape (N, K).
        temperature: Of the distributions.
    """

    ids: Tensor
    temperature: float

    def __len__(self) -> int:
        """Number of kept positions, N."""
        return self.ids.shape[0]

    def require(self, divergence: Divergence, temperature: float) -> None:
        """Refuse a divergence or a temperature that the stored targets cannot serve."""
        if divergence.name != "forward_kl":
            raise SettingsError(
                f"{divergence.name} needs the teacher's whole distribution, and cached targets "
                "hold part of it; choose forward_kl or give the teacher itself"
            )
        if temperature != self.temperature:
            raise SettingsError(
                f"the targets were cached at temperature {self.temperature:g} and the loss asks "
                f"for {temperature:g}; train at {self.temperature:g} or cache them again"
            )


@dataclass(frozen=True)
class SampledTargets(_PartOfDistributions):
    """A random sample of each distribution, with which the gradient of forward KL is unbiased.

    The gradient of KL(p || q) with respect to the logits is q - p, which is linear in p: a sample
    of p in its place gives the same gradient on average (Anshumann et al., 2025, section 3,
    https://arxiv.org/abs/2503.16870). Cut to its most probable tokens instead, p would be
    another distribution.

    Attributes:
        ids: Tokens drawn, int64, shape (N, K); 0 in slots that are not used.
        weights: Their shares of the draws, float32, shape (N, K); rows sum to 1.
        entropy: The teacher's, at ``temperature``, in nats, float32, shape (N,): with it the loss
            is a KL and not a cross-entropy.
        vocabulary_size: V.
        temperature: At which it was drawn.
    """

    ids: Tensor
    weights: Tensor
    entropy: Tensor
    vocabulary_size: int
    temperature: float = 1.0

    def finite(self) -> Tensor:
        """At which positions what is stored is finite; see ``TeacherTargets.finite``."""
        return self.weights.isfinite().all(dim=-1)

    def diverge(
        self,
        rows: slice,
        log_q: Tensor,
        divergence: Divergence,
        temperature: float,
        scratch: tuple[Tensor, ...],
        *,
        gradient: bool,
    ) -> Tensor:
        """An unbiased estimate of forward KL, below 0 by chance where it is small."""
        ids, weights = self.ids[rows], self.weights[rows].to(log_q.dtype)
        row = -(log_q.gather(1, ids) * weights).sum(dim=-1) - self.entropy[rows]
        if gradient:
            log_q.exp_().scatter_add_(1, ids, -weights)
        return row


@dataclass(frozen=True)
class TopKTargets(_PartOfDistributions):
    """The most probable tokens of each distribution, and one bucket for all others.

    The divergence is that of the distributions over K + 1 outcomes, a lower bound of the whole
    one; it is never negative, and nothing is renormalised.

    Attributes:
        ids: The most probable tokens, int64, shape (N, K), no token twice in a row.
        probabilities: Theirs, float32, shape (N, K); sums of rows are at most 1.
        vocabulary_size: V.
        temperature: Of the distributions.
    """

    ids: Tensor
    probabilities: Tensor
    vocabulary_size: int
    temperature: float = 1.0

    def finite(self) -> Tensor:
        """At which positions what is stored is finite; see ``TeacherTargets.finite``."""
        return self.probabilities.isfinite().all(dim=-1)

    def diverge(
        self,
        rows: slice,
        log_q: Tensor,
        divergence: Divergence,
        temperature: float,
        scratch: tuple[Tensor, ...],
        *,
        gradient: bool,
    ) -> Tensor:
        """Forward KL over K + 1 outcomes; see ``TeacherTargets.diverge``."""
        ids, p = self.ids[rows], self.probabilities[rows].to(log_q.dtype)
        picked = log_q.gather(1, ids)
        p_tail = (1 - p.sum(dim=-1)).clamp_(min=0)
        # The student's tail is summed over the tokens outside, not taken as a difference from 1.
        outside = log_q.scatter(1, ids, -torch.inf)
        log_tail = torch.logsumexp(outside, dim=-1)
        row = (torch.xlogy(p, p) - p * picked).sum(dim=-1)
        row += torch.xlogy(p_tail, p_tail) - torch.where(p_tail > 0, p_tail * log_tail, 0.0)
        if gradient:
            # Inside the bucket the student keeps its own proportions.
            share = (p_tail.log() - log_tail).exp_()
            share[p_tail == 0] = 0
            log_q.exp_().sub_(outside.exp_().mul_(share[:, None]))
            log_q.scatter_add_(1, ids, -p)
        return row.clamp_(min=0)
