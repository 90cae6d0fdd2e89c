"""The traps of knowledge distillation, as checks that any loss can be put to: who passes what.

    python -m benchmarks.suite.conformance --rivals-python PATH

Every check is a question with an answer that can be worked out in float64, on a fixture that
tells the right answer from the mistake it is named for. A loss that cannot be asked the question
gets "n/a", never "pass". Rivals live in an environment of their own (trl==1.16.0 and
liger-kernel==0.8.5, the latter installed without its dependencies), whose Python is named;
without it only mistill and formulas written here are put to the checks. The last line is one JSON
document; before it comes a table.

B is batch, T positions, V vocabulary, D width.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.suite.conformance_losses import (
    ELSEWHERE,
    HERE,
    Adapter,
    Answer,
    Case,
    Side,
    answer,
    truth,
    with_side,
)
from benchmarks.suite.conformance_roads import ROADS, Place, Road, workshop
from mistill.shown import one_line

Status = Literal["pass", "fail", "n/a"]
B, T, V, D, TEACHER_D = 2, 6, 31, 64, 24


class WrongError(Exception):
    """An answer that is not the right one."""


@dataclass(frozen=True)
class Check:
    """A question to a loss.

    Attributes:
        trap: Its number in the list of docs/conformance.md.
        name: In a word or two.
        asks: The question, as what should be so.
        needs: What the loss must offer for the question to make sense; one of several where a
            name holds a bar.
        run: Asks it; returns what was measured, raises WrongError where the answer is wrong.
    """

    trap: int
    name: str
    asks: str
    needs: tuple[str, ...]
    run: Callable[[Adapter], str]


@dataclass(frozen=True)
class Finding:
    """What came of a check.

    Attributes:
        loss: The adapter's name.
        version: Of its package.
        trap: Number of the trap.
        check: Name of the check.
        status: pass, fail, or n/a where the loss cannot be asked.
        detail: What was measured, or why not.
    """

    loss: str
    version: str
    trap: int
    check: str
    status: Status
    detail: str


CHECKS: list[Check] = []


def check(
    trap: int, name: str, asks: str, *needs: str
) -> Callable[[Callable[[Adapter], str]], Callable[[Adapter], str]]:
    """Put a function into the list of checks.

    Args:
        trap: Number of the trap.
        name: In a word or two.
        asks: What should be so.
        *needs: What the loss must offer.

    Returns:
        A decorator.
    """

    def add(run: Callable[[Adapter], str]) -> Callable[[Adapter], str]:
        CHECKS.append(Check(trap, name, asks, needs, run))
        return run

    return add


# --- fixtures -----------------------------------------------------------------------------------


def numbers(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal random numbers, float32."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_case(
    labels: Tensor | None = None,
    *,
    vocabulary: int = V,
    width: int = D,
    scale: float = 0.3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Two models that disagree, on text of which a part counts."""
    if labels is None:
        labels = torch.tensor([[-100, -100, 3, 4, 5, -100], [-100, 7, 8, -100, -100, 9]])
    rows, columns = labels.shape
    ids = torch.where(labels == -100, 1, labels)
    student = Side(
        numbers(seed, rows, columns, width).to(dtype),
        numbers(seed + 1, vocabulary, width, scale=scale).to(dtype),
    )
    teacher = Side(
        numbers(seed + 2, rows, columns, TEACHER_D).to(dtype),
        numbers(seed + 3, vocabulary, TEACHER_D, scale=scale).to(dtype),
    )
    return Case(student, teacher, labels, ids, torch.ones_like(labels, dtype=torch.bool))


def same_models(case: Case) -> Case:
    """The same case with a student that equals its teacher."""
    return replace(case, student=replace(case.teacher))


def near_models(case: Case, distance: float, seed: int = 9) -> Case:
    """The same case with a student that nearly equals its teacher."""
    noise = numbers(seed, *case.teacher.hidden.shape, scale=distance)
    hidden = (case.teacher.hidden.float() + noise).to(case.teacher.hidden.dtype)
    return replace(case, student=replace(case.teacher, hidden=hidden))


