"""The figures of a comparison.

The terminal, the Markdown, the page and the summary in the JSON all take their columns from here,
so that a figure has the same name and the same meaning everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.figures.column import MEGABYTE, Column, rate, whole
from benchmarks.figures.model_result import ModelResult
from benchmarks.report.quality_columns import QUALITY_COLUMNS
from benchmarks.report.timing_columns import SPEED_COLUMNS, timing_columns

COLUMNS = (
    Column(
        key="size_mb",
        title="Size",
        unit="MB",
        meaning="Bytes on disk of the files that hold weights, in millions.",
        figure=lambda model: model.footprint.weight_bytes / MEGABYTE,
        write=rate,
        better="lower",
        nature="bytes",
    ),
    Column(
        key="bits_per_weight",
        title="Bits per weight",
        unit="",
        meaning="Bits on disk for each weight of the dense model; scales, zero points and tables "
        "are counted.",
        figure=lambda model: model.footprint.bits_per_weight,
        write=lambda value: f"{value:.2f}",
        better="lower",
        nature="bytes",
    ),
    *QUALITY_COLUMNS,
    *SPEED_COLUMNS,
    Column(
        key="peak_memory_mb",
        title="Memory",
        unit="MB",
        meaning="Peak memory of a process that ran only this model, in millions of bytes: Python, "
        "libraries, weights and KV cache.",
        figure=lambda model: model.footprint.peak_memory_bytes / MEGABYTE,
        write=whole,
        better="lower",
        nature="memory",
    ),
)


def columns_of(models: Sequence[ModelResult], reference: str) -> tuple[Column, ...]:
    """The columns with a figure for at least one model.

    The distance from the parent is left out where every parent is the reference.

    Args:
        models: The results.
        reference: Name of the model that the others are compared with.

    Returns:
        Columns, in the order of reading.
    """
    parents = {model.parent for model in models} - {None, reference}
    return tuple(
        column
        for column in (*COLUMNS, *timing_columns(models))
        if any(column.figure(model) is not None for model in models)
        and (column.key != "mean_parent_kl_nats" or parents)
    )


def summary(model: ModelResult) -> dict[str, Any]:
    """The derived figures of one model, for scripts.

    Args:
        model: The result.

    Returns:
        Figures by key; the uncertainty of a figure has the key ``KEY_spread``.
    """
    record: dict[str, Any] = {"slow_token_ms": model.latency.slow_token_seconds * 1000}
    for column in (*COLUMNS, *timing_columns([model])):
        record[column.key] = column.figure(model)
        spread = column.spread(model)
        if spread is not None:
            record[f"{column.key}_spread"] = spread
    return record
