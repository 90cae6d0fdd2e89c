"""The elements of the picture of a comparison, and the plane that it is laid out in."""

from __future__ import annotations

from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Stroke:
    """A line.

    Attributes:
        points: Its corners; none for a line that only the page's script draws.
        role: Its role, which decides its style.
        name: Name of its model; may be empty.
    """

    points: tuple[Point, ...]
    role: str
    name: str = ""


@dataclass(frozen=True)
class Disc:
    """A model.

    Attributes:
        centre: Position of the centre.
        radius: Its area is the model's size on disk.
        role: Form or engine of the model, which decides the colour.
        hollow: Whether another model dominates it.
        name: Name of the model; empty for a disc of the legend.
        hint: Figures of the model, as tooltip and accessible name.
    """

    centre: Point
    radius: float
    role: str
    hollow: bool = False
    name: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Words:
    """A text.

    Attributes:
        place: Position of the start, middle or end of its baseline.
        text: The text.
        role: Its role, which decides its style.
        anchor: ``start``, ``middle`` or ``end``.
        turned: Whether it runs upwards.
        name: Name of its model; may be empty.
    """

    place: Point
    text: str
    role: str
    anchor: str = "start"
    turned: bool = False
    name: str = ""


Mark = Stroke | Disc | Words


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Size and margins of the picture.

    Attributes:
        name: Its CSS class.
        width: Width of the picture.
        height: Height of the picture.
        left: Left end of the axes.
        right: Right end of the axes.
        top: Upper end of the axes.
        bottom: Lower end of the axes.
        largest_radius: Radius of the largest model's disc.
        smallest_radius: Radius below which no disc is drawn.
    """

    name: str
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    largest_radius: float = 40.0
    smallest_radius: float = 5.0

    @property
    def room(self) -> float:
        """Space between the ends of the vertical axis and the frame: the largest disc fits."""
        return self.largest_radius + 6


#: For a page or a README.
WIDE = Plane(name="wide", width=1000, height=560, left=92, right=972, top=62, bottom=482)
#: For a telephone held upright.
TALL = Plane(
    name="tall",
    width=480,
    height=600,
    left=74,
    right=466,
    top=62,
    bottom=528,
    largest_radius=30.0,
)