def close(actual: float, right: float, relative: float) -> str:
    """Complain unless a loss is the right one."""
    error = abs(actual - right) / max(abs(right), 1e-30)
    if not error <= relative:
        raise WrongError(f"the loss is {actual:.6g} and should be {right:.6g}")
    return f"relative error {error:.1g}"


def agree(actual: Answer, right: Answer, relative: float = 1e-4) -> str:
    """Complain unless the loss and both gradients are the right ones."""
    complaint = close(actual.loss, right.loss, relative)
    pairs = [("hidden states", actual.hidden, right.hidden)]
    if actual.weight is not None and right.weight is not None:
        pairs.append(("head", actual.weight, right.weight))
    for name, mine, his in pairs:
        gap = float((mine - his).norm() / his.norm())
        if not gap <= 10 * relative:
            raise WrongError(f"the gradient of the {name} is off by {gap:.2g} of its length")
    return complaint


def expected(adapter: Adapter, case: Case) -> Answer:
    """What a loss should come to, in its own view of what the loss is."""
    return truth(case, adapter.view)


def alone(adapter: Adapter, case: Case) -> list[float]:
    """The loss of each token by itself."""
    actual = []
    for row, column in (case.labels != -100).nonzero().tolist():
        labels = torch.full_like(case.labels, -100)
        labels[row, column] = case.labels[row, column]
        actual.append(answer(adapter, replace(case, labels=labels)).loss)
    return actual


def padded(case: Case, extra: int) -> Case:
    """The same text with padding after it, in which both models say something loud."""

    def longer(side: Side) -> Side:
        rows, _, width = side.hidden.shape
        noise = numbers(30, rows, extra, width, scale=3.0).to(side.hidden.dtype)
        return replace(side, hidden=torch.cat([side.hidden, noise], dim=1))

    def more(tensor: Tensor, value: Any) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, extra), value=value)

    return replace(
        case,
        student=longer(case.student),
        teacher=longer(case.teacher),
        labels=more(case.labels, -100),
        ids=more(case.ids, 0),
        present=more(case.present, value=False),
    )


# --- checks of the loss -------------------------------------------------------------------------


@check(1, "temperature counts", "the temperature softens both distributions", "temperature")
def temperature_counts(adapter: Adapter) -> str:
    """Right up to a factor of T^2, which the next check asks for."""
    case = replace(make_case(), temperature=3.0)
    actual, view = answer(adapter, case).loss, adapter.view
    with_square, without = truth(case, view).loss, truth(case, view, squared=False).loss
    unsoftened = truth(replace(case, temperature=1.0), view).loss
    if abs(actual - unsoftened) < 1e-3 * unsoftened:
        raise WrongError(f"at temperature 3 the loss is {actual:.4g}, that of temperature 1")
    nearer = min(with_square, without, key=lambda value: abs(actual - value))
    return close(actual, nearer, 1e-4)


@check(1, "times T^2", "its square keeps the size of the gradients", "temperature")
def temperature_squared(adapter: Adapter) -> str:
    """Hinton et al., 2015, section 2."""
    case = replace(make_case(), temperature=3.0)
    return agree(answer(adapter, case), expected(adapter, case))


@check(2, "no hidden cross-entropy", "a student that equals its teacher is left as it is")
def no_cross_entropy(adapter: Adapter) -> str:
    """The text's own loss would go on pulling."""
    actual = answer(adapter, same_models(make_case()))
    pull = float(actual.hidden.abs().max())
    if not pull < 1e-5:
        raise WrongError(f"the student equals its teacher and is pulled by {pull:.2g}")
    return f"largest gradient {pull:.1g}"


