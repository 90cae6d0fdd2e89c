"""Distillation written out slowly: one position at a time, all logits at once, float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence


def kl_of_position(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of one position by torch.distributions, times temperature squared."""
    teacher = Categorical(logits=teacher_logits.double() / temperature)
    student = Categorical(logits=student_logits.double() / temperature)
    return kl_divergence(teacher, student) * temperature**2


def mean_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float
) -> Tensor:
    """Mean over the positions that the mask keeps."""
    kept = [
        kl_of_position(student_logits[row, column], teacher_logits[row, column], temperature)
        for row in range(mask.shape[0])
        for column in range(mask.shape[1])
        if mask[row, column]
    ]
    return torch.stack(kept).mean()


def head_loss(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    next_ids: Tensor,
    positions_in_step: int,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
) -> Tensor:
    """The trainer's loss by plain autograd over full logits, in float64."""
    student_logits = hidden.double() @ head.double().t()
    teacher_logits = teacher_hidden.double() @ teacher_head.double().t()
    total = student_logits.new_zeros(())
    for student, teacher, picked in zip(student_logits, teacher_logits, next_ids, strict=True):
        kl = kl_of_position(student, teacher, temperature)
        nll = -Categorical(logits=student).log_prob(picked)
        total = total + (1 - cross_entropy) * kl + cross_entropy * nll
    return total / positions_in_step


def kept_positions(mask: list[list[bool]], documents: list[list[int]]) -> list[list[bool]]:
    """Position t counts if the token at t + 1 is to be predicted and continues the document."""
    kept = []
    for tokens, owners in zip(mask, documents, strict=True):
        row = []
        for t in range(len(tokens)):
            has_next = t + 1 < len(tokens)
            row.append(
                has_next and tokens[t + 1] and owners[t + 1] == owners[t] and owners[t + 1] != -1
            )
        kept.append(row)
    return kept


def divergence_of_position(
    student_logits: Tensor, teacher_logits: Tensor, name: str, mixture: float
) -> Tensor:
    """Every divergence by its definition, from probabilities in float64."""
    p = torch.softmax(teacher_logits.double(), dim=-1)
    q = torch.softmax(student_logits.double(), dim=-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return sum((x * torch.log(x / y) for x, y in zip(a, b, strict=True)), p.new_zeros(()))

    b = mixture
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jsd":
        middle = b * p + (1 - b) * q
        return b * kl(p, middle) + (1 - b) * kl(q, middle)
    if name == "skew_kl":
        return kl(p, b * p + (1 - b) * q)
    if name == "skew_reverse_kl":
        return kl(q, b * q + (1 - b) * p)
    assert name == "tvd"
    return (p - q).abs().sum() / 2


def calibration_error(answers: list[tuple[float, bool]], bins: int = 15) -> float:
    """Expected calibration error of (confidence, right or wrong) pairs, bin by bin."""
    error = 0.0
    for place in range(bins):
        low, high = place / bins, (place + 1) / bins
        inside = [
            pair
            for pair in answers
            if low <= pair[0] < high or (place == bins - 1 and pair[0] == 1)
        ]
        if inside:
            sure = sum(confidence for confidence, _ in inside) / len(inside)
            right = sum(is_right for _, is_right in inside) / len(inside)
            error += len(inside) / len(answers) * abs(sure - right)
    return error
