"""Answers as blocks of tokens, to compare models on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mistill.preferences.tokens import Answer
from mistill.text.blocks import TokenBlocks


def answer_blocks(answers: Sequence[Answer], most_tokens: int) -> TokenBlocks:
    """Answers behind their prompts as blocks, one a row, to compare models on.

    Args:
        answers: Prompts with answers; of many, the first ones.
        most_tokens: Most tokens of answers, though at least one answer is taken.

    Returns:
        Blocks in which the tokens of the answers count.
    """
    taken: list[Answer] = []
    for one in answers:
        if taken and sum(other.length for other in taken) + one.length > most_tokens:
            break
        taken.append(one)
    width = max(len(one.ids) for one in taken)
    ids = np.zeros((len(taken), width), np.int64)
    mask = np.zeros((len(taken), width), bool)
    documents = np.full((len(taken), width), -1, np.int32)
    for row, one in enumerate(taken):
        ids[row, : len(one.ids)] = one.ids
        mask[row, one.start : len(one.ids)] = True
        documents[row, : len(one.ids)] = row
    return TokenBlocks(ids, mask, documents)