@check(3, "ignored labels", "what is labelled -100 changes neither loss nor gradient")
def ignored_labels(adapter: Adapter) -> str:
    """Both models say something else there."""
    case = make_case()
    hidden, other = case.student.hidden.clone(), case.teacher.hidden.clone()
    loud = case.labels == -100 if adapter.view.unshifted else ~case.kept
    hidden[loud] += 5
    other[loud] -= 5
    changed = with_side(with_side(case, "student", hidden=hidden), "teacher", hidden=other)
    before, after = answer(adapter, case), answer(adapter, changed)
    complaint = close(after.loss, before.loss, 1e-6)
    pull = float(after.hidden[loud].abs().max())
    if pull > 0:
        raise WrongError(f"an ignored position gets a gradient of {pull:.2g}")
    return complaint


@check(4, "padding", "padding changes nothing")
def padding(adapter: Adapter) -> str:
    """Four positions after the text, labelled -100, with no attention."""
    case = make_case()
    before, after = answer(adapter, case), answer(adapter, padded(case, 4))
    cut = replace(after, hidden=after.hidden[:, :T])
    rest = float(after.hidden[:, T:].abs().max())
    if rest > 0:
        raise WrongError(f"padding gets a gradient of {rest:.2g}")
    return agree(cut, before, 1e-6)


@check(5, "shift", "of labels [-100, 5, 2] the first two positions count", "shift")
def shift(adapter: Adapter) -> str:
    """Without the shift the last two would."""
    case = make_case(torch.tensor([[-100, 5, 2]]))
    actual = answer(adapter, case)
    counted = (actual.hidden.abs().amax(dim=-1) > 0)[0].tolist()
    if counted != [True, True, False]:
        places = [place for place, counts in enumerate(counted) if counts]
        raise WrongError(f"positions {places} count, not [0, 1]")
    return agree(actual, truth(case))


@check(6, "mean per token", "the loss is a mean per kept token, in nats")
def mean_per_token(adapter: Adapter) -> str:
    """Not per row, nor per number of the vocabulary; the shift does not matter here."""
    labels = torch.arange(3, 3 + B * T).reshape(B, T)
    labels[:, 0] = -100
    case = make_case(labels)
    return close(answer(adapter, case).loss, expected(adapter, case).loss, 1e-4)


@check(7, "micro-batches", "micro-batches of 1 and 9 tokens add up to the batch of 10", "in_step")
def micro_batches(adapter: Adapter) -> str:
    """A mean of the micro-batches' means would count one token as much as nine."""
    labels = torch.full((2, 10), -100)
    labels[0, 4] = 3
    labels[1, 1:] = torch.arange(3, 12)
    case = make_case(labels)
    whole = answer(adapter, case)
    loss, gradient = 0.0, torch.zeros_like(whole.hidden)
    for row in range(2):
        rows = slice(row, row + 1)
        part = replace(
            case,
            student=replace(case.student, hidden=case.student.hidden[rows]),
            teacher=replace(case.teacher, hidden=case.teacher.hidden[rows]),
            labels=labels[rows],
            ids=case.ids[rows],
            present=case.present[rows],
            in_step=case.positions_in_step,
        )
        actual = answer(adapter, part)
        share = 0.5 if adapter.mean_of_means else 1.0
        loss += share * actual.loss
        gradient[rows] = share * actual.hidden
    return agree(Answer(loss, gradient, None), whole, 1e-5)


@check(8, "one step, cut anyhow", "a whole step is the same in one micro-batch or four",
       "whole_step")  # fmt: skip
def one_step_cut_anyhow(adapter: Adapter) -> str:
    """With the trainer itself: real models, real text, its own accumulation."""
    with workshop() as place:
        student, teacher = place.models()
        conversations = place.conversations()
        whole, parts = (
            ROADS[adapter.name].whole_step(student, teacher, conversations, size, place.folder)
            for size in (4, 1)
        )
        gap = float((parts - whole).norm() / whole.norm())
        if not gap < 1e-3:
            raise WrongError(f"the step differs by {gap:.2g} of its length")
        return f"differs by {gap:.1g} of its length"


