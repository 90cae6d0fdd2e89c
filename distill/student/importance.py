"""Which parts of a teacher matter: everything that one walk through its layers can tell.

Block influence: a layer whose output points where its input pointed has changed little, and a
model without it changes little. It is one minus the cosine between the two, averaged over
positions of text:

    BI_l = 1 - E[ cos(x_l, x_{l+1}) ]

(Men et al., 2024, section 3.1, https://arxiv.org/abs/2403.03853). As in the paper the layers with
the least influence go, wherever they stand: the first and the last are not protected, and need no
protection, because the measure itself keeps them.

The same walk collects angular distances (``distill/student/angular.py``) and activations
(``distill/student/width.py``), which cost little beside it, so that one pass over a teacher is
enough for students of any shape.

N is blocks, T positions, D width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.student.angular import angular_distances, sampled_positions
from distill.student.width import WidthGauge, WidthScores
from mistill.errors import FolderError
from mistill.progress import track
from mistill.pytorch.layers import Batch, LayeredModel, accelerator_or_cpu, per_batch

if TYPE_CHECKING:
    from mistill.text.blocks import TokenBlocks


@dataclass(frozen=True)
class TeacherScores:
    """What a walk through a teacher tells.

    Attributes:
        influence: Block influence of each layer, 0 (turns nothing) to 2.
        angular: Angular distance between every two depths, float64, shape (L + 1, L + 1).
        width: How much neurons, groups and channels are used.
    """

    influence: tuple[float, ...]
    angular: Tensor
    width: WidthScores


# --- choosing -----------------------------------------------------------------------------------


def most_influential(influence: Sequence[float], count: int) -> tuple[int, ...]:
    """The layers to keep so that those with the least influence go.

    Args:
        influence: Influence of each layer.
        count: How many to keep.

    Returns:
        Their places in ascending order; of layers that tie, the first ones.
    """
    ranked = sorted(range(len(influence)), key=lambda layer: -influence[layer])
    return tuple(sorted(ranked[:count]))


def evenly_spaced(total: int, count: int) -> tuple[int, ...]:
    """Layers at equal distances, the first and the last among them.

    Args:
        total: Layers there are.
        count: How many to keep, from 1 to ``total``.

    Returns:
        Their places in ascending order, rounded up where two are equally near.
    """
    if count == 1:
        return (0,)
    steps = count - 1
    return tuple((2 * step * (total - 1) + steps) // (2 * steps) for step in range(count))


# --- measuring ----------------------------------------------------------------------------------


def measure_scores(teacher: Path, blocks: TokenBlocks) -> TeacherScores:
    """Measure on text how much every part of a teacher does.

    One layer is in memory at a time, in float32, with the hidden states of all the text: a
    teacher of 7B is measured in about 2 GiB.

    Args:
        teacher: A float folder of a readable architecture.
        blocks: The text; positions of padding do not count.

    Returns:
        Scores of its layers and of the parts of them.

    Raises:
        FolderError: If the teacher computes something that is not a number.
    """
    model = LayeredModel(teacher, accelerator_or_cpu())
    gauge = WidthGauge(int(model.config.num_key_value_heads))
    influence = []
    with torch.inference_mode(), track("scores", len(model), "layers") as bar:
        batches = model.batches(blocks)
        sample = sampled_positions(torch.cat([batch.present for batch in batches]))
        sampled = per_batch(sample, batches)
        states = [_states_at(sampled, batches)]
        for index in range(len(model)):
            with model.layer(index) as layer, gauge.watching(layer):
                turned = 0.0
                for batch in batches:
                    gauge.look_at(batch.present)
                    after = batch.through(layer)
                    turns = turn(batch.hidden, after)[batch.present]
                    turned += turns.sum(dtype=torch.float64).item()
                    batch.hidden = after
            influence.append(turned / blocks.tokens)
            if not math.isfinite(influence[-1]):
                raise FolderError(
                    f"layer {index} of {teacher} computes values that are not numbers; its "
                    "weights are damaged"
                )
            states.append(_states_at(sampled, batches))
            bar.advance()
        norm = model.final_norm()
        with gauge.watching_norm(norm):
            for batch in batches:
                gauge.look_at(batch.present)
                norm(batch.hidden)
    return TeacherScores(tuple(influence), angular_distances(states), gauge.scores())


def _states_at(sampled: Sequence[Tensor], batches: Sequence[Batch]) -> Tensor:
    """The hidden states at some positions of each batch, on the CPU, shape (S, D)."""
    pairs = zip(batches, sampled, strict=True)
    return torch.cat([batch.hidden[positions].cpu() for batch, positions in pairs])


def turn(before: Tensor, after: Tensor) -> Tensor:
    """How far hidden states turn on their way: one minus the cosine.

    Args:
        before: Shape (..., D).
        after: Shape (..., D).

    Returns:
        Shape (...), 0 (same direction) to 2 (opposite).
    """
    return 1 - torch.cosine_similarity(before, after, dim=-1)
