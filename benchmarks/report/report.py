"""A comparison with its outputs: terminal table, Markdown, HTML page, and a folder of all."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from benchmarks.figures.comparison import Comparison
from benchmarks.picture.drawing import svg_file, to_png
from benchmarks.picture.laying_out import draw
from benchmarks.report.columns import summary
from benchmarks.report.commands import StepDefaults
from benchmarks.report.markdown import markdown
from benchmarks.report.page import html, in_words
from benchmarks.report.table import terminal_table
from benchmarks.settings import ShipSettings
from mistill.errors import MissingExtraError
from mistill.folders.publishing import creating
from mistill.shown import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

_log = logging.getLogger(__name__)

# Columns of a table in a notebook or a text.
_PAPER_COLUMNS = 120


class Report(Comparison):
    """A comparison that can be shown and saved."""

    def to_dict(self) -> dict[str, Any]:
        """The whole result as plain values, with the figures derived from the raw samples.

        Returns:
            What the JSON document holds.
        """
        document = super().to_dict()
        for record, model in zip(document["models"], self.models, strict=True):
            record["summary"] = summary(model)
        return document

    def __repr__(self) -> str:
        """One line: which models are compared, and on what."""
        names = ", ".join(visible(model.name) for model in self.models)
        return f"Report of {names}; print(report) shows the table"

    def __str__(self) -> str:
        """The table, without colours."""
        return _on_paper(self.table()).export_text()

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        form = '<pre style="line-height: 1.2; font-family: monospace">{code}</pre>'
        return _on_paper(self.table()).export_html(inline_styles=True, code_format=form)

    def table(self) -> RenderableType:
        """The figures as a table for the terminal.

        Returns:
            A table for rich; several where the terminal is narrow.
        """
        return terminal_table(self)

    def to_markdown(
        self, ship: ShipSettings | None = None, step_defaults: StepDefaults | None = None
    ) -> str:
        """The figures as Markdown, with the conditions of the measurement.

        Args:
            ship: Memory and speed that the model to ship must meet.
            step_defaults: Gives the defaults of a step, to write the commands of models whose
                lineage was written by an earlier version.

        Returns:
            Markdown text.
        """
        return markdown(self, ship, step_defaults)

    def to_html(
        self, ship: ShipSettings | None = None, step_defaults: StepDefaults | None = None
    ) -> str:
        """One self-contained HTML page.

        Args:
            ship: Memory and speed that the model to ship must meet, for the answer at the top.
            step_defaults: Gives the defaults of a step, to write the commands of models whose
                lineage was written by an earlier version.

        Returns:
            HTML text.
        """
        return html(self, ship, step_defaults)

    def save(
        self,
        folder: str | Path,
        overwrite: bool = False,
        ship: ShipSettings | None = None,
        step_defaults: StepDefaults | None = None,
    ) -> Path:
        """Write ``report.json``, ``report.md``, ``report.html``, ``figure.svg``, ``figure.png``.

        Without matplotlib the last one is left out, with a warning; the page has the picture.

        Args:
            folder: The folder to write.
            overwrite: Whether an existing folder is replaced.
            ship: Memory and speed that the model to ship must meet.
            step_defaults: Gives the defaults of a step, to write the commands of models whose
                lineage was written by an earlier version.

        Returns:
            The folder.
        """
        with creating(folder, overwrite) as partial:
            (partial / "report.json").write_text(self.to_json(), "utf-8")
            (partial / "report.md").write_text(self.to_markdown(ship, step_defaults), "utf-8")
            (partial / "report.html").write_text(self.to_html(ship, step_defaults), "utf-8")
            marks = draw(self)
            svg = svg_file(marks, "Speed, fidelity and size", in_words(self))
            (partial / "figure.svg").write_text(svg, "utf-8")
            try:
                (partial / "figure.png").write_bytes(to_png(marks))
            except MissingExtraError as error:
                _log.warning("figure.png is left out: %s", error)
        return Path(folder)


def _on_paper(table: RenderableType) -> Console:
    """A console that has printed a table for export, and shows nothing."""
    console = Console(record=True, file=io.StringIO(), width=_PAPER_COLUMNS)
    console.print(table)
    return console


def open_report(path: str | Path) -> Report:
    """Read a report that was saved.

    Args:
        path: The folder, or the ``report.json`` in it.

    Returns:
        The report.

    Raises:
        FolderError: If there is no report, or it is broken.
    """
    return Report.from_file(path)
