"""The picture of a comparison: speed to the right, fidelity upwards, size as the area of a disc.

The picture is laid out once, as a list of marks in a plane of 1000 by 560 units, and drawn twice:
as SVG for the page, whose colours follow the reader's theme, and as PNG for a README.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from benchmarks.columns import MEGABYTE, significant
from benchmarks.comparison import Comparison, ModelResult
from benchmarks.frontier import dominators
from mistill.errors import missing_extra

WIDTH, HEIGHT = 1000, 560
LEFT, RIGHT, TOP, BOTTOM = 92, 972, 62, 482
LARGEST_RADIUS, SMALLEST_RADIUS = 40.0, 5.0
#: A divergence below this is the rounding of float32 sums, not a difference of models.
NOISE_NATS = 1e-5

_ROOM = 46  # between the ends of the upright axis and the frame: the largest disc fits

Point = tuple[float, float]


@dataclass(frozen=True)
class Stroke:
    """A line.

    Attributes:
        points: Its corners.
        role: What it is; decides how it looks.
    """

    points: tuple[Point, ...]
    role: str


@dataclass(frozen=True)
class Disc:
    """A model.

    Attributes:
        centre: Where it stands.
        radius: Its area is the model's size on disk.
        role: The form of the model; decides the colour.
        hollow: Whether another model beats it at everything.
        name: Of the model; empty for a disc of the legend.
        hint: What a reader sees on pointing at it.
    """

    centre: Point
    radius: float
    role: str
    hollow: bool = False
    name: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Words:
    """A few words.

    Attributes:
        place: Where their baseline begins, is centred or ends.
        text: The words.
        role: What they are; decides how they look.
        anchor: ``start``, ``middle`` or ``end``.
        turned: Whether they run upwards.
        name: Of the model that they belong to; may be empty.
    """

    place: Point
    text: str
    role: str
    anchor: str = "start"
    turned: bool = False
    name: str = ""


Mark = Stroke | Disc | Words


# --- laying out ---------------------------------------------------------------------------------


def draw(comparison: Comparison) -> list[Mark]:
    """Lay out the picture.

    Args:
        comparison: The result.

    Returns:
        Marks, in the order of drawing.
    """
    models = comparison.models
    across = speed_scale([model.latency.decode_tokens_per_second for model in models])
    down = divergence_scale([model.mean_kl for model in models])
    beaten = dominators(models)
    discs = [_disc(model, models, across, down, bool(beaten[model.name])) for model in models]
    stairs = _frontier(models, across, down)
    marks: list[Mark] = [*_frame(comparison, across, down), *stairs]
    largest_first = sorted(discs, key=lambda disc: -disc.radius)
    marks += largest_first
    marks += [stroke for model in models for stroke in _spreads(model, across, down)]
    marks += _names(discs, [box for stroke in stairs for box in _along(stroke)])
    return marks


@dataclass(frozen=True)
class Scale:
    """Where a value stands on an axis.

    Attributes:
        first: The value at the left or at the top.
        last: The value at the right or at the bottom.
        start: Position of the first, in units of the plane.
        end: Position of the last.
        logarithmic: Whether equal steps are equal ratios.
        ticks: Values to be named.
        zero: Position of all that is too small to be told from 0, on a logarithmic axis.
    """

    first: float
    last: float
    start: float
    end: float
    logarithmic: bool
    ticks: tuple[float, ...]
    zero: float | None = None

    def place(self, value: float) -> float:
        """Where a value stands.

        Args:
            value: The value; held to the ends of the axis.

        Returns:
            Position in units of the plane.
        """
        if self.zero is not None and value <= NOISE_NATS:
            return self.zero
        held = min(max(value, self.first), self.last)
        share = (
            math.log(held / self.first) / math.log(self.last / self.first)
            if self.logarithmic
            else (held - self.first) / (self.last - self.first)
        )
        return self.start + share * (self.end - self.start)


def speed_scale(speeds: Sequence[float]) -> Scale:
    """A logarithmic axis for tokens per second, with room beside the outermost.

    Args:
        speeds: At least one, above 0.

    Returns:
        The axis, from left to right.
    """
    first, last = min(speeds) / 1.35, max(speeds) * 1.35
    steps = (1, 2, 5) if last / first > 5 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    return Scale(
        first=first,
        last=last,
        start=LEFT,
        end=RIGHT,
        logarithmic=True,
        ticks=tuple(tick for tick in _decades(first, last, steps) if first <= tick <= last),
    )


def divergence_scale(divergences: Sequence[float]) -> Scale:
    """An axis for divergences, 0 at the top.

    Linear where all that differ from 0 are of one size, else logarithmic with a line of its own
    for 0.

    Args:
        divergences: At least one, in nats.

    Returns:
        The axis, from top to bottom.
    """
    real = [value for value in divergences if value > NOISE_NATS]
    if not real or max(real) / min(real) < 20:
        last = 1.05 * max(real, default=1.0)
        step = _round_step(last / 5)
        ticks = tuple(step * count for count in range(math.floor(last / step) + 1))
        return Scale(0.0, last, TOP + _ROOM, BOTTOM - _ROOM, False, ticks)
    first, last = min(real) / 1.2, max(real) * 1.2
    ticks = tuple(tick for tick in _decades(first, last, (1,)) if first <= tick <= last)
    if len(ticks) < 3:
        ticks = tuple(t for t in _decades(first, last, (1, 2, 5)) if first <= t <= last)
    has_zero = any(value <= NOISE_NATS for value in divergences)
    zero = TOP + _ROOM if has_zero else None
    start = TOP + 2 * _ROOM if has_zero else TOP + _ROOM
    return Scale(first, last, start, BOTTOM - _ROOM, True, ticks, zero)


def _decades(first: float, last: float, steps: Sequence[float]) -> list[float]:
    low, high = math.floor(math.log10(first)), math.ceil(math.log10(last))
    return [
        float(f"{step * 10.0**exponent:.6g}") for exponent in range(low, high + 1) for step in steps
    ]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)


def _disc(
    model: ModelResult, models: Sequence[ModelResult], across: Scale, down: Scale, hollow: bool
) -> Disc:
    largest = max(other.footprint.weight_bytes for other in models)
    speed = model.latency.decode_tokens_per_second
    return Disc(
        centre=(across.place(speed), down.place(model.mean_kl)),
        radius=_radius(model.footprint.weight_bytes, largest),
        role=model.form,
        hollow=hollow,
        name=model.name,
        hint=f"{model.name}: {significant(speed)} tokens/s, KL {significant(model.mean_kl)} nats, "
        f"{_megabytes(model.footprint.weight_bytes)}, {model.kind}",
    )


def _radius(size: float, largest: float) -> float:
    return max(SMALLEST_RADIUS, LARGEST_RADIUS * math.sqrt(size / largest))


def _megabytes(size: float) -> str:
    return f"{size / MEGABYTE:,.0f} MB" if size >= 10 * MEGABYTE else f"{size / MEGABYTE:.3g} MB"


def _frame(comparison: Comparison, across: Scale, down: Scale) -> list[Mark]:
    marks: list[Mark] = []
    for tick in across.ticks:
        x = across.place(tick)
        marks.append(Stroke(((x, TOP), (x, BOTTOM)), "grid"))
        marks.append(Words((x, BOTTOM + 22), f"{tick:g}", "tick", "middle"))
    for tick in down.ticks:
        y = down.place(tick)
        marks.append(Stroke(((LEFT, y), (RIGHT, y)), "grid"))
        marks.append(
            Words((LEFT - 12, y + 4.5), significant(tick, 1 if tick < 1 else 2), "tick", "end")
        )
    if down.zero is not None:
        marks.append(Stroke(((LEFT, down.zero), (RIGHT, down.zero)), "zero"))
        marks.append(Words((LEFT - 12, down.zero + 4.5), "0", "tick", "end"))
    marks.append(Stroke(((LEFT, BOTTOM), (RIGHT, BOTTOM)), "axis"))
    marks.append(
        Words(
            ((LEFT + RIGHT) / 2, BOTTOM + 50), "tokens written per second →", "axis-name", "middle"
        )
    )
    marks.append(
        Words(
            (26, (TOP + BOTTOM) / 2),
            f"← KL to {comparison.reference}, nats",
            "axis-name",
            "middle",
            turned=True,
        )
    )
    marks.append(Words((RIGHT, TOP + 14), "closer and faster ↗", "hint", "end"))
    return [*marks, *_legend(comparison.models)]


def _legend(models: Sequence[ModelResult]) -> list[Mark]:
    marks: list[Mark] = []
    x = float(LEFT)
    for model in {model.form: model for model in models}.values():
        marks.append(Disc((x + 7, 29), 7, model.form))
        marks.append(Words((x + 21, 34), model.kind, "legend"))
        x += 21 + _width(model.kind, "legend") + 24
    if any(dominators(models).values()):
        marks.append(Disc((x + 7, 29), 7, "any", hollow=True))
        words = "beaten by another"
        marks.append(Words((x + 21, 34), words, "legend"))
        x += 21 + _width(words, "legend") + 24
    largest = max(model.footprint.weight_bytes for model in models)
    radius = 12.0
    words = f"= {_megabytes(largest * (radius / LARGEST_RADIUS) ** 2)} on disk"
    x = RIGHT - _width(words, "legend")
    marks.append(Disc((x - radius - 8, 29), radius, "any-size"))
    marks.append(Words((RIGHT, 34), words, "legend", "end"))
    return marks


def _frontier(models: Sequence[ModelResult], across: Scale, down: Scale) -> list[Stroke]:
    """The stairs of speed and fidelity alone: to the right of them, and above, is nothing."""
    best = math.inf
    corners: list[Point] = []
    for model in sorted(models, key=lambda m: (-m.latency.decode_tokens_per_second, m.mean_kl)):
        if model.mean_kl < best:
            best = model.mean_kl
            speed = model.latency.decode_tokens_per_second
            corners.append((across.place(speed), down.place(model.mean_kl)))
    if len(corners) < 2:
        return []
    stairs = [corners[0]]
    for (_, lower), (x, y) in pairwise(corners):
        stairs += [(x, lower), (x, y)]
    return [Stroke(tuple(stairs), "frontier")]


def _spreads(model: ModelResult, across: Scale, down: Scale) -> list[Mark]:
    speed = model.latency.decode_tokens_per_second
    x, y = across.place(speed), down.place(model.mean_kl)
    low, _, high = model.latency.decode_quartiles
    marks: list[Mark] = [Stroke(((across.place(low), y), (across.place(high), y)), "spread")]
    error = model.fidelity and model.fidelity.kl_standard_error
    if error and model.mean_kl > NOISE_NATS:
        ends = [
            down.place(max(model.mean_kl + sign * error, NOISE_NATS * 1.01)) for sign in (1, -1)
        ]
        marks.append(Stroke(((x, ends[0]), (x, ends[1])), "spread"))
    return marks


# --- names beside discs -------------------------------------------------------------------------

Box = tuple[float, float, float, float]
_SIZES = {"name": 15.0, "size": 12.5, "legend": 13.0, "tick": 13.0, "axis-name": 14.0, "hint": 12.5}


def _names(discs: Sequence[Disc], lines: Sequence[Box]) -> list[Mark]:
    """Write each name where it covers nothing, with a line to its disc if it is far."""
    taken = [*lines, *map(_around, discs)]
    marks: list[Mark] = []
    for disc in sorted(discs, key=lambda disc: (disc.hollow, disc.radius)):
        others = [box for box in taken[len(lines) :] if box != _around(disc)]
        place = min(_places(disc), key=lambda place: _cost(place, taken, others))
        taken.append(place.box)
        if place.leader is not None:
            marks.append(place.leader)
        left, _, right, bottom = place.box
        role = "beaten-name" if disc.hollow else "name"
        middle = (left + right) / 2
        marks.append(Words((middle, bottom - 4.5), disc.name, role, "middle", name=disc.name))
    return marks


@dataclass(frozen=True)
class _Place:
    box: Box
    distance: float
    leader: Stroke | None


def _places(disc: Disc) -> list[_Place]:
    """Boxes for a name around its disc, the best first."""
    (x, y), wide, tall = disc.centre, _width(disc.name, "name"), 19.0
    places = []
    for distance in (6.0, 26.0, 52.0, 84.0, 120.0):
        out = disc.radius + distance
        for angle in (90, -90, 0, 180, 45, -45, 135, -135, 22, -22, 158, -158):
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            sideways = 0.0 if abs(dx) < 0.1 else dx * (out + wide / 2)
            middle = x + sideways, y + dy * (out + tall / 2)
            box = (
                middle[0] - wide / 2,
                middle[1] - tall / 2,
                middle[0] + wide / 2,
                middle[1] + tall / 2,
            )
            edge = x + dx * disc.radius, y + dy * disc.radius
            end = min(max(edge[0], box[0]), box[2]), min(max(edge[1], box[1]), box[3])
            leader = Stroke((edge, end), "leader") if distance > 6 else None
            places.append(_Place(box, distance, leader))
    return places


def _cost(place: _Place, taken: Sequence[Box], others: Sequence[Box]) -> float:
    left, top, right, bottom = place.box
    covered = sum(_overlap(place.box, other) for other in taken)
    outside = (
        max(0.0, LEFT + 4 - left)
        + max(0.0, right - RIGHT)
        + max(0.0, TOP + 2 - top)
        + max(0.0, bottom - BOTTOM + 2)
    )
    crossed = 0
    if place.leader is not None:
        (x0, y0), (x1, y1) = place.leader.points
        steps = [(x0 + (x1 - x0) * part / 8, y0 + (y1 - y0) * part / 8) for part in range(9)]
        crossed = sum(
            box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in steps for box in others
        )
    return covered * 10 + outside * 200 + crossed * 100 + place.distance * 2


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    return wide * tall if wide > 0 and tall > 0 else 0.0


def _around(disc: Disc) -> Box:
    (x, y), r = disc.centre, disc.radius
    return x - r, y - r, x + r, y + r


def _along(stroke: Stroke) -> list[Box]:
    """Thin boxes around the pieces of a line that runs upright and level."""
    return [
        (min(x0, x1) - 2, min(y0, y1) - 2, max(x0, x1) + 2, max(y0, y1) + 2)
        for (x0, y0), (x1, y1) in pairwise(stroke.points)
    ]


def _width(text: str, role: str) -> float:
    """Width of words, near enough for every font that a page may be read in."""
    return len(text) * _SIZES[role] * 0.56


# --- drawing ------------------------------------------------------------------------------------


def to_svg(marks: Sequence[Mark], title: str, description: str) -> str:
    """Draw for a page. Colours and fonts are left to the page's style, by class.

    Args:
        marks: The picture.
        title: What it shows, for those who cannot see it.
        description: What is to be seen in it.

    Returns:
        An ``svg`` element.
    """
    body = "\n".join(map(_svg_mark, marks))
    return (
        f'<svg class="picture" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="picture-title picture-description">\n'
        f'<title id="picture-title">{escape(title)}</title>\n'
        f'<desc id="picture-description">{escape(description)}</desc>\n{body}\n</svg>'
    )


def _svg_mark(mark: Mark) -> str:
    if isinstance(mark, Stroke):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.points)
        return f'<polyline class="{mark.role}" points="{points}"/>'
    data = f' data-model="{escape(mark.name)}"' if mark.name else ""
    if isinstance(mark, Disc):
        (x, y), hollow = mark.centre, " hollow" if mark.hollow else ""
        hint = f"<title>{escape(mark.hint)}</title>" if mark.hint else ""
        return (
            f'<circle class="disc {mark.role}{hollow}" cx="{x:.1f}" cy="{y:.1f}" '
            f'r="{mark.radius:.1f}"{data}>{hint}</circle>'
        )
    x, y = mark.place
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if mark.turned else ""
    return (
        f'<text class="{mark.role}" x="{x:.1f}" y="{y:.1f}" text-anchor="{mark.anchor}"{turn}'
        f"{data}>{escape(mark.text)}</text>"
    )


_INK, _FADED, _FAINT = "#1b2430", "#5b6675", "#e4e8ee"
#: The same colours as the light theme of the page; told apart by most colour-blind readers
#: (after Okabe and Ito).
_FILLS = {
    "model": "#64748b",
    "gptq": "#d97706",
    "nf4": "#a855a0",
    "onnx": "#0b8f6a",
    "any": "#64748b",
    "any-size": "#64748b",
}
_LINES: dict[str, tuple[str, float, str]] = {
    "grid": (_FAINT, 1.0, "-"),
    "zero": (_FADED, 1.0, ":"),
    "axis": ("#9aa4b2", 1.2, "-"),
    "frontier": ("#9aa4b2", 1.6, "--"),
    "spread": (_FADED, 1.4, "-"),
    "leader": ("#9aa4b2", 1.0, "-"),
}
_INKS = {"name": _INK, "beaten-name": _FADED, "axis-name": _INK}


def to_png(marks: Sequence[Mark]) -> bytes:
    """Draw for a README: light, 2000 pixels wide.

    Args:
        marks: The picture.

    Returns:
        A PNG file.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Circle
        from matplotlib.patheffects import withStroke
    except ModuleNotFoundError as error:
        raise missing_extra("matplotlib", "compress") from error

    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=200, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.set_axis_off()
    points = 0.72  # a unit of the plane in points
    for order, mark in enumerate(marks, start=1):
        if isinstance(mark, Stroke):
            colour, width, style = _LINES[mark.role]
            xs, ys = zip(*mark.points, strict=True)
            axes.add_line(Line2D(xs, ys, color=colour, lw=width * points, ls=style, zorder=order))
        elif isinstance(mark, Disc):
            colour = _FILLS[mark.role]
            fill = "none" if mark.hollow or mark.role == "any-size" else f"{colour}d0"
            axes.add_patch(
                Circle(
                    mark.centre,
                    mark.radius,
                    facecolor=fill,
                    edgecolor=colour,
                    linewidth=1.8 * points,
                    linestyle="--" if mark.hollow else "-",
                    zorder=order,
                )
            )
        else:
            axes.text(
                *mark.place,
                mark.text.replace("$", r"\$"),
                size=_SIZES.get(mark.role, _SIZES["name"]) * points,
                color=_INKS.get(mark.role, _FADED),
                weight="bold" if mark.role == "name" else "normal",
                ha={"start": "left", "middle": "center", "end": "right"}[mark.anchor],
                va="center" if mark.turned else "baseline",
                rotation=90 if mark.turned else 0,
                zorder=order,
                path_effects=[withStroke(linewidth=3, foreground="white")] if mark.name else None,
            )
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": "mistill"})
    return file.getvalue()