@check(11, "logit scale", "a scale of the logits counts, or is refused", "scale")
def logit_scale(adapter: Adapter) -> str:
    """Of both models, each its own."""
    case = with_side(with_side(make_case(), "student", scale=0.25), "teacher", scale=0.5)
    return agree_or_refuse(adapter, case)


@check(11, "soft cap", "a cap of the logits counts, or is refused", "soft_cap")
def soft_cap(adapter: Adapter) -> str:
    """Of both models, each its own."""
    case = with_side(with_side(make_case(), "student", soft_cap=2.0), "teacher", soft_cap=3.0)
    return agree_or_refuse(adapter, case)


@check(11, "bias", "a bias of the head counts, or is refused", "bias")
def bias(adapter: Adapter) -> str:
    """Of both models, each its own."""
    case = with_side(make_case(), "student", bias=numbers(40, V))
    return agree_or_refuse(adapter, with_side(case, "teacher", bias=numbers(41, V)))


def agree_or_refuse(adapter: Adapter, case: Case) -> str:
    """Right, or no answer at all."""
    try:
        actual = answer(adapter, case)
    except Exception as error:  # whatever it raises, it gives no wrong answer
        return f"refused: {_type_and_reason(error)}"
    return agree(actual, expected(adapter, case))


@check(12, "LoRA on the head", "an adapter of the head counts, or is refused", "lora|folders")
def lora_head(adapter: Adapter) -> str:
    """``weight`` of such a head is the matrix without the adapter."""
    if "lora" in adapter.can:
        return agree_or_refuse(adapter, with_side(make_case(), "student", kind="lora"))
    with workshop() as place:
        road = ROADS[adapter.name]
        student, teacher = place.models()
        road.open(student, teacher, place.folder)
        return refuses(lambda: road.open(student, teacher, place.folder, lora_head=True))


def _refuses_models(adapter: Adapter, place: Place, **changes: Any) -> str:
    """Complain unless models are refused that differ from those that are taken."""
    road = ROADS[adapter.name]
    road.open(*place.models(), place.folder)
    return refuses(lambda: road.open(*place.models(**changes), place.folder))


@check(12, "4-bit head", "a head in four bits is decoded, or refused", "nf4")
def four_bit_head(adapter: Adapter) -> str:
    """``weight`` of such a head is packed codes."""
    case = make_case(vocabulary=64)
    hidden, weight = numbers(50, B, T, D), numbers(51, 64, D, scale=0.3)
    teacher = replace(case.teacher, hidden=hidden, weight=weight, kind="nf4")
    return agree_or_refuse(adapter, replace(case, teacher=teacher))


@check(13, "nothing to learn", "a micro-batch without a kept token is 0, with a graph")
def nothing_to_learn(adapter: Adapter) -> str:
    """0 / 0, or a zero that DDP waits for in vain."""
    case = replace(make_case(torch.full((B, T), -100)), in_step=10)
    actual = answer(adapter, case)
    if actual.loss != 0:
        raise WrongError(f"the loss is {actual.loss}")
    if not actual.graph:
        raise WrongError("the loss is 0 and has no graph")
    pull = actual.hidden.abs().max()
    if not pull == 0:
        raise WrongError(f"the gradient is {pull:.2g}")
    return "0, with a graph"


def _sharp(adapter: Adapter, dtype: torch.dtype, scale: float, relative: float) -> str:
    case = make_case(dtype=dtype, scale=scale)
    actual = answer(adapter, case)
    if not (math.isfinite(actual.loss) and bool(actual.hidden.isfinite().all())):
        raise WrongError("the loss or a gradient is not finite")
    return close(actual.loss, expected(adapter, case).loss, relative)


