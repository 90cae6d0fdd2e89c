"""How well a student stands in for its teacher on text that it was not trained on.

Three numbers, each a mean over kept positions: the divergence that training lowers, the
perplexity of the text, which is comparable with any model that shares the tokens, and how often
the two models would write the same next token.

N is kept positions, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.losses import chunks, matmul_operands
from distill.teacher import (
    LiveTeacher,
    TeacherTargets,
    head_weight,
    last_hidden_states,
    multiply,
    soften,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.batches import Batch


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A student judged against its teacher, on held-out text.

    Attributes:
        kl: Mean KL(teacher || student) per kept position at temperature 1, in nats.
        perplexity: exp of the student's mean -log p(next token).
        teacher_perplexity: The same of the teacher.
        agreement: Share of kept positions at which both find the same token most probable.
        positions: Kept positions that the means are over.
    """

    kl: float
    perplexity: float
    teacher_perplexity: float
    agreement: float
    positions: int


@dataclass(frozen=True)
class TokenScores:
    """What both models say at N kept positions.

    Attributes:
        kl: KL(teacher || student) in nats, float32, shape (N,).
        student_nll: The student's -log p(next token) in nats, float32, shape (N,).
        teacher_nll: The teacher's, shape (N,).
        agrees: Whether both find the same token most probable, bool, shape (N,).
    """

    kl: Tensor
    student_nll: Tensor
    teacher_nll: Tensor
    agrees: Tensor


HeldOut = list[tuple["Batch", TeacherTargets]]


def ask_teacher(teacher: LiveTeacher, batches: Iterable[Batch]) -> HeldOut:
    """Run the teacher over held-out text once, for all evaluations to come.

    Args:
        teacher: The running teacher.
        batches: Held-out text.

    Returns:
        Each batch with what the teacher says there.
    """
    return [(batch, teacher.targets(batch.ids, batch.positions, batch.kept)) for batch in batches]


def evaluate(student: PreTrainedModel, held_out: HeldOut, memory_mib: float = 128.0) -> Evaluation:
    """Judge a student on held-out text.

    Args:
        student: A model with its head; its weights are left alone.
        held_out: Text with the teacher's answers; at least one position is kept.
        memory_mib: Room for chunks of logits.

    Returns:
        Means over all kept positions.

    Raises:
        ValueError: If no position is kept.
    """
    was_training = student.training
    student.eval()
    scores = []
    with torch.inference_mode():
        for batch, targets in held_out:
            hidden = last_hidden_states(student, batch.ids, batch.positions)[batch.kept]
            head = head_weight(student)
            scores.append(score_positions(hidden, head, targets, batch.next_ids, memory_mib))
    student.train(was_training)
    return summarize(scores)


def score_positions(
    hidden: Tensor, head: Tensor, targets: TeacherTargets, next_ids: Tensor, memory_mib: float
) -> TokenScores:
    """Compare both models at some positions, without ever holding all logits.

    Args:
        hidden: The student's last hidden states, shape (N, D).
        head: The student's output head, shape (V, D).
        targets: What the teacher says at the same positions.
        next_ids: The token that follows each position, shape (N,).
        memory_mib: Room for chunks of logits.

    Returns:
        One entry per position.
    """
    H, W = matmul_operands(hidden, head)
    parts = []
    for rows, (a, b, c) in chunks(len(H), W.shape[0], torch.float32, H.device, memory_mib):
        log_p = targets.log_probabilities(rows, 1.0, out=a, scratch=b)
        log_q = soften(multiply(H[rows], W.t(), out=b), 1.0, out=c)
        picked = next_ids[rows, None]
        student_nll, teacher_nll = -log_q.gather(1, picked)[:, 0], -log_p.gather(1, picked)[:, 0]
        agrees = log_p.argmax(dim=-1) == log_q.argmax(dim=-1)
        p = torch.exp(log_p, out=b)
        kl = log_p.sub_(log_q).mul_(p).sum(dim=-1)
        parts.append((kl, student_nll, teacher_nll, agrees))
    if not parts:
        nothing = torch.zeros(0, device=hidden.device)
        return TokenScores(nothing, nothing, nothing, nothing.bool())
    return TokenScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def summarize(scores: Iterable[TokenScores]) -> Evaluation:
    """Means over all positions of all batches.

    Args:
        scores: One entry per batch; at least one position in all.

    Returns:
        The means, summed in float64.

    Raises:
        ValueError: If there is no position.
    """
    kl = student_nll = teacher_nll = agreement = 0.0
    positions = 0
    for part in scores:
        kl += part.kl.double().sum().item()
        student_nll += part.student_nll.double().sum().item()
        teacher_nll += part.teacher_nll.double().sum().item()
        agreement += part.agrees.sum().item()
        positions += len(part.kl)
    if positions == 0:
        raise ValueError("there is no position to judge the student on")
    return Evaluation(
        kl=kl / positions,
        perplexity=_exp(student_nll / positions),
        teacher_perplexity=_exp(teacher_nll / positions),
        agreement=agreement / positions,
        positions=positions,
    )


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
