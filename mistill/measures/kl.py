"""How far models are from a reference on some text, without holding the logits of all of it.

KL(reference || model), over the whole vocabulary at every token, measures what a compressed model
lost: perplexity can stay the same while answers change, KL cannot. Of each model its last hidden
states are stored, D numbers a token; logits, V numbers a token, are computed from them for a few
rows at a time, for every model, and dropped.

N is positions that count, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mistill.errors import TextError, VocabularyError
from mistill.measures.uncertainty import mean_of, standard_error_of_mean
from mistill.pytorch.products import fast_products
from mistill.text.blocks import TokenBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits of one model that exist at once: 16 MiB of float32.
_LOGITS_AT_ONCE = 1 << 22

# Tokens that pass through a whole model at once.
_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model predicts at N positions, in the form that takes least memory.

    Attributes:
        hidden: Its hidden states after the last norm, shape (N, D).
        head: Its output matrix, shape (V, D).
    """

    hidden: Tensor
    head: Tensor

    def logits(self, rows: slice) -> Tensor:
        """Scores of every next token at some positions.

        Args:
            rows: Which positions.

        Returns:
            Shape (n, V), float32.
        """
        return functional.linear(self.hidden[rows].float(), self.head.float())


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Fidelity of a model's predictions to a reference's, over the tokens of a text.

    Attributes:
        kl: Mean KL(reference || model) per token, in nats.
        kl_standard_error: Standard error of that mean, taken between blocks of text; None for a
            single token.
        kl_p99: The divergence that one token in a hundred exceeds.
        agreement: Share of tokens where both hold the same token for the most probable.
        perplexity: Of the model, on the text itself.
        reference_perplexity: Of the reference.
        tokens: Tokens that the means are over.
    """

    kl: float
    kl_standard_error: float | None
    kl_p99: float
    agreement: float
    perplexity: float
    reference_perplexity: float
    tokens: int


@fast_products()
@torch.inference_mode()
def predict(model: PreTrainedModel, blocks: TokenBlocks) -> Predictions:
    """What a loaded model predicts at the positions of a text that count.

    Args:
        model: A Llama or Mistral with its head, in eval mode.
        blocks: The text.

    Returns:
        Its predictions, in the order of the blocks.
    """
    body = cast(Any, model).model
    step = max(1, _TOKENS_AT_ONCE // blocks.block_length)
    kept_states = []
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step]
        ids, positions = (
            torch.from_numpy(np.ascontiguousarray(array)).to(model.device)
            for array in (part.ids, part.position_ids)
        )
        # No mask: transformers keeps documents apart by positions that begin anew at 0.
        states = body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        kept_states.append(states[torch.from_numpy(part.kept).to(states.device)])
    head = cast(Any, model.get_output_embeddings())
    return Predictions(torch.cat(kept_states), head.weight.detach())


@fast_products()
@torch.inference_mode()
def compare(
    references: Mapping[str, Predictions],
    models: Mapping[str, Predictions],
    blocks: TokenBlocks,
) -> dict[str, dict[str, Fidelity]]:
    """Compare every model with every reference on one text.

    Args:
        references: The models to compare with, such as a source and its teacher, by name.
        models: By name.
        blocks: The text that all predictions are about.

    Returns:
        By name of the model, then by name of the reference.

    Raises:
        VocabularyError: If two of them have different numbers of logits.
        TextError: If the text holds no token to predict.
    """
    next_ids, boundaries = _predicted(blocks)
    total = len(next_ids)
    sizes = {name: len(one.head) for name, one in (*references.items(), *models.items())}
    if len(set(sizes.values())) > 1:
        words = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise VocabularyError(
            f"models can be compared where they share a vocabulary, but their logits are {words}; "
            "give models with the same tokenizer"
        )
    reference_losses = {name: np.empty(total) for name in references}
    losses = {name: np.empty(total) for name in models}
    kl = {model: {name: np.empty(total) for name in references} for model in models}
    agrees = {model: {name: np.empty(total, bool) for name in references} for model in models}

    step = max(1, _LOGITS_AT_ONCE // next(iter(sizes.values())))
    for start in range(0, total, step):
        rows = slice(start, start + step)
        expected = {name: _Logits.of(one.logits(rows)) for name, one in references.items()}
        for name, reference in expected.items():
            reference_losses[name][rows] = reference.losses(next_ids[rows])
        for model, predictions in models.items():
            logits = _Logits.of(predictions.logits(rows))
            losses[model][rows] = logits.losses(next_ids[rows])
            for name, reference in expected.items():
                kl[model][name][rows] = reference.divergences(logits)
                agrees[model][name][rows] = (reference.top == logits.top).cpu().numpy()

    return {
        model: {
            name: _fidelity(
                np.split(kl[model][name], boundaries),
                agrees[model][name],
                losses[model],
                reference_losses[name],
            )
            for name in references
        }
        for model in models
    }


def both_ways(
    tuned: Predictions, base: Predictions, blocks: TokenBlocks
) -> dict[str, float | int | None]:
    """How far a tuned model is from the one that it was tuned from, as reports hold it.

    Args:
        tuned: What the tuned model predicts.
        base: What the other one predicts.
        blocks: The text that both are about.

    Returns:
        ``tuned_from_base``, KL(tuned || base), how much the base is surprised by what the tuned
        model says; ``base_from_tuned``, KL(base || tuned), what the tuned model has left behind;
        both means per token in nats, with their standard errors, and the number of ``tokens``.
    """
    both = {"tuned": tuned, "base": base}
    fidelity = compare(both, both, blocks)
    away, back = fidelity["base"]["tuned"], fidelity["tuned"]["base"]
    return {
        "tuned_from_base": away.kl,
        "tuned_from_base_standard_error": away.kl_standard_error,
        "base_from_tuned": back.kl,
        "base_from_tuned_standard_error": back.kl_standard_error,
        "tokens": away.tokens,
    }


@torch.inference_mode()
def next_token_losses(predictions: Predictions, blocks: TokenBlocks) -> list[NDArray[np.float64]]:
    """What a text costs a model, token by token: -log p(next token), in nats.

    Args:
        predictions: What the model predicts on the text.
        blocks: The text.

    Returns:
        An array for every block with tokens to predict, in their order.

    Raises:
        TextError: If the text holds no token to predict.
    """
    next_ids, boundaries = _predicted(blocks)
    total = len(next_ids)
    losses = np.empty(total)
    step = max(1, _LOGITS_AT_ONCE // len(predictions.head))
    for start in range(0, total, step):
        rows = slice(start, start + step)
        losses[rows] = _Logits.of(predictions.logits(rows)).losses(next_ids[rows])
    return np.split(losses, boundaries)


def _predicted(blocks: TokenBlocks) -> tuple[Tensor, NDArray[np.int64]]:
    """The tokens to predict, shape (N,), and before which of them a new block begins."""
    lengths = blocks.kept.sum(axis=1)
    if not lengths.any():
        raise TextError("the text to measure on holds no token to predict; give more of it")
    next_ids = torch.from_numpy(blocks.ids[:, 1:][blocks.kept[:, :-1]])
    return next_ids, np.cumsum(lengths[lengths > 0])[:-1]


def kl_sum(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """Sum of KL(reference || model) over some positions, with a gradient.

    Args:
        reference_logits: Shape (n, V).
        logits: Shape (n, V).

    Returns:
        Scalar, in nats.
    """
    log_p, log_q = reference_logits.log_softmax(-1), logits.log_softmax(-1)
    return functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


@dataclass(frozen=True, eq=False)
class _Logits:
    """Logits of some rows, and what every comparison needs of them.

    Attributes:
        logits: Shape (n, V), float32.
        weights: exp of the logits less their maximum, of the same shape.
        log_total: Log of the sum of the exponentials of the logits, float64, shape (n,).
        top: The most probable tokens, shape (n,).
    """

    logits: Tensor
    weights: Tensor
    log_total: Tensor
    top: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> _Logits:
        largest, top = logits.max(dim=1, keepdim=True)
        weights = (logits - largest).exp_()
        log_total = weights.sum(dim=1, dtype=torch.float64).log_().add_(largest[:, 0])
        return cls(logits, weights, log_total, top[:, 0])

    def losses(self, next_ids: Tensor) -> NDArray[np.float64]:
        at_next = self.logits.gather(1, next_ids.to(self.logits.device)[:, None])[:, 0]
        return (self.log_total - at_next).cpu().numpy()

    def divergences(self, other: _Logits) -> NDArray[np.float64]:
        # sum(p (r - c)) - ln Z_r + ln Z_c. The logits are subtracted first and all sums taken in
        # float64, so that models that nearly agree keep their digits.
        gaps = (self.logits - other.logits.to(self.logits.device)).mul_(self.weights)
        total = self.weights.sum(dim=1, dtype=torch.float64)
        expected = gaps.sum(dim=1, dtype=torch.float64) / total
        kl = expected - self.log_total + other.log_total.to(expected.device)
        # Rounding can leave a few 1e-8 below zero where the models agree.
        return kl.clamp_(min=0).cpu().numpy()


def _fidelity(
    passages: Sequence[NDArray[np.float64]],
    agrees: NDArray[np.bool_],
    losses: NDArray[np.float64],
    reference_losses: NDArray[np.float64],
) -> Fidelity:
    divergences = np.concatenate(passages)
    return Fidelity(
        kl=mean_of(passages),
        kl_standard_error=standard_error_of_mean(passages),
        kl_p99=float(np.quantile(divergences, 0.99)),
        agreement=float(agrees.mean()),
        perplexity=_perplexity(losses),
        reference_perplexity=_perplexity(reference_losses),
        tokens=len(divergences),
    )


def _perplexity(losses: NDArray[np.float64]) -> float:
    try:
        return math.exp(float(losses.mean()))
    except OverflowError:
        return math.inf