@check(14, "sharp, float32", "logits of hundreds give finite numbers in float32")
def sharp_float32(adapter: Adapter) -> str:
    """log(softmax(x)) is log(0) there."""
    return _sharp(adapter, torch.float32, 30.0, 1e-4)


@check(14, "sharp, bfloat16", "logits of hundreds give finite numbers in bfloat16")
def sharp_bfloat16(adapter: Adapter) -> str:
    """Finite is enough: bfloat16's own rounding is asked about elsewhere."""
    return _sharp(adapter, torch.bfloat16, 30.0, 0.05)


def _bfloat16_case() -> Case:
    labels = torch.full((1, 65), 5)
    labels[0, 0] = -100
    return near_models(make_case(labels, vocabulary=2000, dtype=torch.bfloat16), 0.15)


@check(15, "bfloat16, within 0.1 %", "from bfloat16 states the loss is that of float64", "kl")
def bfloat16_exact(adapter: Adapter) -> str:
    """Of the same rounded numbers: only what the loss itself rounds is counted."""
    case = _bfloat16_case()
    return close(answer(adapter, case).loss, expected(adapter, case).loss, 1e-3)


@check(15, "bfloat16, none below 0", "no token's divergence is below zero", "kl")
def bfloat16_positive(adapter: Adapter) -> str:
    """The logits of two models that nearly agree."""
    case = near_models(_bfloat16_case(), 0.02)
    return _none_below(alone(adapter, case), 1e-6)


def _none_below(losses: Sequence[float], slack: float) -> str:
    below = [loss for loss in losses if not loss >= -slack]
    if below:
        raise WrongError(f"{len(below)} of {len(losses)} tokens are below zero, down to "
                         f"{min(below):.2g}")  # fmt: skip
    return f"lowest {min(losses):.1g}"


@check(16, "sums of 8 million", "float32 sums over 8 million terms are exact to 1e-6")
def large_sums(adapter: Adapter) -> str:
    """256 positions by 32,000 tokens."""
    labels = torch.full((1, 257), 5)
    labels[0, 0] = -100
    case = make_case(labels, vocabulary=32_000, width=16)
    return close(answer(adapter, case).loss, expected(adapter, case).loss, 1e-6)


@check(17, "JSD of strangers", "the JSD of models that share no token is ln 2", "jsd")
def disjoint_jsd(adapter: Adapter) -> str:
    """The mixture's probabilities underflow; its logarithm should not."""
    labels = torch.tensor([[-100, 1, 2]])
    sure, other = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    sure[..., 0] = 1
    other[..., 1] = 1
    weight = 300 * torch.eye(4)
    case = Case(
        Side(sure, weight), Side(other, weight), labels, labels.clamp(min=0), labels == labels,
        divergence="jsd",
    )  # fmt: skip
    actual = answer(adapter, case)
    if not bool(actual.hidden.isfinite().all()):
        raise WrongError("a gradient is not finite")
    return close(actual.loss, expected(adapter, case).loss, 1e-5)


@check(18, "none below 0", "near its teacher, no token is below zero, and each still pulls", "kl")
def near_zero(adapter: Adapter) -> str:
    """Clamped at zero, half of the tokens would stop to pull."""
    labels = torch.full((1, 33), 5)
    labels[0, 0] = -100
    case = near_models(make_case(labels, vocabulary=500), 1e-2)
    complaint = _none_below(alone(adapter, case), 1e-6)
    actual, true = answer(adapter, case).hidden, expected(adapter, case).hidden
    counts = true.abs().amax(dim=-1) > 0
    cosine = torch.cosine_similarity(actual[counts], true[counts], dim=-1)
    if not float(cosine.min()) > 0.99:
        raise WrongError(f"a token's gradient has a cosine of {cosine.min():.2g} to the true one")
    return complaint


