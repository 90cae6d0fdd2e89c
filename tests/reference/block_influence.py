"""Block influence written out: one document at a time, one position at a time, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def block_influence(model: Any, documents: Sequence[Sequence[int]]) -> list[float]:
    """BI_l = 1 - E[cos(x_l, x_{l+1})] of equation 2 of ShortGPT, over all positions."""
    layers = model.model.layers
    turned: list[list[float]] = [[] for _ in layers]
    behind_the_last: list[torch.Tensor] = []
    # The last of transformers' hidden states has been through the final norm.
    hook = layers[-1].register_forward_hook(lambda _, __, out: behind_the_last.append(out))
    for ids in documents:
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
        states = [state[0].double().numpy() for state in output.hidden_states[:-1]]
        states.append(behind_the_last.pop()[0].double().numpy())
        for layer, (before, after) in enumerate(itertools.pairwise(states)):
            for x, y in zip(before, after, strict=True):
                cosine = np.dot(x, y) / (np.sqrt(np.dot(x, x)) * np.sqrt(np.dot(y, y)))
                turned[layer].append(1 - cosine)
    hook.remove()
    return [sum(values) / len(values) for values in turned]
