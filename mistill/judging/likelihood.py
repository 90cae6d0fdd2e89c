"""How probable a model holds given answers to be.

B is batch, T positions, D width, V vocabulary, N answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from mistill.preferences.tokens import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP = 64
"""Consecutive answers among which those of similar length pass through the model together."""

# Tokens that pass through the model at once, and logits that exist at once: 16 MiB of float32.
_TOKENS_AT_ONCE = 2048
_LOGITS_AT_ONCE = 1 << 22


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into eval mode while the body runs, and computes no gradients.

    Args:
        model: Any model.

    Yields:
        Nothing.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def plain_model(model: Any) -> PreTrainedModel:
    """The model inside one of peft, whose layers keep their adapters."""
    return cast(
        "PreTrainedModel", model.get_base_model() if hasattr(model, "peft_config") else model
    )


def answer_log_probabilities(
    model: Any,
    answers: Sequence[Answer],
    *,
    low_precision: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> NDArray[np.float64]:
    """Log p(answer | prompt) of each answer, in nats, summed over its tokens.

    Args:
        model: A Llama or Mistral with its head; adapters in it count unless they are off.
        answers: N prompts with answers.
        low_precision: Whether the model computes in bfloat16, as it is trained.
        advance: Called with the number of answers that are done.

    Returns:
        Shape (N,), in the order of the answers.
    """
    plain = plain_model(model)
    body, head = cast(Any, plain).model, cast(Any, plain.get_output_embeddings()).weight
    device = head.device
    totals = np.zeros(len(answers))
    cast_down = torch.autocast(device.type, torch.bfloat16) if low_precision else nullcontext()
    with evaluating(model), cast_down:
        for batch in _batches(answers):
            width = max(len(answers[row].ids) for row in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            seen = torch.zeros_like(ids)
            for place, row in enumerate(batch):
                length = len(answers[row].ids)
                ids[place, :length] = torch.tensor(answers[row].ids)
                seen[place, :length] = 1
            states = body(
                input_ids=ids.to(device), attention_mask=seen.to(device), use_cache=False
            ).last_hidden_state
            for place, row in enumerate(batch):
                one = answers[row]
                where = states[place, one.start - 1 : len(one.ids) - 1]
                expected = torch.tensor(one.ids[one.start :], device=device)
                totals[row] = _log_probability(where, expected, head)
            advance(len(batch))
    return totals


def _log_probability(states: torch.Tensor, expected: torch.Tensor, head: torch.Tensor) -> float:
    """Sum over positions of log p(expected token), from states (T, D) and the head (V, D)."""
    total = 0.0
    step = max(1, _LOGITS_AT_ONCE // len(head))
    for start in range(0, len(states), step):
        rows = slice(start, start + step)
        logits = torch.nn.functional.linear(states[rows], head).float()
        log_p = logits.gather(1, expected[rows, None])[:, 0] - logits.logsumexp(1)
        total += float(log_p.double().sum())
    return total


def _batches(answers: Sequence[Answer]) -> list[list[int]]:
    """Numbers of answers that pass through the model together.

    Answers of similar length share a batch, so that little of it is padding, but only within groups
    of consecutive ones: an answer has the same neighbours, and the same bits, whenever it is asked
    about again.
    """
    batches: list[list[int]] = []
    for start in range(0, len(answers), GROUP):
        group = range(start, min(start + GROUP, len(answers)))
        batch: list[int] = []
        for row in sorted(group, key=lambda row: -len(answers[row].ids)):
            if batch and (len(batch) + 1) * len(answers[batch[0]].ids) > _TOKENS_AT_ONCE:
                batches.append(batch)
                batch = []
            batch.append(row)
        batches.append(batch)
    return batches
