"""Angular distance between depths written out: one position at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def angular_distances(model: Any, documents: Sequence[Sequence[int]]) -> list[list[float]]:
    """d(x^a, x^b) of section 3.2 of Gromov et al., over all positions of some documents."""
    states: list[list[np.ndarray[Any, Any]]] = []
    behind_the_last: list[torch.Tensor] = []
    # The last of transformers' hidden states has been through the final norm.
    hook = model.model.layers[-1].register_forward_hook(
        lambda _, __, out: behind_the_last.append(out)
    )
    for ids in documents:
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
        depths = [*output.hidden_states[:-1], behind_the_last.pop()]
        for position in range(len(ids)):
            states.append([depth[0, position].double().numpy() for depth in depths])
    hook.remove()

    def distance(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
        cosine = np.dot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y))
        return math.acos(max(-1.0, min(1.0, cosine))) / math.pi

    depths_there = range(len(states[0]))
    return [
        [sum(distance(state[a], state[b]) for state in states) / len(states) for b in depths_there]
        for a in depths_there
    ]
