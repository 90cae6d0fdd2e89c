"""Quantize one layer, or the table before or after all of them.

A layer of a 7B model fills a gigabyte, so each stage computes what it needs and drops it before the
next: the Hessian once it is factored, the factor once the matrices of the stage are quantized.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from mistill.errors import FolderError
from mistill.pytorch.layers import Batch
from mistill.pytorch.stages import (
    STAGES,
    kept_rows,
    layer_stages,
    matrices,
    mean_drift,
    mean_outer_product,
)
from mistill.training.memory import give_back
from mistill.weights.gptq_layout import HEAD, QuantizedWeight
from quantize.gptq.gptq import ROWS_AT_ONCE, GptqResult, Walk, make_walk, walk_weight
from quantize.settings import GptqSettings

# Called with the name of a matrix, its codes, and the seconds they took.
Store = Callable[[str, GptqResult, float], None]

# Rows of a table that are turned into float32 at once.
_TABLE_ROWS = 8192


@dataclass
class _Matrix:
    """A matrix that is to be quantized, and how."""

    name: str
    module: nn.Linear
    settings: GptqSettings


@dataclass
class _Stage:
    """Matrices that share their inputs, the factors of their Hessian, and the time these took."""

    matrices: list[_Matrix]
    walks: dict[int, Walk]
    seconds: float


def quantize_layer(
    layer: nn.Module,
    index: int,
    batches: Sequence[Batch],
    settings: GptqSettings,
    store: Store,
    floats: Sequence[Batch] = (),
) -> None:
    """Quantize the matrices of one layer, and move the calibration text past it.

    Args:
        layer: A decoder layer in float32; its weights become those that the codes stand for.
        index: Its place in the model.
        batches: What enters the layer; afterwards, what leaves it when quantized.
        settings: How to quantize.
        store: Takes each result.
        floats: For GPTAQ, what enters the layer of the float model; afterwards, what leaves it.

    Raises:
        FolderError: If the inputs of a matrix are not finite numbers.
    """
    flow, float_flow = layer_stages(layer, batches), layer_stages(layer, floats)
    ahead = next(float_flow)
    stages = []
    for names in STAGES:
        inputs, float_inputs = kept_rows(next(flow), batches), kept_rows(ahead, floats)
        # The float model passes this stage while its matrices are still its own.
        ahead = next(float_flow)
        selected = _selected(layer, f"model.layers.{index}", names, settings)
        stage = _prepare(selected, inputs, float_inputs)
        del inputs, float_inputs
        if floats:  # two streams leave twice the holes
            give_back()
        if settings.true_sequential:
            _solve(stage, store)
        else:
            stages.append(stage)
    if settings.true_sequential:
        outputs = next(flow)
    else:
        del flow
        for stage in stages:
            _solve(stage, store)
        *_, outputs = layer_stages(layer, batches)
    give_back()
    for batch, hidden in zip(batches, outputs, strict=True):
        batch.hidden = hidden
    for batch, hidden in zip(floats, ahead, strict=True):
        batch.hidden = hidden


def quantize_head(
    table: Tensor, inputs: Sequence[Tensor], settings: GptqSettings
) -> tuple[GptqResult, float]:
    """Quantize the output head on what reaches it.

    Args:
        table: Shape (V, D), any float type.
        inputs: The hidden states after the last norm, tensors (tokens, D).
        settings: How to quantize; ``bits`` are the head's.

    Returns:
        The codes, and the seconds they took.
    """
    started = time.perf_counter()
    walk = make_walk(_hessian(inputs, HEAD), settings)
    parts = [
        walk_weight(table[start : start + _TABLE_ROWS].float(), walk, settings)
        for start in range(0, len(table), _TABLE_ROWS)
    ]
    return _stacked(parts), time.perf_counter() - started


def _selected(
    layer: nn.Module, prefix: str, names: Sequence[str], settings: GptqSettings
) -> list[_Matrix]:
    """Those matrices of a stage that are not left float, with the settings of each."""
    selected = []
    for name, module in zip(names, matrices(layer, names), strict=True):
        form = settings.format_of(f"{prefix}.{name}")
        if form is not None:
            selected.append(_Matrix(f"{prefix}.{name}", module, settings.with_format(form)))
    return selected


def _prepare(selected: list[_Matrix], inputs: list[Tensor], floats: list[Tensor]) -> _Stage:
    """Factor the Hessian of a stage, once for each order of its columns."""
    if not selected:
        return _Stage([], {}, 0.0)
    started = time.perf_counter()
    H = _hessian(inputs, selected[0].name)
    C = mean_drift(inputs, floats) if floats else None
    walks: dict[int, Walk] = {}
    for matrix in selected:
        key = _walk_key(matrix.settings)
        if key not in walks:
            walks[key] = make_walk(H, matrix.settings, C)
    return _Stage(selected, walks, time.perf_counter() - started)


def _hessian(inputs: Sequence[Tensor], name: str) -> Tensor:
    H = mean_outer_product(inputs)
    # No entry of a mean of x x^T is larger than the largest of its diagonal.
    if not H.diagonal().isfinite().all():
        raise FolderError(
            f"the inputs of {name} are not finite numbers on the calibration text; the model's "
            "weights are damaged, or its training diverged"
        )
    return H


def _walk_key(settings: GptqSettings) -> int:
    return settings.group_size if settings.order == "group" else 0


def _solve(stage: _Stage, store: Store) -> None:
    shared_seconds = stage.seconds / max(1, len(stage.matrices))
    for run in _runs(stage.matrices):
        started = time.perf_counter()
        settings, sizes = run[0].settings, [matrix.module.out_features for matrix in run]
        weights = [matrix.module.weight for matrix in run]
        stacked = weights[0] if len(run) == 1 else torch.cat(weights)
        result = walk_weight(stacked, stage.walks[_walk_key(settings)], settings)
        del stacked, weights
        seconds = shared_seconds + (time.perf_counter() - started) / len(run)
        for matrix, part in zip(run, result.split(sizes), strict=True):
            matrix.module.weight.copy_(torch.from_numpy(part.weight.dequantize()))
            store(matrix.name, part, seconds)
    stage.walks.clear()


def _runs(selected: Sequence[_Matrix]) -> Iterator[list[_Matrix]]:
    """Matrices with the same settings together, as long as their rows can be walked at once."""
    run: list[_Matrix] = []
    for matrix in selected:
        rows = sum(m.module.out_features for m in [*run, matrix])
        if run and (rows > ROWS_AT_ONCE or run[0].settings != matrix.settings):
            yield run
            run = []
        run.append(matrix)
    if run:
        yield run


def _stacked(parts: Sequence[GptqResult]) -> GptqResult:
    weight: QuantizedWeight = replace(
        parts[0].weight,
        codes=np.concatenate([part.weight.codes for part in parts]),
        scales=np.concatenate([part.weight.scales for part in parts]),
        zeros=np.concatenate([part.weight.zeros for part in parts]),
    )
    return replace(parts[0], weight=weight, losses=torch.cat([part.losses for part in parts]))
