"""What a PyTorch model answers to many prompts, written side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Rows of a batch: all of them are computed until the longest reply has ended.
REPLIES_AT_ONCE = 16


@torch.no_grad()
def write_replies(
    model: Any,
    prompts: Sequence[Sequence[int]],
    end_ids: Sequence[int],
    max_new_tokens: int,
    *,
    sampled: bool = False,
) -> list[list[int]]:
    """Reply to prompts by what a model holds likely, with no penalty and nothing cut away.

    Args:
        model: A causal language model of transformers; left in the mode it was in.
        prompts: Token ids of each prompt.
        end_ids: Tokens that end a reply, at least one.
        max_new_tokens: Most tokens of a reply.
        sampled: Whether tokens are drawn at temperature 1 by torch's generator; otherwise each is
            the likeliest.

    Returns:
        The ids of each reply, in the order of the prompts; the last one is an end, unless the reply
        was cut off.
    """
    device = next(model.parameters()).device
    sampling: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
    if sampled:
        sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    training = model.training
    model.eval()
    replies: list[list[int]] = []
    for start in range(0, len(prompts), REPLIES_AT_ONCE):
        batch = prompts[start : start + REPLIES_AT_ONCE]
        width = max(map(len, batch))
        padded = [[0] * (width - len(ids)) + list(ids) for ids in batch]
        seen = [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch]
        written = model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(seen, device=device),
            max_new_tokens=max_new_tokens,
            do_sample=sampled,
            repetition_penalty=1.0,
            eos_token_id=list(end_ids),
            pad_token_id=end_ids[0],
            **sampling,
        )[:, width:]
        replies += [_until_end(ids, end_ids) for ids in written.tolist()]
    model.train(training)
    return replies


def _until_end(ids: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    stop = next((place for place, token in enumerate(ids) if token in end_ids), len(ids))
    return list(ids[: stop + 1])
