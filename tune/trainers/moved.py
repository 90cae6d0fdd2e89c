"""How far a tuned model is from the one that it was tuned from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mistill.measures.kl import both_ways, predict
from mistill.preferences.tokens import Answer
from tune.trainers.answer_blocks import answer_blocks


def divergence_from_start(
    model: Any, start_model: Callable[[], Any], answers: Sequence[Answer], most_tokens: int
) -> dict[str, float | int | None]:
    """KL divergence between a tuned model and its base, both ways, on the tokens of answers.

    Args:
        model: The tuned model, or one of peft whose adapters can be switched off.
        start_model: Gives the model that it was tuned from; called only where there are no
            adapters.
        answers: Prompts with answers; of many, the first ones.
        most_tokens: Most tokens of answers that are read.

    Returns:
        Means per token in nats, their standard errors between answers, and the number of tokens.
    """
    blocks = answer_blocks(answers, most_tokens)
    training = model.training
    model.eval()
    if hasattr(model, "peft_config"):
        plain = model.get_base_model()
        tuned = predict(plain, blocks)
        with model.disable_adapter():
            start = predict(plain, blocks)
    else:
        tuned = predict(model, blocks)
        start = predict(start_model().to(model.device), blocks)
    model.train(training)
    return both_ways(tuned, start, blocks)
