"""What tuning did to a model: measured on held-out text, and shown by a few replies.

The folders as they were written are compared: the model that came and the one that was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.trainers.moved import OnText

if TYPE_CHECKING:
    import torch

    from mistill.text.blocks import TokenBlocks
    from mistill.text.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Look:
    """What a model says of held-out text and of other text, and after held-out prompts.

    Attributes:
        held_out: On the held-out text.
        other: On text that it is not tuned on; None where there is none.
        replies: Greedy replies to the prompts.
    """

    held_out: OnText
    other: OnText | None
    replies: list[str]

    @property
    def cross_entropy(self) -> float:
        """Of the held-out text, mean over the kept tokens, in nats."""
        return self.held_out.cross_entropy


@dataclass(frozen=True, kw_only=True)
class TuningReport:
    """What tuning did.

    Attributes:
        before: Of the model that came: its ``cross_entropy``, in nats a token of held-out text.
        after: The same of the tuned model, as it was written.
        change: After less before.
        change_standard_error: Of the change, paired token by token, between blocks; None for a
            single block.
        trained_before: Cross-entropy of what was trained before the first step: with four-bit
            weights another model than the one that came.
        trained_after: The same of what was trained and kept.
        merges: Cross-entropies of the ways to merge an adapter, where there is a choice.
        merged_into: The one that was taken: float, or dequantized.
        kl: How far the two are apart, from ``mistill.measures.kl.both_ways``.
        other_text: What has been forgotten: ``before``, ``after``, ``change`` and ``kl`` on text
            that the model was not tuned on, and its names; None where none was read.
        entries: Entries of the matrices that were trained.
        entries_moved: Share of them with another value than before.
        rows: Rows of text that were read.
        rows_passed_over: Those that could not be read or held nothing to learn.
        rows_left_out: Conversations left out because they are longer than a block.
        replies: Held-out prompts with the greedy replies before and after.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]
    change: float
    change_standard_error: float | None
    trained_before: float
    trained_after: float
    merges: Mapping[str, float]
    merged_into: str | None
    kl: Mapping[str, float | int | None]
    other_text: Mapping[str, Any] | None
    entries: int
    entries_moved: float
    rows: int
    rows_passed_over: int
    rows_left_out: int
    replies: Sequence[Mapping[str, str]]


def look_at(
    folder: Path,
    blocks: TokenBlocks,
    other: TokenBlocks | None,
    prompts: Sequence[Sequence[int]],
    vocabulary: Vocabulary,
    *,
    reply_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Look:
    """Load a folder and let it say what is to be compared.

    Args:
        folder: A float or NF4 folder.
        blocks: Held-out text.
        other: Text that the model is not tuned on; None for none.
        prompts: Token ids to reply to.
        vocabulary: Of the model.
        reply_tokens: Most tokens of a reply.
        device: Where to compute.
        dtype: In what.

    Returns:
        What it says; the model itself is let go.
    """
    from mistill.engine.pytorch_model import PytorchModel

    running = PytorchModel(folder, dtype=dtype)
    model: Any = running.model
    if model.device != device:
        model.to(device)
    held_out = OnText.of(model, blocks)
    on_other = None if other is None else OnText.of(model, other)
    room = running.context_length - 1
    replies = [
        _reply(running, prompt[-room:], vocabulary, min(reply_tokens, room)) for prompt in prompts
    ]
    return Look(held_out, on_other, replies)


def _reply(running: Any, prompt: Sequence[int], vocabulary: Vocabulary, most: int) -> str:
    written: list[int] = []
    for token in running.stream(prompt):
        if token in vocabulary.end_ids:
            break
        written.append(token)
        if len(written) >= most:
            break
    return vocabulary.decode(written)
