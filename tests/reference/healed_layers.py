"""Layers chosen by what healing leaves, written out: every way of every state run from its start.

A state is kept as the layers on the way there, each a copy with its own weights. Models are float64
ones of transformers, fits are numpy's lstsq, documents are run one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.reference.healing import least_squares, stream

Documents = Sequence[Sequence[int]]


def healed_choices(
    teacher: Any, fitted: Documents, judged: Documents, count: int, ridge: float
) -> list[tuple[tuple[int, ...], float]]:
    """The layers that stay, and what they miss, where 0, 1, ... ``count`` layers go."""
    layers = list(teacher.model.layers)
    end = len(layers)
    best: dict[tuple[int, int], tuple[float, list[tuple[int, Any]]]] = {(0, 0): (0.0, [])}
    for depth in range(end):
        for dropped in range(count + 1):
            if (depth, dropped) not in best:
                continue
            _, way = best[depth, dropped]
            for gap in range(min(count - dropped, end - depth - 1) + 1):
                layer = copy.deepcopy(layers[depth])
                student = _model([*(one for _, one in way), layer], teacher)
                _heal(teacher, student, depth, gap, fitted, ridge)
                place = depth + 1 + gap, dropped + gap
                missed = (
                    _missed(teacher, student, depth + gap, judged)
                    if place[0] < end
                    else _kl(teacher, student, judged)
                )
                if place not in best or missed < best[place][0]:
                    best[place] = missed, [*way, (depth, layer)]
    ends = [best[end, dropped] for dropped in range(count + 1)]
    return [(tuple(layer for layer, _ in way), missed) for missed, way in ends]


def _model(layers: Sequence[Any], teacher: Any) -> Any:
    """The teacher with other layers, which are shared and not copied."""
    student = copy.copy(teacher)
    student._modules = dict(teacher._modules)
    student._modules["model"] = inner = copy.copy(teacher.model)
    inner._modules = dict(teacher.model._modules)
    inner._modules["layers"] = torch.nn.ModuleList(layers)
    inner.config = copy.deepcopy(teacher.config)
    inner.config.num_hidden_layers = len(layers)
    return student


def _heal(
    teacher: Any, student: Any, depth: int, gap: int, documents: Documents, ridge: float
) -> None:
    """Refit the last layer of a student to stand for some layers of the teacher."""
    ours, theirs = student.model.layers[-1], teacher.model.layers
    middle = stream(teacher, documents, theirs[depth].post_attention_layernorm, "input")
    x = stream(student, documents, ours.self_attn.o_proj, "input")
    now = stream(student, documents, ours.post_attention_layernorm, "input")
    _refit(ours.self_attn.o_proj, x, middle - now, middle, ridge)
    own = stream(teacher, documents, theirs[depth], "output")
    behind = stream(teacher, documents, theirs[depth + gap], "output")
    x = stream(student, documents, ours.mlp.down_proj, "input")
    now = stream(student, documents, ours, "output")
    _refit(ours.mlp.down_proj, x, behind - now, own, ridge)


def _refit(
    matrix: Any,
    x: NDArray[np.float64],
    missed: NDArray[np.float64],
    size: NDArray[np.float64],
    ridge: float,
) -> None:
    change = least_squares(x, missed, 1 / (size**2).mean(axis=1), ridge)
    with torch.no_grad():
        matrix.weight += torch.from_numpy(change)


def _missed(teacher: Any, student: Any, last: int, documents: Documents) -> float:
    """Mean square of what the stream misses, as a share of the teacher's, behind the gains."""
    gains = teacher.model.layers[last + 1].input_layernorm.weight.detach().numpy()
    target = gains * stream(teacher, documents, teacher.model.layers[last], "output")
    now = gains * stream(student, documents, student.model.layers[-1], "output")
    return float((((target - now) ** 2).mean(axis=1) / (target**2).mean(axis=1)).mean())


def _kl(teacher: Any, student: Any, documents: Documents) -> float:
    """KL(teacher || student) at every token that another one follows."""
    nats = []
    with torch.no_grad():
        for ids in documents:
            logs = [
                model.lm_head(
                    model.model(torch.tensor([list(ids)]), use_cache=False)[0]
                ).log_softmax(-1)[0, :-1]
                for model in (teacher, student)
            ]
            nats.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
    return float(torch.cat(nats).mean())
