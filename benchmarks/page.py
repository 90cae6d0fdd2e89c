"""A comparison as one page that holds everything it needs.

The page asks for nothing from outside, and says so itself in its content security policy: a
browser would refuse. It reads without a script; the script sorts the table and ties rows to discs.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from benchmarks.columns import Column, columns_of, significant
from benchmarks.comparison import Comparison, ModelResult
from benchmarks.frontier import dominators
from benchmarks.picture import draw, to_svg
from benchmarks.table import conditions_in_full, road_steps

_BARS = ("size_mb", "mean_kl_nats", "decode_tokens_per_second", "peak_memory_mb")


def html(comparison: Comparison) -> str:
    """Write the page.

    Args:
        comparison: The result.

    Returns:
        HTML text.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("benchmarks").joinpath("page.html.jinja").read_text())
    columns = columns_of(comparison)
    beaten = dominators(comparison.models)
    return template.render(
        comparison=comparison,
        cards=_cards(comparison),
        picture=to_svg(draw(comparison), "Speed, fidelity and size", _in_words(comparison)),
        columns=columns,
        rows=[_row(model, columns, comparison, beaten[model.name]) for model in comparison.models],
        conditions=conditions_in_full(comparison),
    )


def _row(
    model: ModelResult,
    columns: tuple[Column, ...],
    comparison: Comparison,
    dominated_by: tuple[str, ...],
) -> dict[str, Any]:
    return {
        "name": model.name,
        "form": model.form,
        "kind": model.kind,
        "is_reference": model.name == comparison.reference,
        "beaten": _beaten_by(dominated_by),
        "cells": [_cell(column, model, comparison) for column in columns],
        "steps": road_steps(model),
        "facts": f"{model.architecture}, {model.layers} layers of width {model.hidden_size}, "
        f"{model.footprint.parameters / 1e6:,.1f} million weights",
    }


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
    """What a reader in a hurry wants to know, each with the model that it is true of."""
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


def _in_words(comparison: Comparison) -> str:
    return "; ".join(
        f"{model.name}: {significant(model.latency.decode_tokens_per_second)} tokens per second, "
        f"KL {significant(model.mean_kl)} nats, {model.footprint.weight_bytes / 1e6:,.0f} megabytes"
        for model in comparison.models
    )
