"""Draw the picture of a comparison: as SVG in the page, and as files of SVG and PNG.

The layout is computed once (``laying_out``). The SVG is written here, not by matplotlib: its
elements carry the classes and accessible names that the page styles, in a light and in a dark
theme, and that its script finds, and it needs no matplotlib. matplotlib makes the PNG.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from benchmarks.picture.labels import SIZES
from benchmarks.picture.marks import WIDE, Disc, Mark, Plane, Stroke
from mistill.errors import missing_extra


def to_svg(marks: Sequence[Mark], title: str, description: str, plane: Plane = WIDE) -> str:
    """Draw for a page, whose style sheet sets colours and fonts by class.

    Args:
        marks: The elements of the picture.
        title: Its accessible name.
        description: Its accessible description.
        plane: Size and margins of the picture.

    Returns:
        An ``svg`` element whose discs can be reached with the Tab key.
    """
    names = [f"{plane.name}-{part}" for part in ("title", "description")]
    return (
        f'<svg class="picture {plane.name}" viewBox="0 0 {plane.width} {plane.height}" '
        f'role="group" aria-labelledby="{names[0]}" aria-describedby="{names[1]}">\n'
        f'<title id="{names[0]}">{escape(title)}</title>\n'
        f'<desc id="{names[1]}">{escape(description)}</desc>\n'
        f"{_body(marks)}\n</svg>"
    )


def svg_file(marks: Sequence[Mark], title: str, description: str) -> str:
    """Draw an SVG file, light or dark according to the reader's colour scheme.

    Args:
        marks: The elements of the picture.
        title: Its accessible name.
        description: Its accessible description.

    Returns:
        A self-contained SVG document.
    """
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" class="picture" '
        f'width="{WIDE.width}" height="{WIDE.height}" '
        f'viewBox="0 0 {WIDE.width} {WIDE.height}" role="img">\n'
        f"<title>{escape(title)}</title>\n<desc>{escape(description)}</desc>\n"
        f"<style>\n{picture_style()}</style>\n"
        f'<rect class="paper" width="{WIDE.width}" height="{WIDE.height}"/>\n'
        f"{_body(marks, alone=True)}\n</svg>\n"
    )


def picture_style() -> str:
    """Colours of the picture in a light and in a dark theme, fonts and lines.

    Returns:
        CSS.
    """
    return files("benchmarks.picture").joinpath("picture.css").read_text("utf-8")


def _body(marks: Sequence[Mark], alone: bool = False) -> str:
    return "\n".join(_svg_mark(mark, alone) for mark in marks)


def _svg_mark(mark: Mark, alone: bool) -> str:
    data = f' data-model="{escape(mark.name)}"' if mark.name else ""
    if isinstance(mark, Stroke):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.points)
        return f'<polyline class="{mark.role}" points="{points}"{data}/>'
    if isinstance(mark, Disc):
        (x, y), hollow = mark.centre, " hollow" if mark.hollow else ""
        hint = f"<title>{escape(mark.hint)}</title>" if mark.hint and alone else ""
        if mark.name and not alone:
            data += f' tabindex="0" role="button" aria-label="{escape(mark.hint)}"'
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
#: The colours of the page's light theme, which most colour-blind readers can distinguish (after
#: Okabe and Ito).
_FILLS = {
    "model": "#64748b",
    "gptq": "#d97706",
    "nf4": "#a855a0",
    "onnx": "#0b8f6a",
    "llama-cpp": "#2f6fd0",
    "genai": "#c2456b",
    "openvino": "#6b7f00",
    "ctranslate2": "#8a6d3b",
    "other": "#77808c",
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
    """Draw a PNG in the light theme, two pixels to a unit of the plane.

    Args:
        marks: The elements of the picture.

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

    figure = Figure(figsize=(WIDE.width / 100, WIDE.height / 100), dpi=200, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDE.width), ylim=(WIDE.height, 0))
    axes.set_axis_off()
    points = 0.72  # a unit of the plane in points
    for order, mark in enumerate(marks, start=1):
        if isinstance(mark, Stroke):
            if not mark.points:
                continue
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
                size=SIZES.get(mark.role, SIZES["name"]) * points,
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