def _top_k_case() -> Case:
    """A student with the teacher's proportions in its top, and more mass there."""
    labels = torch.tensor([[-100, 5, 2, 3]])
    vocabulary, k = 50, 5
    p = torch.full((vocabulary,), 0.4 / (vocabulary - k))
    q = torch.full((vocabulary,), 0.05 / (vocabulary - k))
    top = torch.tensor([0.3, 0.12, 0.08, 0.06, 0.04])
    p[:k] = top
    q[:k] = top / top.sum() * 0.95
    hidden = torch.ones(1, 4, 1)
    return Case(
        Side(hidden, q.log()[:, None]), Side(hidden, p.log()[:, None]), labels,
        labels.clamp(min=0), labels == labels, top_k=k,
    )  # fmt: skip


@check(18, "top k: pulls right", "surer than its teacher, the student is pulled back", "top_k")
def top_k_pulls(adapter: Adapter) -> str:
    """A list cut short is no distribution: its "KL" is negative here, and clamped it is still."""
    case = _top_k_case()
    actual, true = answer(adapter, case), expected(adapter, case)
    if not actual.loss >= 0:
        raise WrongError(f"the divergence is {actual.loss:.3g}, below zero")
    assert actual.weight is not None
    assert true.weight is not None
    if float(actual.weight.norm()) == 0:
        raise WrongError("the student is not pulled at all")
    cosine = torch.cosine_similarity(actual.weight.flatten(), true.weight.flatten(), dim=0)
    if not float(cosine) > 0.99:
        raise WrongError(f"the gradient has a cosine of {cosine:.2g} to the true one")
    return f"cosine {cosine:.4f}"


@check(19, "top k: no bias", "a student that equals its teacher is left as it is", "top_k")
def top_k_unbiased(adapter: Adapter) -> str:
    """Renormalised, the list would ask it to be surer."""
    case = _top_k_case()
    actual = answer(adapter, replace(case, student=case.teacher))
    assert actual.weight is not None
    pull = float(actual.weight.abs().max())
    if not pull < 1e-5:
        raise WrongError(f"the student equals its teacher and is pulled by {pull:.2g}")
    return f"largest gradient {pull:.1g}"


@check(19, "top k: the tail", "50 of 32,000 and the tail of the rest are exact to 1e-5", "tail")
def top_k_tail(adapter: Adapter) -> str:
    """1e-8 in each empty place would be 0.03 % of the mass."""
    labels = torch.full((1, 9), 5)
    labels[0, 0] = -100
    case = replace(make_case(labels, vocabulary=32_000, scale=0.5), top_k=50)
    return close(answer(adapter, case).loss, expected(adapter, case).loss, 1e-5)


@check(20, "downhill", "the gradient is that of the divergence, no term of it clipped")
def downhill(adapter: Adapter) -> str:
    """Terms of a KL are negative where q > p; cut off, they leave another function."""
    labels = torch.full((B, T), 5)
    labels[:, 0] = -100
    case = make_case(labels)
    actual, true = answer(adapter, case).hidden, expected(adapter, case).hidden
    cosine = torch.cosine_similarity(actual.flatten(), true.flatten(), dim=0)
    if not float(cosine) > 0.9999:
        raise WrongError(f"the gradient has a cosine of {cosine:.4g} to the true one")
    return f"cosine {cosine:.6f}"


@check(21, "other vocabulary size", "models of different vocabulary sizes are refused",
       "sizes|folders")  # fmt: skip
def other_size(adapter: Adapter) -> str:
    """Rows that the student lacks would be padded with a logit of 0."""
    if "sizes" in adapter.can:
        case = make_case()
        teacher = replace(case.teacher, weight=numbers(60, V + 5, TEACHER_D, scale=0.3))
        return refuses(lambda: answer(adapter, replace(case, teacher=teacher)))
    with workshop() as place:
        return _refuses_models(adapter, place, teacher_rows=5)


def refuses(attempt: Callable[[], Any]) -> str:
    """Complain unless an attempt is refused."""
    try:
        attempt()
    except Exception as error:  # a refusal of any kind
        return f"refused: {_type_and_reason(error)}"
    raise WrongError("it was not refused")


