"""Losses of distillation, each as its own trainer calls it, over models whose last layer is given.

A model here has hidden states instead of layers, and a real output head. So a loss runs as it does
in training, mask, shift, head and all, and what it should come to can be worked out in float64.

What is measured of others is their own code, imported when it is called: TRL's two trainers
compute their losses on a stand-in for everything in them that is not the loss. Formulas whose
name ends in "-style" are written here from what those projects' sources compute.

B is batch, T positions, V vocabulary, D width, K tokens that are known of a distribution.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

HeadKind = Literal["float", "lora", "nf4"]


# --- models of which only the last layer is real ------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        hidden: Its last hidden states, shape (B, T, D).
        weight: Of its head, shape (V, D).
        bias: Of its head, shape (V,).
        scale: Factor of its logits.
        soft_cap: c in c * tanh(logits / c).
        kind: A float matrix, one with a low-rank adapter of peft, or one in four bits.
        dropout: Of its hidden states while it trains.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    kind: HeadKind = "float"
    dropout: float = 0.0


@dataclass(frozen=True)
class Case:
    """One micro-batch for two models, and how the loss shall be computed.

    Attributes:
        student: The model that learns.
        teacher: The model that is imitated.
        labels: Not shifted: the token itself, or -100 where it is not to be predicted, shape
            (B, T).
        ids: The tokens, shape (B, T).
        present: False where there is padding, shape (B, T).
        temperature: Of both distributions.
        divergence: ``forward_kl`` or ``jsd``, its mixture a half.
        in_step: Kept positions of the whole optimizer step; None where the step is this case.
        top_k: How many tokens are known of what the teacher says; None for all.
    """

    student: Side
    teacher: Side
    labels: Tensor
    ids: Tensor
    present: Tensor
    temperature: float = 1.0
    divergence: Literal["forward_kl", "jsd"] = "forward_kl"
    in_step: int | None = None
    top_k: int | None = None

    @property
    def kept(self) -> Tensor:
        """Positions whose logits predict a token that counts, shape (B, T)."""
        kept = torch.zeros_like(self.labels, dtype=torch.bool)
        kept[:, :-1] = self.labels[:, 1:] != -100
        return kept

    @property
    def positions_in_step(self) -> int:
        """Kept positions of the whole optimizer step."""
        return int(self.kept.sum()) if self.in_step is None else self.in_step


class Model(nn.Module):
    """A model with hidden states in place of layers.

    Args:
        side: What it says.
    """

    def __init__(self, side: Side) -> None:
        super().__init__()
        self.hidden = nn.Parameter(side.hidden.clone())
        self.lm_head: nn.Module = _head(side)
        self.side = side
        self.config = SimpleNamespace(
            model_type="stand-in", vocab_size=len(side.weight), logit_scale=side.scale,
            final_logit_softcapping=side.soft_cap,
        )  # fmt: skip
        self.config.get_text_config = lambda: self.config
        self._no_split_modules: list[str] = []

    @property
    def head(self) -> Any:
        """Its head, of whatever class."""
        return self.lm_head

    def get_output_embeddings(self) -> nn.Module:
        """Its head."""
        return self.lm_head

    def get_decoder(self) -> Callable[..., Any]:
        """What computes its hidden states."""
        return lambda **_: SimpleNamespace(
            last_hidden_state=nn.functional.dropout(self.hidden, self.side.dropout, self.training)
        )

    @property
    def base_model(self) -> Callable[..., Any]:
        """The same, as TRL asks for it."""
        return self.get_decoder()

    def forward(self, **_: Any) -> Any:
        """Logits, as transformers computes them: in the model's own type."""
        logits = self.lm_head(self.get_decoder()().last_hidden_state)
        logits = logits * self.side.scale if self.side.scale != 1 else logits
        if self.side.soft_cap is not None:
            logits = self.side.soft_cap * torch.tanh(logits / self.side.soft_cap)
        return SimpleNamespace(logits=logits)


