"""How far a tuned model is from the one that it was tuned from, and what it gained or lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mistill.measures.kl import Predictions, both_ways, next_token_losses, predict
from mistill.measures.significance import of_mean
from mistill.measures.uncertainty import Samples, mean_of
from mistill.preferences.tokens import Answer
from mistill.text.blocks import TokenBlocks
from tune.trainers.answer_blocks import answer_blocks
from tune.trainers.other_text import OtherText


@dataclass(frozen=True, eq=False)
class OnText:
    """What a model says of a text.

    Attributes:
        predictions: What it predicts there.
        losses: -log p(next token) there in nats, an array for every block.
    """

    predictions: Predictions
    losses: Samples

    @classmethod
    def of(cls, model: Any, blocks: TokenBlocks) -> OnText:
        """Let a model read a text.

        Args:
            model: A Llama or Mistral with its head, in eval mode.
            blocks: The text.

        Returns:
            What it says of it.
        """
        predictions = predict(model, blocks)
        return cls(predictions, next_token_losses(predictions, blocks))

    @property
    def cross_entropy(self) -> float:
        """Mean over the kept tokens, in nats."""
        return mean_of(self.losses)


def comparison(base: OnText, tuned: OnText, blocks: TokenBlocks) -> dict[str, Any]:
    """The figures of a report that come from two models and a text.

    Args:
        base: The model that came.
        tuned: The model that was made.
        blocks: The text.

    Returns:
        ``before`` and ``after`` with their ``cross_entropy`` in nats a token; ``change``, after
        less before, with ``change_standard_error``, paired token by token, between blocks; and
        ``kl``, from ``mistill.measures.kl.both_ways``.
    """
    shift = of_mean(base.losses, tuned.losses)
    return {
        "before": {"cross_entropy": base.cross_entropy},
        "after": {"cross_entropy": tuned.cross_entropy},
        "change": tuned.cross_entropy - base.cross_entropy,
        "change_standard_error": None if shift is None else shift.error,
        "kl": both_ways(tuned.predictions, base.predictions, blocks),
    }


def on_other_text(base: OnText, tuned: OnText, text: OtherText) -> dict[str, Any]:
    """What a report says of a text that a model was not tuned on.

    Args:
        base: The model that came.
        tuned: The model that was made.
        text: The text.

    Returns:
        Its names as ``texts``, and the figures of ``comparison``.
    """
    return {"texts": text.names, **comparison(base, tuned, text.blocks)}


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
    start, tuned = _before_and_after(model, start_model, lambda one: predict(one, blocks))
    return both_ways(tuned, start, blocks)


def forgetting(
    model: Any, start_model: Callable[[], Any], text: OtherText | None
) -> dict[str, Any] | None:
    """What a model that is being tuned has forgotten of a text that it is not tuned on.

    Args:
        model: The tuned model, or one of peft whose adapters can be switched off.
        start_model: Gives the model that it was tuned from; called only where there are no
            adapters.
        text: The text; None if none is to be read.

    Returns:
        From ``on_other_text``; None without a text.
    """
    if text is None:
        return None
    start, tuned = _before_and_after(model, start_model, lambda one: OnText.of(one, text.blocks))
    return on_other_text(start, tuned, text)


def _before_and_after(
    model: Any, start_model: Callable[[], Any], read: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """What is read of the start and of the tuned model."""
    training = model.training
    model.eval()
    if hasattr(model, "peft_config"):
        plain = model.get_base_model()
        tuned = read(plain)
        with model.disable_adapter():
            start = read(plain)
    else:
        tuned = read(model)
        start = read(start_model().to(model.device))
    model.train(training)
    return start, tuned