@check(22, "other vocabulary", "models whose ids spell other tokens are refused", "folders")
def other_vocabulary(adapter: Adapter) -> str:
    """Of equal size, two tokens exchanged."""
    with workshop() as place:
        return _refuses_models(adapter, place, exchange=True)


@check(24, "one beginning", "a conversation begins with one beginning-of-sequence token", "text")
def one_beginning(adapter: Adapter) -> str:
    """The template writes it, and the tokenizer would add another."""
    with workshop() as place:
        folder = place.tokenizer(template_bos=True)
        ids, _ = ROADS[adapter.name].labelled(folder, place.conversations()[0])
        if ids.count(1) != 1:
            raise WrongError(f"there are {ids.count(1)}")
        return "1"


@check(25, "the answer alone", "without marks in the template, the answer and its end are learnt",
       "text")  # fmt: skip
def the_answer_alone(adapter: Adapter) -> str:
    """Neither nothing nor everything."""
    with workshop() as place:
        folder = place.tokenizer()
        messages = place.conversations()[0]
        return _learns(
            ROADS[adapter.name], folder, messages, messages[-1]["content"] + "<|im_end|>"
        )


@check(26, "SentencePiece seam", "the first token after a Mistral prompt is learnt, and no other",
       "text")  # fmt: skip
def sentencepiece_seam(adapter: Adapter) -> str:
    """Prompt and answer turned into tokens apart would differ from the whole."""
    with workshop() as place:
        folder = place.sentencepiece()
        messages = place.conversations()[0]
        return _learns(ROADS[adapter.name], folder, messages, messages[-1]["content"] + "</s>")


def _learns(road: Road, folder: Path, messages: list[dict[str, str]], expected: str) -> str:
    from mistill.text.vocabulary import load_vocabulary

    vocabulary = load_vocabulary(folder)
    ids, labels = road.labelled(folder, messages)
    whole = vocabulary.encode(vocabulary.render(messages))
    if ids != whole:
        raise WrongError("the tokens are not those of the conversation as one text")
    learnt = b"".join(vocabulary.token_bytes(token) for token in labels if token >= 0).decode()
    if learnt.rstrip("\n") != expected:
        raise WrongError(f"{learnt!r} is learnt, not {expected!r}")
    return "exactly that"


@check(27, "padding is the end", "the end is learnt also where it is the padding token", "text")
def padding_is_the_end(adapter: Adapter) -> str:
    """Masked by its id, it would never be."""
    with workshop() as place:
        folder = place.tokenizer(pad_is_end=True)
        _, labels = ROADS[adapter.name].labelled(folder, place.conversations()[0])
        if 4 not in labels:
            raise WrongError("the end of the turn is not learnt")
        return "learnt"


@check(28, "evaluation", "held-out text is judged per kept token too", "evaluation")
def evaluation(adapter: Adapter) -> str:
    """Without the number of tokens in a step, a sum would be a thousand times as much."""
    case = make_case()
    return close(answer(adapter, case, evaluate=True).loss, truth(case).loss, 1e-4)


@check(31, "teacher's dropout", "a teacher that was left in train mode drops nothing",
       "teacher_mode")  # fmt: skip
def teacher_dropout(adapter: Adapter) -> str:
    """With dropout of a half."""
    case = make_case()
    actual = answer(adapter, with_side(case, "teacher", dropout=0.5))
    return close(actual.loss, truth(case).loss, 1e-4)


@check(32, "no floor", "a student that equals its teacher has a loss of 0")
def no_floor(adapter: Adapter) -> str:
    """As a cross-entropy it would be the teacher's entropy."""
    actual = answer(adapter, same_models(make_case())).loss
    if not abs(actual) < 1e-6:
        raise WrongError(f"the loss is {actual:.4g}")
    return f"{actual:.1g}"


