"""A comparison as one self-contained HTML page.

The page loads nothing, and its content security policy forbids it to. It can be read without
scripts; the script (``page.js``) sorts and filters the table, shows the model and the commands
behind each disc, and answers which model to ship.
"""

from __future__ import annotations

import base64
import hashlib
import math
from importlib.resources import files
from typing import Any

from benchmarks.figures.column import MEGABYTE, Column, significant
from benchmarks.figures.comparison import Comparison
from benchmarks.figures.frontier import SAME_NATS, SAME_RATIO, dominators
from benchmarks.figures.model_result import ModelResult
from benchmarks.picture.drawing import picture_style, to_svg
from benchmarks.picture.laying_out import draw, role_of
from benchmarks.picture.marks import TALL, WIDE
from benchmarks.report.columns import columns_of
from benchmarks.report.commands import StepDefaults, commands
from benchmarks.report.shipping import best_to_ship, memory_mb, ship_line, speed
from benchmarks.report.table import conditions_in_full, lineage_steps, remarks
from benchmarks.settings import ShipSettings

_BARS = ("size_mb", "mean_kl_nats", "decode_tokens_per_second", "peak_memory_mb")


def html(
    comparison: Comparison,
    ship: ShipSettings | None = None,
    step_defaults: StepDefaults | None = None,
) -> str:
    """Write the page.

    Args:
        comparison: The result.
        ship: Memory and speed that the model to ship must meet, for the answer at the top; half
            the memory of the largest model if not given.
        step_defaults: Gives the defaults of a step, to write the commands of models whose lineage
            was written by an earlier version.

    Returns:
        HTML text.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_part("page.html.jinja"))
    columns = columns_of(comparison.models, comparison.reference)
    beaten = dominators(comparison.models)
    question = ship if ship not in (None, ShipSettings()) else _first_question(comparison)
    script = _part("page.js")
    title, described = "Speed, fidelity and size", in_words(comparison)
    return template.render(
        comparison=comparison,
        cards=_cards(comparison),
        pictures=[
            to_svg(draw(comparison, plane), title, described, plane) for plane in (WIDE, TALL)
        ],
        columns=columns,
        rows=[
            _row(model, columns, comparison, beaten[model.name], commands(model, step_defaults))
            for model in comparison.models
        ],
        conditions=conditions_in_full(comparison),
        ship_line=ship_line(comparison, question),
        ship_mb=_plain(question.ship_mb),
        ship_tps=_plain(question.ship_tps),
        slider=_slider(comparison),
        same_nats=SAME_NATS,
        same_ratio=SAME_RATIO,
        style=picture_style() + _part("page.css"),
        script=script,
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
    )


def _part(name: str) -> str:
    return files("benchmarks.report").joinpath(name).read_text("utf-8")


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _first_question(comparison: Comparison) -> ShipSettings:
    """Half the memory of the largest model, if a model fits into it."""
    half = float(f"{max(map(memory_mb, comparison.models)) / 2:.2g}")
    question = ShipSettings(ship_mb=half)
    return ShipSettings() if best_to_ship(comparison, question) is None else question


def _slider(comparison: Comparison) -> dict[str, str]:
    """Range of the slider over sizes, in about a hundred steps."""
    largest = max(model.footprint.weight_bytes for model in comparison.models) / MEGABYTE
    step = 10.0 ** (math.floor(math.log10(largest)) - 2)
    return {"step": f"{step:g}", "most": f"{math.ceil(largest / step) * step:.6g}"}


def _row(
    model: ModelResult,
    columns: tuple[Column, ...],
    comparison: Comparison,
    dominated_by: tuple[str, ...],
    command_lines: list[str],
) -> dict[str, Any]:
    return {
        "name": model.name,
        "role": role_of(model),
        "kind": model.kind,
        "kl": repr(model.mean_kl),
        "kl_text": significant(model.mean_kl),
        "speed": repr(speed(model)),
        "size": repr(model.footprint.weight_bytes / MEGABYTE),
        "memory": repr(memory_mb(model)),
        "is_reference": model.name == comparison.reference,
        "beaten": _beaten_by(dominated_by),
        "cells": [_cell(column, model, comparison) for column in columns],
        "steps": lineage_steps(model),
        "figures": _figures(model, columns),
        "commands": "\n".join(command_lines),
        "remarks": remarks(model),
        "facts": f"{model.kind}; {model.architecture}, {model.layers} layers of width "
        f"{model.hidden_size}, {model.footprint.parameters / 1e6:,.1f} million weights",
    }


_SHOWN = ("mean_kl_nats", "decode_tokens_per_second", "size_mb", "peak_memory_mb")


def _figures(model: ModelResult, columns: tuple[Column, ...]) -> list[tuple[str, str]]:
    """The figures shown for a disc, with their standard errors."""
    figures = []
    for key in _SHOWN:
        column = next((column for column in columns if column.key == key), None)
        if column is not None and column.figure(model) is not None:
            spread = column.spread_text(model)
            figures.append((column.title, f"{column.text(model)} {column.unit}"))
            if spread.startswith("±"):
                figures[-1] = (column.title, f"{column.text(model)} {spread} {column.unit}")
    return figures


def _beaten_by(names: tuple[str, ...]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return f"beaten by {names[-1]}{more}"


def _cell(column: Column, model: ModelResult, comparison: Comparison) -> dict[str, Any]:
    value = column.figure(model)
    largest = max(filter(None, map(column.figure, comparison.models)), default=0)
    share = value / largest * 100 if value and largest and column.key in _BARS else None
    return {
        "key": column.key,
        "unit": column.unit,
        "text": column.text(model),
        "spread": column.spread_text(model),
        "value": "" if value is None else repr(float(value)),
        "share": None if share is None else f"{share:.1f}",
        "best": _is_best(column, value, comparison),
    }


def _is_best(column: Column, value: float | None, comparison: Comparison) -> bool:
    values = [v for v in map(column.figure, comparison.models) if v is not None]
    if value is None or len(values) < 2:
        return False
    return value == (min(values) if column.better == "lower" else max(values))


def _cards(comparison: Comparison) -> list[dict[str, str]]:
    """The smallest, the fastest and the closest model."""
    others = [model for model in comparison.models if model.name != comparison.reference]
    if not others:
        return []
    smallest = min(others, key=lambda model: model.footprint.weight_bytes)
    fastest = max(others, key=lambda model: model.latency.decode_tokens_per_second)
    closest = min(others, key=lambda model: model.mean_kl)
    assert closest.fidelity is not None, "only the reference has no distance from itself"
    size, speed = smallest.footprint, fastest.latency.decode_tokens_per_second
    return [
        {
            "title": "Smallest",
            "figure": significant(size.weight_bytes / 1e6),
            "unit": "MB",
            "name": smallest.name,
            "note": _size_note(smallest, comparison),
        },
        {
            "title": "Fastest",
            "figure": significant(speed),
            "unit": "tokens/s",
            "name": fastest.name,
            "note": _speed_note(fastest, comparison),
        },
        {
            "title": "Closest",
            "figure": significant(closest.mean_kl),
            "unit": "nats",
            "name": closest.name,
            "note": f"the same token as {comparison.reference} "
            f"{closest.fidelity.top1_agreement:.0%} of the time",
        },
    ]


def _size_note(model: ModelResult, comparison: Comparison) -> str:
    largest = max(comparison.models, key=lambda other: other.footprint.weight_bytes)
    ratio = largest.footprint.weight_bytes / model.footprint.weight_bytes
    return f"{ratio:.1f} times smaller than {largest.name}"


def _speed_note(model: ModelResult, comparison: Comparison) -> str:
    speed = model.latency.decode_tokens_per_second
    rivals = [other for other in comparison.models if other.transformers_latency]
    if rivals:
        alike = [
            other
            for other in rivals
            if (other.layers, other.hidden_size) == (model.layers, model.hidden_size)
        ]
        rival = min(alike or rivals, key=lambda other: other.mean_kl)
        ratio = comparison.speedup(model.name, over=rival.name)
        return f"{ratio:.1f} times transformers' generate on {rival.name}"
    slowest = min(comparison.models, key=lambda other: other.latency.decode_tokens_per_second)
    ratio = speed / slowest.latency.decode_tokens_per_second
    return f"{ratio:.1f} times {slowest.name}"


def in_words(comparison: Comparison) -> str:
    """A description of the picture for screen readers.

    Args:
        comparison: The result.

    Returns:
        Speed, KL and size, model by model.
    """
    return "; ".join(
        f"{model.name}: {significant(model.latency.decode_tokens_per_second)} tokens per second, "
        f"KL {significant(model.mean_kl)} nats, {model.footprint.weight_bytes / 1e6:,.0f} megabytes"
        for model in comparison.models
    )