def _head(side: Side) -> nn.Module:
    V, D = side.weight.shape
    if side.kind == "nf4":
        from bitsandbytes import nn as bnb

        quantized: Any = bnb
        linear: Any = quantized.Linear4bit(D, V, bias=False, compute_dtype=torch.float32)
        weight = quantized.Params4bit(side.weight.clone(), requires_grad=False, quant_type="nf4")
        linear.weight = weight
        # Its kernel for AVX-512 computes in bfloat16 whatever is asked for.
        linear.support_avx512bf16_for_cpu = False
        whole: nn.Module = linear.to("cpu")
        return whole
    linear = nn.Linear(D, V, bias=side.bias is not None, dtype=side.weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(side.weight)
        if side.bias is not None:
            linear.bias.copy_(side.bias)
    if side.kind == "float":
        floats: nn.Module = linear
        return floats
    from peft.tuners.lora import Linear, LoraConfig

    size: dict[str, Any] = {"r": 2, "lora_alpha": 4}
    adapted: Any = Linear(linear, "default", config=LoraConfig(**size), **size)
    values = torch.Generator().manual_seed(77)
    with torch.no_grad():
        up = adapted.lora_B["default"].weight
        up.copy_(torch.randn(up.shape, generator=values))
        down = adapted.lora_A["default"].weight
        down.copy_(torch.randn(down.shape, generator=values) * 0.2)
    head_module: nn.Module = adapted
    return head_module


def dense_weight(model: Model) -> Tensor:
    """The matrix that a head stands for, in float64, shape (V, D).

    Args:
        model: Whose head.

    Returns:
        Its weights with what an adapter adds, or what four bits mean.
    """
    head: Any = model.lm_head
    if model.side.kind == "nf4":
        from bitsandbytes.functional import dequantize_4bit

        values: Tensor = dequantize_4bit(head.weight.data, head.weight.quant_state)
        return values.double()
    if model.side.kind == "lora":
        base: Tensor = head.base_layer.weight.detach().double()
        added: Tensor = head.get_delta_weight("default").detach().double()
        return base + added
    weight: Tensor = head.weight.detach().double()
    return weight


# --- the truth ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """What a loss takes for the loss, where a check of its own asks about that.

    So a mistake is counted once: every other check compares with what the loss should come to in
    this view.

    Attributes:
        unshifted: Position t counts where token t does, not where token t + 1 does.
        floor: The teacher's entropy is left in it.
        text: Share of the cross-entropy with the text.
    """

    unshifted: bool = False
    floor: bool = False
    text: float = 0.0


@dataclass(frozen=True)
class Answer:
    """A loss and its gradients.

    Attributes:
        loss: The loss.
        hidden: Its gradient with respect to the student's hidden states, shape (B, T, D).
        weight: With respect to its head, shape (V, D); None where the head takes none.
        graph: Whether the loss could be differentiated.
    """

    loss: float
    hidden: Tensor
    weight: Tensor | None
    graph: bool = True


def truth(case: Case, view: View | None = None, *, squared: bool = True) -> Answer:
    """The loss by its definition, by autograd over full logits in float64.

    Args:
        case: What to compute it of.
        view: How a loss sees it; the right way if None.
        squared: Whether the temperature's square scales it.

    Returns:
        The loss and its gradients.
    """
    student, teacher = Model(case.student), Model(case.teacher)
    hidden = student.hidden.detach().double().requires_grad_()
    weight = dense_weight(student).requires_grad_()
    with torch.no_grad():
        log_p = _log_probabilities(teacher.hidden.double(), dense_weight(teacher), case, "teacher")
    log_q = _log_probabilities(hidden, weight, case, "student")
    view = view or View()
    rows = _cross_entropy(hidden, weight, case) * view.text
    if case.top_k is not None:
        log_p, log_q = _bucketed(log_p, log_q, case.top_k)
    p, q = log_p.exp(), log_q.exp()
    if case.divergence == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=torch.float64))
        apart = 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum(dim=-1)
    else:
        apart = (p * ((0 if view.floor else log_p) - log_q)).sum(dim=-1)
    apart = apart * case.temperature**2 if squared else apart
    kept = case.labels != -100 if view.unshifted else case.kept
    rows = rows + (1 - view.text) * apart
    loss = rows[kept].sum() / (kept.sum() if case.in_step is None else case.in_step)
    loss.backward()
    assert hidden.grad is not None
    return Answer(loss.item(), hidden.grad, weight.grad)


def _cross_entropy(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
    """With the token after each position, shape (B, T); the last one's is of no meaning."""
    log_q = _log_probabilities(hidden, weight, replace(case, temperature=1.0), "student")
    following = case.labels.roll(-1, dims=1).clamp(min=0)
    return -log_q.gather(-1, following[..., None])[..., 0]


def _log_probabilities(hidden: Tensor, weight: Tensor, case: Case, who: str) -> Tensor:
    side: Side = getattr(case, who)
    logits = hidden @ weight.t()
    if side.bias is not None:
        logits = logits + side.bias.double()
    logits = logits * side.scale
    if side.soft_cap is not None:
        logits = side.soft_cap * torch.tanh(logits / side.soft_cap)
    return torch.log_softmax(logits / case.temperature, dim=-1)


def _bucketed(log_p: Tensor, log_q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both over the teacher's K most probable tokens and one outcome for all others."""
    ids = log_p.topk(k, dim=-1).indices

    def over(logs: Tensor) -> Tensor:
        rest = torch.logsumexp(logs.scatter(-1, ids, -torch.inf), dim=-1, keepdim=True)
        return torch.cat([logs.gather(-1, ids), rest], dim=-1)

    return over(log_p), over(log_q)


def top_k_of(case: Case) -> tuple[Tensor, Tensor]:
    """What is known of the teacher where only its most probable tokens were stored.

    Args:
        case: With ``top_k``.

    Returns:
        Ids and log-probabilities at all positions, shape (B, T, K), float32.
    """
    assert case.top_k is not None
    teacher = Model(case.teacher)
    with torch.no_grad():
        log_p = _log_probabilities(teacher.hidden.double(), dense_weight(teacher), case, "teacher")
    top = log_p.topk(case.top_k, dim=-1)
    return top.indices, top.values.float()


# --- adapters -----------------------------------------------------------------------------------

Loss = Callable[[Model, Model, Case], Tensor]

# What a loss may be asked for; a check that needs what a loss does not offer does not apply to it.
CASES = frozenset({"kl", "temperature", "jsd", "scale", "soft_cap", "bias", "lora", "nf4"})
TRAINER = frozenset({"shift", "in_step", "evaluation", "teacher_mode"})
ROAD = frozenset({"folders", "text", "whole_step"})


@dataclass(frozen=True)
class Adapter:
    """A loss as its own trainer calls it.

    Attributes:
        name: Of it.
        loss: Computes it, with a graph.
        can: What it may be asked for.
        why_not: Why it cannot be asked for something, where a word helps.
        view: What it takes for the loss.
        mean_of_means: Whether its trainer takes the mean of the micro-batches' means.
        package: Whose version it has.
        evaluate: The mean over a held-out batch, as its evaluation computes it.
    """

    name: str
    loss: Loss
    can: frozenset[str]
    why_not: Mapping[str, str] = field(default_factory=dict)
    view: View = View()
    mean_of_means: bool = False
    package: str | None = None
    evaluate: Loss | None = None

    @property
    def version(self) -> str:
        """Of its package, or nothing."""
        return version(self.package) if self.package else ""


def answer(adapter: Adapter, case: Case, factor: float = 1.0, *, evaluate: bool = False) -> Answer:
    """Compute a loss and its gradients.

    Args:
        adapter: The loss to compute.
        case: The models and the text.
        factor: The loss is multiplied by it before the backward pass.
        evaluate: Whether to compute it as its evaluation does, without a gradient.

    Returns:
        The loss and the gradients.
    """
    student, teacher = Model(case.student).train(), Model(case.teacher)
    teacher.requires_grad_(False)
    if case.teacher.dropout:
        teacher.train()
    else:
        teacher.eval()
    if evaluate:
        assert adapter.evaluate is not None
        with torch.no_grad():
            return Answer(
                adapter.evaluate(student.eval(), teacher, case).item(),
                torch.zeros_like(student.hidden), None, graph=False,
            )  # fmt: skip
    loss = adapter.loss(student, teacher, case)
    graph = loss.requires_grad
    if graph:
        (loss * factor).backward()
    weight = getattr(student.lm_head, "weight", None)
    hidden = (
        torch.zeros_like(student.hidden) if student.hidden.grad is None else student.hidden.grad
    )
    of_weight = None if weight is None or weight.grad is None else weight.grad.double()
    return Answer(loss.item(), hidden.double(), of_weight, graph)


def _blocks(case: Case) -> Any:
    """A case as the trainer's blocks of text."""
    from mistill.text.blocks import TokenBlocks

    documents = torch.arange(len(case.ids))[:, None].expand_as(case.ids).clone()
    documents[~case.present] = -1
    return TokenBlocks(
        ids=case.ids.numpy(),
        mask=(case.labels != -100).numpy(),
        documents=documents.int().numpy(),
    )


def mistill(student: Model, teacher: Model, case: Case) -> Tensor:
    """The loss that ``distill.train`` lowers: its step, its teacher, its head."""
    from distill.settings import TrainSettings
    from distill.teacher.teacher import LiveTeacher
    from distill.training.step import DistillationStep
    from mistill.loss.batches import make_batch
    from mistill.loss.heads import read_head
    from mistill.loss.losses import head_loss
    from mistill.loss.targets import TopKTargets

    settings = TrainSettings(temperature=case.temperature, divergence=case.divergence)
    blocks = _blocks(case)
    batch = make_batch(blocks, torch.device("cpu"))
    positions = max(case.positions_in_step, 1)
    models: tuple[Any, Any] = (student, teacher)
    if case.top_k is not None:
        ids, logs = top_k_of(case)
        targets = TopKTargets(
            ids[batch.kept], logs[batch.kept].exp(), len(case.teacher.weight), case.temperature
        )
        return head_loss(
            student.hidden[batch.kept], read_head(models[0]), targets, batch.next_ids,
            positions_in_step=positions, temperature=case.temperature,
        ).loss  # fmt: skip
    live = LiveTeacher(models[1]).targets(blocks, batch)
    step = DistillationStep(models[0], settings)
    loss: Tensor = step("loss", batch, live, positions, 0.0).loss
    return loss


def mistill_evaluation(student: Model, teacher: Model, case: Case) -> Tensor:
    """The held-out KL that ``distill.train`` reports."""
    from distill.settings import TrainSettings
    from distill.teacher.teacher import LiveTeacher
    from distill.training.evaluation import summarize
    from distill.training.step import DistillationStep
    from mistill.loss.batches import make_batch

    blocks = _blocks(case)
    batch = make_batch(blocks, torch.device("cpu"))
    models: tuple[Any, Any] = (student, teacher)
    targets = LiveTeacher(models[1]).targets(blocks, batch)
    step = DistillationStep(models[0].eval(), TrainSettings())
    return torch.tensor(summarize(step.scores(batch, targets)).kl)


OURS = Adapter(
    "mistill",
    mistill,
    CASES | ROAD | {"shift", "in_step", "evaluation", "top_k", "tail"},
    {"teacher_mode": "it loads its teacher itself, in eval mode"},
    evaluate=mistill_evaluation,
)


# --- TRL ----------------------------------------------------------------------------------------


def _beta(case: Case) -> float:
    return 0.0 if case.divergence == "forward_kl" else 0.5


def trl_gkd(student: Model, teacher: Model, case: Case, *, counted: bool = True) -> Tensor:
    """``compute_loss`` of TRL's GKDTrainer; transformers' Trainer tells it the step's tokens."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    trainer = SimpleNamespace(
        teacher_model=teacher,
        generalized_jsd_loss=GKDTrainer.generalized_jsd_loss,
        beta=_beta(case),
        temperature=case.temperature,
    )
    inputs = {
        "input_ids": case.ids,
        "attention_mask": case.present.long(),
        "labels": case.labels,
    }
    total = torch.tensor(max(case.positions_in_step, 1)) if counted else None
    loss: Tensor = GKDTrainer.compute_loss(trainer, student, inputs, num_items_in_batch=total)
    return loss


def trl_distillation(student: Model, teacher: Model, case: Case, *, counted: bool = True) -> Tensor:
    """``_compute_loss`` of TRL's DistillationTrainer; the first token is the prompt."""
    from trl.trainer.distillation_trainer import DistillationTrainer

    trainer = SimpleNamespace(
        teacher_model=teacher,
        beta=_beta(case),
        temperature=case.temperature,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        model_kwarg_keys=(),
        _is_vlm=False,
        _forward_redirection=lambda _wrapper, _module, method, *a, **k: method(*a, **k),
    )
    trainer._get_last_hidden_state = functools.partial(
        inspect.unwrap(DistillationTrainer._get_last_hidden_state), trainer
    )
    inputs = {
        "prompt_ids": case.ids[:, :1],
        "completion_ids": case.ids[:, 1:],
        "prompt_mask": case.present[:, :1].long(),
        "completion_mask": case.present[:, 1:].long(),
        "tool_mask": (case.labels[:, 1:] != -100).long(),
    }
    total = torch.tensor(float(case.positions_in_step)).clamp(min=1.0) if counted else None
    loss: Tensor = DistillationTrainer._compute_loss(trainer, student, inputs, total)[0]
    return loss


def _uncounted(loss: Callable[..., Tensor]) -> Loss:
    return functools.partial(loss, counted=False)


TRL = (
    Adapter(
        "TRL GKDTrainer",
        trl_gkd,
        CASES | TRAINER | ROAD,
        package="trl",
        evaluate=_uncounted(trl_gkd),
    ),
    Adapter(
        "TRL DistillationTrainer",
        trl_distillation,
        (CASES | TRAINER | {"folders"}) - {"lora"},
        {
            "lora": "its constructor refuses one",
            "text": "it trains on what the student writes",
            "whole_step": "it trains on what the student writes",
        },
        package="trl",
        evaluate=_uncounted(trl_distillation),
    ),
)


# --- Liger --------------------------------------------------------------------------------------


def liger(student: Model, teacher: Model, case: Case, **shares: float) -> Tensor:
    """Liger's LigerFusedLinearJSDLoss, shifted as transformers shifts; not compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        beta=_beta(case), temperature=case.temperature, compiled=False, **shares
    )
    found: Tensor = loss(
        student.get_decoder()().last_hidden_state[:, :-1].flatten(0, 1),
        student.lm_head.weight,
        teacher.hidden[:, :-1].flatten(0, 1).detach(),
        teacher.lm_head.weight,
        case.labels[:, 1:].flatten(),
        student.lm_head.bias,
        teacher.lm_head.bias,
    )
    return found


_BARE = {
    "shift": "the caller shifts",
    "in_step": "the caller weighs micro-batches",
    "evaluation": "a loss, not a trainer",
    "teacher_mode": "a loss, not a trainer",
    "folders": "a loss, not a trainer",
    "text": "a loss, not a trainer",
    "whole_step": "a loss, not a trainer",
}
_BARE_HEAD = dict.fromkeys(("scale", "soft_cap", "lora", "nf4"), "it is given a matrix, not a head")
LIGER = (
    Adapter(
        "Liger JSD, default",
        liger,
        frozenset({"temperature", "jsd", "bias", "sizes"}),
        _BARE | _BARE_HEAD | {"kl": "half of it is cross-entropy"},
        View(text=0.5),
        package="liger-kernel",
    ),
    Adapter(
        "Liger JSD, soft only",
        functools.partial(liger, weight_hard_loss=0.0, weight_soft_loss=1.0),
        frozenset({"kl", "temperature", "jsd", "bias", "sizes"}),
        _BARE | _BARE_HEAD,
        package="liger-kernel",
    ),
)


# --- formulas written here ----------------------------------------------------------------------


def distillkit_style(student: Model, teacher: Model, case: Case) -> Tensor:
    """KL with the temperature's square, its mask not shifted; top-k lists renormalised to 1."""
    logits = student().logits
    own = logits.dtype
    mask = case.labels >= 0
    if case.top_k is None:
        log_p = torch.log_softmax(teacher().logits.float() / case.temperature, dim=-1)
        log_q = torch.log_softmax(logits.float() / case.temperature, dim=-1)
    else:
        ids, values = top_k_of(case)
        log_p = torch.log_softmax(values, dim=-1)
        log_q = torch.log_softmax(logits.float() / case.temperature, dim=-1).gather(-1, ids)
    rows = (log_p.exp() * (log_p - log_q)).sum(dim=-1) * mask
    return rows.sum().to(own) * case.temperature**2 / mask.sum()


def torchtune_style(student: Model, teacher: Model, case: Case) -> Tensor:
    """Cross-entropy with the teacher's probabilities; its recipe shifts the labels."""
    p = torch.softmax(teacher().logits.float(), dim=-1)
    log_q = torch.log_softmax(student().logits.float(), dim=-1)
    kept = case.kept
    if not bool(kept.any()):
        return torch.tensor(0.0)
    return -(p * log_q).sum(dim=-1)[kept].sum() / kept.sum()


_FORMULA = {
    "evaluation": "a formula, not a trainer",
    "teacher_mode": "a formula, not a trainer",
    "folders": "a formula, not a trainer",
    "text": "a formula, not a trainer",
    "whole_step": "a formula, not a trainer",
}
# What comes before the logits is the model's own affair in both.
_FROM_LOGITS = frozenset({"scale", "soft_cap", "bias", "lora", "nf4"})
STYLES = (
    Adapter(
        "DistillKit-style formula",
        distillkit_style,
        _FROM_LOGITS | {"kl", "temperature", "shift", "in_step", "top_k"},
        _FORMULA | {"tail": "its lists are renormalised to 1"},
        View(unshifted=True),
        mean_of_means=True,
    ),
    Adapter(
        "torchtune-style formula",
        torchtune_style,
        _FROM_LOGITS,
        _FORMULA
        | {
            "shift": "the caller shifts",
            "in_step": "the caller weighs micro-batches",
            "temperature": "it has none",
            "kl": "its loss is a cross-entropy",
        },
        View(floor=True),
    ),
)
HERE = (OURS, *STYLES)
ELSEWHERE = (*TRL, *LIGER)


def with_side(case: Case, who: Literal["student", "teacher"], **changes: Any) -> Case:
    """A case in which one of the models is another.

    Args:
        case: A case.
        who: Which model.
        **changes: Fields of ``Side``.

    Returns:
        The other case.
    """
    if who == "student":
        return replace(case, student=replace(case.student, **changes))
    return replace(case, teacher=replace(case.teacher, **changes))