@check(0, "scaled gradient", "a loss times 3 has 3 times the gradient")
def scaled_gradient(adapter: Adapter) -> str:
    """A gradient worked out in the forward pass must hear of what comes after it."""
    once, thrice = (answer(adapter, make_case(), factor) for factor in (1.0, 3.0))
    gap = float((thrice.hidden - 3 * once.hidden).norm() / thrice.hidden.norm())
    if not gap < 1e-5:
        raise WrongError(f"off by {gap:.2g} of its length")
    return f"off by {gap:.1g}"


# --- asking -------------------------------------------------------------------------------------


def ask(adapter: Adapter, question: Check) -> Finding:
    """Put one loss to one check.

    Args:
        adapter: The loss.
        question: The check.

    Returns:
        What came of it.
    """
    status: Status
    lacking = [need for need in question.needs if not adapter.can & set(need.split("|"))]
    if lacking:
        names = lacking[0].split("|")
        reasons = [adapter.why_not[name] for name in names if name in adapter.why_not]
        status, detail = "n/a", reasons[0] if reasons else f"it offers no {names[0]}"
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                status, detail = "pass", question.run(adapter)
        except WrongError as error:
            status, detail = "fail", str(error)
        except Exception as error:  # a loss that raises has given no answer
            status, detail = "fail", f"raises {_type_and_reason(error)}"
    return Finding(adapter.name, adapter.version, question.trap, question.name, status, detail)


def ask_all(adapters: Sequence[Adapter]) -> list[Finding]:
    """Put some losses to all checks.

    Args:
        adapters: The losses.

    Returns:
        What came of it.
    """
    for adapter in adapters:
        # What fails here is the stand-in, and says nothing of the loss.
        answer(adapter, make_case())
    return [ask(adapter, question) for adapter in adapters for question in CHECKS]


def _type_and_reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error, 110)}"


def ask_elsewhere(python: str) -> list[Finding]:
    """Put the rivals to all checks, in their own environment.

    Args:
        python: Its interpreter.

    Returns:
        What came of it.

    Raises:
        RuntimeError: If the child did not finish.
    """
    command = [python, "-m", "benchmarks.suite.conformance", "--child"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode or not last.startswith("["):
        raise RuntimeError(f"{python} could not run the checks: {done.stderr[-2000:]}")
    return [Finding(**finding) for finding in json.loads(last)]


def show(findings: Sequence[Finding]) -> None:
    """Print who passes what.

    Args:
        findings: Of all losses.
    """
    from rich.console import Console
    from rich.table import Table

    losses = list(dict.fromkeys((finding.loss, finding.version) for finding in findings))
    table = Table(title="Who passes what")
    table.add_column("trap", justify="right")
    table.add_column("check")
    for name, its_version in losses:
        table.add_column(f"{name} {its_version}".strip(), justify="center")
    marks = {"pass": "[green]pass[/]", "fail": "[red]FAIL[/]", "n/a": "[dim]n/a[/]"}
    by_name = {(finding.loss, finding.check): finding for finding in findings}
    for question in CHECKS:
        cells = [marks[by_name[name, question.name].status] for name, _ in losses]
        table.add_row(str(question.trap or "-"), question.name, *cells)
    console = Console(width=max(Console().width, 150))
    console.print(table)
    for finding in findings:
        if finding.status == "fail":
            console.print(
                f"{finding.loss}, {finding.check}: {finding.detail}", highlight=False, markup=False
            )


def main() -> None:
    """Ask everyone everything, and print a table and a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rivals-python", help="Python that has trl and liger-kernel")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps([asdict(finding) for finding in ask_all(ELSEWHERE)]))
        return
    findings = ask_all(HERE)
    if args.rivals_python:
        findings += ask_elsewhere(args.rivals_python)
    show(findings)
    print(json.dumps({"findings": [asdict(finding) for finding in findings]}))


if __name__ == "__main__":
    main()
