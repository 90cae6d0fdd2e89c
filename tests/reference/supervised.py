"""Supervised tuning written out slowly: one document alone, one token at a time, float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mistill.text.blocks import Document


def loss(model: Any, documents: Sequence[Document]) -> Tensor:
    """Mean -log p(token) over the tokens that the masks mark, each document read by itself."""
    nats: list[Tensor] = []
    for document in documents:
        logits = model(torch.tensor(document.ids[None]), use_cache=False).logits[0].double()
        for place in range(1, len(document.ids)):
            if document.mask[place]:
                before = torch.log_softmax(logits[place - 1], dim=-1)
                nats.append(-before[document.ids[place]])
    return torch.stack(nats).mean()


def noise_length(lengths: Sequence[int], width: int, alpha: float) -> float:
    """The expected square of the noise of some documents (NEFTune, section 3)."""
    # A uniform number from -1 to 1 has a mean square of a third; a document of L tokens has L D.
    return float(sum(n * width * (alpha / np.sqrt(n * width)) ** 2 / 3 for n in lengths))
