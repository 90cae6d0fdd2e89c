"""What the picture of a comparison is made of, and the plane that it is laid out in."""

from __future__ import annotations

from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Stroke:
    """A line.

    Attributes:
        points: Its corners; none for a line that is not there yet.
        role: What it is; decides how it looks.
        name: Of the model that it belongs to; may be empty.
    """

    points: tuple[Point, ...]
    role: str
    name: str = ""


@dataclass(frozen=True)
class Disc:
    """A model.

    Attributes:
        centre: Where it stands.
        radius: Its area is the model's size on disk.
        role: What runs the model; decides the colour.
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


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Where the picture lies.

    Attributes:
        name: What it is for.
        width: Of the whole.
        height: Of the whole.
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
        """Between the ends of the upright axis and the frame: the largest disc fits."""
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
