"""How well a student stands in for its teacher on text that it was not trained on.

The divergence that training lowers, on average and in the worst hundredth of the positions; the
perplexity of the text, which is comparable with any model that shares the tokens; how often the
two models would write the same next token, and how many of the student's guesses the teacher
would accept; and whether the student is as sure as it should be. All are means over kept
positions.

N is kept positions, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mistill.loss.divergences import FORWARD_KL
from mistill.loss.heads import Head, as_head, compute_dtype, soften
from mistill.loss.losses import chunks
from mistill.loss.targets import DenseTargets, TeacherTargets

if TYPE_CHECKING:
    pass

_CONFIDENCE_BINS = 15


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A student judged against its teacher, on held-out text.

    Attributes:
        kl: Mean KL(teacher || student) per kept position at temperature 1 (or at that of cached
            targets), in nats.
        kl_p99: Its 99th percentile over the positions.
        perplexity: exp of the student's mean -log p(next token).
        teacher_perplexity: The same of the teacher; None where only a part of what it says is
            known, from cached targets.
        agreement: Share of kept positions at which both find the same token most probable; None
            likewise.
        acceptance: Expected share of tokens drawn from the student that the teacher accepts in
            speculative decoding, the mean of sum min(p, q) (Leviathan et al., 2022, section 3.2,
            https://arxiv.org/abs/2211.17192); None likewise.
        calibration_error: Expected calibration error of the student's most probable token
            against the text, over 15 bins of confidence (Guo et al., 2017, section 2,
            https://arxiv.org/abs/1706.04599).
        teacher_calibration_error: The same of the teacher; None likewise.
        positions: Kept positions that the means are over.
    """

    kl: float
    kl_p99: float
    perplexity: float
    teacher_perplexity: float | None
    agreement: float | None
    acceptance: float | None
    calibration_error: float
    teacher_calibration_error: float | None
    positions: int


@dataclass(frozen=True)
class ModelScores:
    """What one model says at N positions of a text.

    Attributes:
        nll: -log p(next token) in nats, float32, shape (N,).
        confidence: Probability of its most probable token, float32, shape (N,).
        correct: Whether that token is the next one, bool, shape (N,).
    """

    nll: Tensor
    confidence: Tensor
    correct: Tensor


@dataclass(frozen=True)
class TokenScores:
    """What both models say at N kept positions.

    Attributes:
        kl: KL(teacher || student) in nats, float32, shape (N,).
        student: Of the student.
        teacher: Of the teacher; None where only a part of what it says is known.
        agrees: Whether both find the same token most probable, bool, shape (N,); None likewise.
        acceptance: sum min(p, q), float32, shape (N,); None likewise.
    """

    kl: Tensor
    student: ModelScores
    teacher: ModelScores | None
    agrees: Tensor | None
    acceptance: Tensor | None


def score_positions(
    hidden: Tensor,
    head: Head | Tensor,
    targets: TeacherTargets,
    next_ids: Tensor,
    memory_mib: float = 128.0,
) -> list[TokenScores]:
    """Compare both models at some positions, without ever holding all logits.

    Args:
        hidden: The student's last hidden states, shape (N, D).
        head: The student's output head, or its matrix of shape (V, D).
        targets: What the teacher says at the same positions.
        next_ids: The token that follows each position, shape (N,).
        memory_mib: Room for chunks of logits.

    Returns:
        An entry per chunk of positions, in order.
    """
    head = as_head(head)
    dtype = compute_dtype(hidden, head)
    H, head = hidden.to(dtype), head.frozen(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    token_scores = []
    for rows, (a, b, c) in chunks(len(H), head.vocabulary_size, wide, H.device, memory_mib, 3):
        log_q = soften(head.logits(H[rows], out=b), 1.0, out=c)
        picked = next_ids[rows, None]
        student, first = _model_scores(log_q, picked)
        if not isinstance(targets, DenseTargets):
            temperature = getattr(targets, "temperature", 1.0)
            if temperature != 1.0:
                torch.log_softmax(log_q / temperature, dim=-1, out=c)
            kl = targets.diverge(rows, c, FORWARD_KL, temperature, (a, b), gradient=False)
            token_scores.append(TokenScores(kl, student, None, None, None))
            continue
        log_p = targets.log_probabilities(rows, 1.0, out=a, scratch=b)
        teacher, second = _model_scores(log_p, picked)
        acceptance = torch.minimum(log_p, log_q, out=b).exp_().sum(dim=-1)
        kl = FORWARD_KL.rows(log_p, log_q, (b,), gradient=False)
        token_scores.append(TokenScores(kl, student, teacher, first == second, acceptance))
    return token_scores


def _model_scores(log_probabilities: Tensor, picked: Tensor) -> tuple[ModelScores, Tensor]:
    """What a model says of the next tokens, shape (n, 1), and its most probable tokens."""
    highest, first = log_probabilities.max(dim=-1)
    nll = -log_probabilities.gather(1, picked)[:, 0]
    return ModelScores(nll, highest.exp(), first == picked[:, 0]), first


def summarize(scores: Sequence[TokenScores]) -> Evaluation:
    """Means over all positions of all chunks.

    Args:
        scores: At least one position in all.

    Returns:
        The means, summed in float64.

    Raises:
        ValueError: If there is no position.
    """
    if not scores:
        raise ValueError("there is no position to judge the student on")
    kl = torch.cat([part.kl for part in scores]).double()
    students = [part.student for part in scores]
    teachers = [part.teacher for part in scores if part.teacher is not None]
    agrees = [part.agrees for part in scores if part.agrees is not None]
    accepted = [part.acceptance for part in scores if part.acceptance is not None]
    return Evaluation(
        kl=kl.mean().item(),
        kl_p99=percentile(kl, 0.99),
        perplexity=_perplexity(students),
        teacher_perplexity=_perplexity(teachers) if teachers else None,
        agreement=torch.cat(agrees).double().mean().item() if agrees else None,
        acceptance=torch.cat(accepted).double().mean().item() if accepted else None,
        calibration_error=_calibration(students),
        teacher_calibration_error=_calibration(teachers) if teachers else None,
        positions=len(kl),
    )


def percentile(values: Tensor, share: float) -> float:
    """The value that a share of all values do not exceed.

    Args:
        values: Shape (N,), N at least 1.
        share: 0 to 1.

    Returns:
        One of the values.
    """
    return float(values.kthvalue(max(1, math.ceil(share * len(values)))).values)


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """How far a model's confidence is from how often it is right.

    Positions are sorted into equally wide bins of confidence; the error is the mean over
    positions of the distance between a bin's mean confidence and its share of right answers.

    Args:
        confidence: Probability of the most probable token, shape (N,).
        correct: Whether it is the next one, bool, shape (N,).

    Returns:
        0 to 1.
    """
    bins = _CONFIDENCE_BINS
    places = (confidence * bins).long().clamp_(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, places, confidence.double() - correct.double())
    return float(gap.abs().sum() / len(confidence))


def _calibration(parts: Sequence[ModelScores]) -> float:
    confidence = torch.cat([part.confidence for part in parts])
    return calibration_error(confidence, torch.cat([part.correct for part in parts]))


def _perplexity(parts: Sequence[ModelScores]) -> float:
    return _exp(torch.cat([part.nll for part in parts]).double().mean().item())


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
