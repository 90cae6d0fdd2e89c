"""The picture of a comparison: speed to the right, fidelity upwards, size as the area of a disc.

It is laid out as a list of marks in a plane, and drawn as SVG for the page, whose colours follow
the reader's theme, and as files of SVG and PNG (``drawing``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from benchmarks.figures.column import MEGABYTE, significant
from benchmarks.figures.comparison import Comparison
from benchmarks.figures.frontier import dominators
from benchmarks.figures.model_result import ModelResult
from benchmarks.picture.labels import place_names, width_of
from benchmarks.picture.marks import WIDE, Disc, Mark, Plane, Point, Stroke, Words
from benchmarks.picture.scales import NOISE_NATS, Scale, divergence_scale, speed_scale

_LEGEND_ROW = 26
_ENGINES = ("llama-cpp", "genai", "openvino", "ctranslate2")


def draw(comparison: Comparison, plane: Plane = WIDE) -> list[Mark]:
    """Lay out the picture.

    Args:
        comparison: The result.
        plane: Size and margins of the picture.

    Returns:
        Marks, in the order of drawing.
    """
    models = comparison.models
    legend, rows = _legend(models, plane)
    plane = replace(plane, top=plane.top + (rows - 1) * _LEGEND_ROW)
    across = speed_scale([model.latency.decode_tokens_per_second for model in models], plane)
    down = divergence_scale([model.mean_kl for model in models], plane)
    beaten = dominators(models)
    discs = [_disc(m, models, across, down, plane, bool(beaten[m.name])) for m in models]
    stairs = _frontier(models, across, down)
    marks: list[Mark] = [*legend, *_frame(comparison, across, down, plane), stairs]
    largest_first = sorted(discs, key=lambda disc: -disc.radius)
    marks += largest_first
    marks += [stroke for model in models for stroke in _spreads(model, across, down)]
    marks += place_names(discs, [stairs], plane)
    return marks


def role_of(model: ModelResult) -> str:
    """The role of a model's disc, which decides its colour.

    Args:
        model: The result.

    Returns:
        The form of a model of our own, the engine of a rival.
    """
    if model.rival is not None:
        engine = model.rival.engine.replace(".", "-")
        return engine if engine in _ENGINES else "other"
    return model.form


def _disc(
    model: ModelResult,
    models: Sequence[ModelResult],
    across: Scale,
    down: Scale,
    plane: Plane,
    hollow: bool,
) -> Disc:
    largest = max(other.footprint.weight_bytes for other in models)
    speed = model.latency.decode_tokens_per_second
    return Disc(
        centre=(across.place(speed), down.place(model.mean_kl)),
        radius=_radius(model.footprint.weight_bytes, largest, plane),
        role=role_of(model),
        hollow=hollow,
        name=model.name,
        hint=f"{model.name}: {significant(speed)} tokens/s, KL {significant(model.mean_kl)} nats, "
        f"{_megabytes(model.footprint.weight_bytes)}, {model.kind}",
    )


def _radius(size: float, largest: float, plane: Plane) -> float:
    return max(plane.smallest_radius, plane.largest_radius * math.sqrt(size / largest))


def _megabytes(size: float) -> str:
    return f"{size / MEGABYTE:,.0f} MB" if size >= 10 * MEGABYTE else f"{size / MEGABYTE:.3g} MB"


def _frame(comparison: Comparison, across: Scale, down: Scale, plane: Plane) -> list[Mark]:
    left, right, top, bottom = plane.left, plane.right, plane.top, plane.bottom
    marks: list[Mark] = []
    for tick in across.ticks:
        x = across.place(tick)
        marks.append(Stroke(((x, top), (x, bottom)), "grid"))
        marks.append(Words((x, bottom + 22), f"{tick:g}", "tick", "middle"))
    for tick in down.ticks:
        y = down.place(tick)
        marks.append(Stroke(((left, y), (right, y)), "grid"))
        marks.append(
            Words((left - 12, y + 4.5), significant(tick, 1 if tick < 1 else 2), "tick", "end")
        )
    if down.zero is not None:
        marks.append(Stroke(((left, down.zero), (right, down.zero)), "zero"))
        marks.append(Words((left - 12, down.zero + 4.5), "0", "tick", "end"))
    marks.append(Stroke(((left, bottom), (right, bottom)), "axis"))
    marks.append(
        Words(
            ((left + right) / 2, bottom + 50), "tokens written per second →", "axis-name", "middle"
        )
    )
    marks.append(
        Words(
            (left - 66 if left > 80 else 15, (top + bottom) / 2),
            f"← KL to {comparison.reference}, nats",
            "axis-name",
            "middle",
            turned=True,
        )
    )
    marks.append(Words((right, top + 14), "closer and faster ↗", "hint", "end"))
    return marks


def _legend(models: Sequence[ModelResult], plane: Plane) -> tuple[list[Mark], int]:
    """The legend of colours and areas, and its number of rows."""
    entries = [(role_of(model), _engine(model), 7.0) for model in models]
    if any(dominators(models).values()):
        entries.append(("any", "beaten by another", 7.0))
    largest = max(model.footprint.weight_bytes for model in models)
    radius = 12.0
    size = _megabytes(largest * (radius / plane.largest_radius) ** 2)
    entries.append(("any-size", f"{size} on disk", radius))
    marks: list[Mark] = []
    start = 16.0 if plane.width < 600 else float(plane.left)
    x, row = start, 0
    for role, label, r in dict.fromkeys(entries):
        wide = 2 * r + 7 + width_of(label, "legend")
        if x > start and x + wide > plane.right:
            x, row = start, row + 1
        y = 29.0 + row * _LEGEND_ROW
        marks.append(Disc((x + r, y), r, role, hollow=role == "any"))
        marks.append(Words((x + 2 * r + 7, y + 5), label, "legend"))
        x += wide + 22
    return marks, row + 1


def _engine(model: ModelResult) -> str:
    return model.kind if model.rival is None else model.rival.engine


def _frontier(models: Sequence[ModelResult], across: Scale, down: Scale) -> Stroke:
    """The Pareto frontier of speed and fidelity, as stairs.

    It is empty where one model is both the fastest and the closest.
    """
    best = math.inf
    corners: list[Point] = []
    for model in sorted(models, key=lambda m: (-m.latency.decode_tokens_per_second, m.mean_kl)):
        if model.mean_kl < best:
            best = model.mean_kl
            speed = model.latency.decode_tokens_per_second
            corners.append((across.place(speed), down.place(model.mean_kl)))
    if len(corners) < 2:
        return Stroke((), "frontier")
    stairs = [corners[0]]
    for (_, lower), (x, y) in pairwise(corners):
        stairs += [(x, lower), (x, y)]
    return Stroke(tuple(stairs), "frontier")


def _spreads(model: ModelResult, across: Scale, down: Scale) -> list[Mark]:
    speed = model.latency.decode_tokens_per_second
    x, y = across.place(speed), down.place(model.mean_kl)
    low, _, high = model.latency.decode_quartiles
    marks: list[Mark] = [
        Stroke(((across.place(low), y), (across.place(high), y)), "spread", model.name)
    ]
    error = model.fidelity and model.fidelity.kl_standard_error
    if error and model.mean_kl > NOISE_NATS:
        ends = [
            down.place(max(model.mean_kl + sign * error, NOISE_NATS * 1.01)) for sign in (1, -1)
        ]
        marks.append(Stroke(((x, ends[0]), (x, ends[1])), "spread", model.name))
    return marks
