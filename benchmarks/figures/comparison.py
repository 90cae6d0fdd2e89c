"""What a comparison found: raw samples, from which every figure is derived.

One JSON document holds all of it. The table, the Markdown, the page and the picture are drawn
from it, and can be drawn again from a file that was saved.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from benchmarks.figures.machine import Machine
from benchmarks.figures.model_result import ModelResult, result_from, with_tuples
from benchmarks.settings import BenchSettings
from mistill.errors import FolderError, MissingExtraError, SettingsError
from mistill.folders.publishing import creating
from mistill.settings import settings_dict

if TYPE_CHECKING:
    from rich.console import RenderableType

    from benchmarks.settings import ShipSettings

SCHEMA = "mistill-comparison-1"


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """The text that every model had to predict.

    Attributes:
        sources: Where it came from, as given.
        fingerprint: SHA-256 of the tokens and of which of them count.
        passages: Pieces that were scored at once.
        tokens_read: Tokens in all passages.
        tokens_scored: Those that had to be predicted.
    """

    sources: tuple[str, ...]
    fingerprint: str
    passages: int
    tokens_read: int
    tokens_scored: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several models measured in one run, on the same text, taking turns.

    Attributes:
        date: When it was finished, in UTC.
        duration_seconds: How long it took.
        settings: How much was measured.
        machine: What it was measured on.
        text: What the models had to predict.
        reference: Name of the model that the others are held against; it need not be among them.
        models: The results, in the order given.
        samples: Prompt to the reply of each model, if any were given.
        reference_fingerprint: A short name for the content of the reference; empty in reports
            of before it was kept.
    """

    date: str
    duration_seconds: float
    settings: BenchSettings
    machine: Machine
    text: ScoredText
    reference: str
    models: tuple[ModelResult, ...]
    samples: dict[str, dict[str, str]] = field(default_factory=dict)
    reference_fingerprint: str = ""

    def __getitem__(self, name: str) -> ModelResult:
        """The result of one model.

        Args:
            name: Its name in this comparison.

        Returns:
            The result.

        Raises:
            KeyError: If there is no such model.
        """
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(f"{name!r} is not among {', '.join(model.name for model in self.models)}")

    def speedup(self, name: str, over: str) -> float:
        """How much faster one model writes than transformers' ``generate`` on another.

        Args:
            name: The model.
            over: A float folder of this comparison.

        Returns:
            Ratio of the medians of tokens written per second.

        Raises:
            SettingsError: If transformers' ``generate`` was not timed on the other.
        """
        rival = self[over].transformers_latency
        if rival is None:
            raise SettingsError(
                f"transformers' generate was not timed on {over}; it is on float folders, with "
                "transformers_generate on"
            )
        return self[name].latency.decode_tokens_per_second / rival.decode_tokens_per_second

    def to_json(self) -> str:
        """The whole result as one JSON document, raw samples and figures derived from them.

        Returns:
            JSON text.
        """
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The whole result as plain values, raw samples and figures derived from them.

        Returns:
            What the JSON document holds.
        """
        from benchmarks.report.columns import summary

        document = {"schema": SCHEMA, **asdict(self), "settings": settings_dict(self.settings)}
        for record, model in zip(document["models"], self.models, strict=True):
            record["summary"] = summary(model)
        return document

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a document that ``to_json`` wrote.

        Args:
            text: JSON text.

        Returns:
            The same comparison.

        Raises:
            FolderError: If the text is not such a document.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise FolderError(f"the report is not valid JSON: {error}") from error
        found = document.pop("schema", None) if isinstance(document, dict) else None
        if found != SCHEMA:
            raise FolderError(f"the report should have the schema {SCHEMA}, not {found}")
        return cls(
            **{
                **document,
                "settings": BenchSettings(**with_tuples(document["settings"])),
                "machine": Machine(**with_tuples(document["machine"])),
                "text": ScoredText(**with_tuples(document["text"])),
                "models": tuple(map(result_from, document["models"])),
            }
        )

    def table(self) -> RenderableType:
        """The figures as a table for the terminal.

        Returns:
            A table for rich; several where the terminal is narrow.
        """
        from benchmarks.report.table import terminal_table

        return terminal_table(self)

    def to_markdown(self, ship: ShipSettings | None = None) -> str:
        """The figures as Markdown, with the conditions that they hold under.

        Args:
            ship: What there is to run a model on, for the line that says which one to ship.

        Returns:
            Markdown text.
        """
        from benchmarks.report.markdown import markdown

        return markdown(self, ship)

    def to_html(self, ship: ShipSettings | None = None) -> str:
        """One page that holds everything it needs and asks for nothing from outside.

        Args:
            ship: What there is to run a model on, for the answer that the page opens with.

        Returns:
            HTML text.
        """
        from benchmarks.report.page import html

        return html(self, ship)

    def save(
        self, folder: str | Path, overwrite: bool = False, ship: ShipSettings | None = None
    ) -> Path:
        """Write ``report.json``, ``report.md``, ``report.html``, ``figure.svg``, ``figure.png``.

        Without matplotlib the last one is left out, with a warning; the page has the picture.

        Args:
            folder: The folder to be made.
            overwrite: Whether an existing folder is replaced.
            ship: What there is to run a model on, for the line that says which one to ship.

        Returns:
            The folder.
        """
        from benchmarks.picture.drawing import svg_file, to_png
        from benchmarks.picture.laying_out import draw
        from benchmarks.report.page import in_words

        with creating(folder, overwrite) as partial:
            (partial / "report.json").write_text(self.to_json(), "utf-8")
            (partial / "report.md").write_text(self.to_markdown(ship), "utf-8")
            (partial / "report.html").write_text(self.to_html(ship), "utf-8")
            marks = draw(self)
            svg = svg_file(marks, "Speed, fidelity and size", in_words(self))
            (partial / "figure.svg").write_text(svg, "utf-8")
            try:
                (partial / "figure.png").write_bytes(to_png(marks))
            except MissingExtraError as error:
                logging.getLogger(__name__).warning("figure.png is left out: %s", error)
        return Path(folder)


def open_report(path: str | Path) -> Comparison:
    """Read a report that was saved.

    Args:
        path: The folder, or the ``report.json`` in it.

    Returns:
        The comparison.

    Raises:
        FolderError: If there is no report, or it is broken.
    """
    file = Path(path).expanduser()
    file = file / "report.json" if file.is_dir() else file
    if not file.is_file():
        raise FolderError(
            f"{path} holds no report; give a folder that mistill bench --out made, or the "
            "report.json in it"
        )
    try:
        return Comparison.from_json(file.read_text("utf-8"))
    except (FolderError, UnicodeDecodeError) as error:
        raise FolderError(f"{path}: {error}") from error
    except (KeyError, TypeError) as error:
        raise FolderError(
            f"{path} is a report of another version of mistill ({error}); measure again"
        ) from error
