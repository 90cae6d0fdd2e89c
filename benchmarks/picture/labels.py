"""Positions of the models' names in the picture: beside their discs, without overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.picture.marks import WIDE, Disc, Mark, Plane, Stroke, Words

Box = tuple[float, float, float, float]
SIZES = {"name": 15.0, "size": 12.5, "legend": 13.0, "tick": 13.0, "axis-name": 14.0, "hint": 12.5}


def place_names(discs: Sequence[Disc], stairs: Sequence[Stroke], plane: Plane = WIDE) -> list[Mark]:
    """Place each name where it overlaps least, with a line to its disc if it is far from it.

    Args:
        discs: The models.
        stairs: Lines of vertical and horizontal segments that names should not cross.
        plane: Size and margins of the picture.

    Returns:
        Names and lines.
    """
    lines = [box for stroke in stairs for box in _along(stroke)]
    occupied = [*lines, *map(_around, discs)]
    marks: list[Mark] = []
    for disc in sorted(discs, key=lambda disc: (disc.hollow, disc.radius)):
        others = [box for box in occupied[len(lines) :] if box != _around(disc)]
        best = min(_places(disc), key=lambda candidate: _cost(candidate, occupied, others, plane))
        occupied.append(best.box)
        if best.leader is not None:
            marks.append(best.leader)
        left, _, right, bottom = best.box
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
    """Candidate boxes for a name around its disc, the nearest first."""
    (x, y), wide, tall = disc.centre, width_of(disc.name, "name"), 19.0
    candidates = []
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
            leader = Stroke((edge, end), "leader", disc.name) if distance > 6 else None
            candidates.append(_Place(box, distance, leader))
    return candidates


def _cost(place: _Place, occupied: Sequence[Box], others: Sequence[Box], plane: Plane) -> float:
    left, top, right, bottom = place.box
    covered = sum(_overlap(place.box, other) for other in occupied)
    outside = (
        max(0.0, plane.left + 4 - left)
        + max(0.0, right - plane.right)
        + max(0.0, plane.top + 2 - top)
        + max(0.0, bottom - plane.bottom + 2)
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
    """Thin boxes around the vertical and horizontal segments of a line."""
    return [
        (min(x0, x1) - 2, min(y0, y1) - 2, max(x0, x1) + 2, max(y0, y1) + 2)
        for (x0, y0), (x1, y1) in pairwise(stroke.points)
    ]


def width_of(text: str, role: str) -> float:
    """Approximate width of a text in common fonts.

    Args:
        text: The text.
        role: Its role, which decides its size.

    Returns:
        Units of the plane.
    """
    return len(text) * SIZES[role] * 0.56
