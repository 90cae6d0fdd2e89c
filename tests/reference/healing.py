"""Healing in closed form, slowly: whole models in float64, whole texts in memory, numpy's lstsq.

For every matrix the student is run anew from its first layer, and the ridge is written as rows
under the inputs instead of as a term of the normal equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def heal(
    teacher: Any,
    student: Any,
    layers: Sequence[int],
    documents: Sequence[Sequence[int]],
    ridge: float,
    channels: Sequence[int] | None = None,
) -> None:
    """Refit the output matrices of a student in place; both are float64 models of transformers."""
    ends = [*(layer - 1 for layer in layers[1:]), len(teacher.model.layers) - 1]
    for index, (layer, end) in enumerate(zip(layers, ends, strict=True)):
        ours, theirs = student.model.layers[index], teacher.model.layers[layer]
        middle = stream(teacher, documents, theirs.post_attention_layernorm, "input")
        behind = stream(teacher, documents, teacher.model.layers[end], "output")
        if channels is not None:
            middle, behind = middle[:, list(channels)], behind[:, list(channels)]
        x = stream(student, documents, ours.self_attn.o_proj, "input")
        now = stream(student, documents, ours.post_attention_layernorm, "input")
        refit(ours.self_attn.o_proj, x, middle - now, 1 / (middle**2).mean(axis=1), ridge)
        x = stream(student, documents, ours.mlp.down_proj, "input")
        now = stream(student, documents, ours, "output")
        refit(ours.mlp.down_proj, x, behind - now, 1 / (behind**2).mean(axis=1), ridge)


def stream(
    model: Any, documents: Sequence[Sequence[int]], module: torch.nn.Module, side: str
) -> NDArray[np.float64]:
    """What enters or leaves a module at every token of every document, each run alone."""
    seen: list[torch.Tensor] = []

    def look(_: Any, inputs: Any, output: Any) -> None:
        value = inputs[0] if side == "input" else output
        seen.append((value[0] if isinstance(value, tuple) else value)[0])

    handle = module.register_forward_hook(look)
    with torch.inference_mode():
        for ids in documents:
            model(torch.tensor([list(ids)]), use_cache=False)
    handle.remove()
    return torch.cat(seen).numpy()


def refit(
    matrix: Any,
    x: NDArray[np.float64],
    missed: NDArray[np.float64],
    weights: NDArray[np.float64],
    ridge: float,
) -> None:
    change = least_squares(x, missed, weights, ridge)
    with torch.no_grad():
        matrix.weight += torch.from_numpy(change)


def least_squares(
    x: NDArray[np.float64],
    missed: NDArray[np.float64],
    weights: NDArray[np.float64],
    ridge: float,
) -> NDArray[np.float64]:
    """The change of a matrix, shape (N, K)."""
    root = np.sqrt(weights)[:, None]
    x, missed = x * root, missed * root
    K = x.shape[1]
    penalty = np.sqrt(ridge * (x**2).sum() / K) * np.eye(K)
    below = np.zeros((K, missed.shape[1]))
    solution = np.linalg.lstsq(np.vstack([x, penalty]), np.vstack([missed, below]), rcond=None)[0]
    change: NDArray[np.float64] = solution.T
    return change
