"""The result of a comparison: raw samples, from which every figure is derived.

One JSON document holds all of it. ``benchmarks.report`` writes tables, Markdown, the page and the
picture from it, and can write them again from a file that was saved.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.figures.machine import Machine
from benchmarks.figures.model_result import ModelResult
from benchmarks.settings import BenchSettings
from mistill.errors import FolderError, SettingsError
from mistill.folders.json_text import check, parse_json, read_json_file
from mistill.settings import settings_dict

SCHEMA = "mistill-comparison-1"


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """The text that every model had to predict.

    Attributes:
        sources: Where it came from, as the user named it.
        fingerprint: SHA-256 of the tokens and of which of them are predicted.
        passages: Number of passages, each scored in one pass.
        tokens_read: Tokens in all passages.
        tokens_scored: Tokens that had to be predicted.
    """

    sources: tuple[str, ...]
    fingerprint: str
    passages: int
    tokens_read: int
    tokens_scored: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several models measured in one run, on the same text, in alternation.

    Attributes:
        date: When it was finished, in UTC.
        duration_seconds: How long it took.
        settings: How much was measured.
        machine: The machine it was measured on.
        text: The text that the models had to predict.
        reference: Name of the model that the others are compared with; it need not be among them.
        models: The results, in the order the models were named.
        samples: Prompt to the reply of each model, if any were requested.
        reference_fingerprint: SHA-256 of the content of the reference; empty in old reports.
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
        """The whole result as one JSON document.

        Returns:
            JSON text.
        """
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The whole result as plain values.

        Returns:
            What the JSON document holds.
        """
        return {"schema": SCHEMA, **asdict(self), "settings": settings_dict(self.settings)}

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
        return cls._from_document(parse_json(text, "the report"))

    @classmethod
    def _from_document(cls, document: Any) -> Self:
        schema = document.pop("schema", None) if isinstance(document, dict) else None
        if schema != SCHEMA:
            raise FolderError(f"the report should have the schema {SCHEMA}, not {schema!r:.80}")
        comparison: Self = check(document, cls, "the report")
        return comparison

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
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
            return cls._from_document(read_json_file(file))
        except FolderError as error:
            raise FolderError(
                f"{path}: {error}; if another version of mistill made it, measure again"
            ) from error
