"""How ``--help`` shows a command: its options in named groups, those of a first run at the top."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from cyclopts.help import DefaultFormatter, HelpEntry, HelpPanel

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

Groups = Mapping[str, Sequence[str]]
"""Titles of groups, and the options of each without their dashes."""

OUTPUT: Groups = {"Output": ("out", "markdown", "fail_on_regression", "overwrite", "json")}
ROWS: Groups = {"Rows of a text": ("skip_bad_rows",)}
SAMPLING: Groups = {
    "Sampling": (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "dry_multiplier",
        "dry_allowed_length",
        "seed",
    )
}
GRID: Groups = {
    "Grid of the quantized weights": (
        *("symmetric", "scale_type", "overrides", "head_bits", "embedding_bits"),
    )
}
GPTQ: Groups = {
    "GPTQ algorithm": ("method", "order", "scale_search", "damp_percent", "true_sequential"),
    "Calibration data": ("samples", "block_length", "seed"),
}


class HelpPage(DefaultFormatter):
    """Formats the help of a command for cyclopts."""

    def __init__(self, groups: Groups | None = None) -> None:
        """Name the groups.

        Args:
            groups: The groups in the order in which they are shown; options that none names
                follow under the title that cyclopts gives them, and those of the output come last.
        """
        super().__init__()
        self.groups = {**(groups or {}), **ROWS, **OUTPUT}

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print a panel of the help, divided into its groups.

        Args:
            console: The console to print to.
            options: The options of that console.
            panel: The options, arguments or commands of one panel.
        """
        show = super().__call__
        if panel.format == "command":
            show(console, options, panel)
            return
        names = {name for entry in panel.entries for name in map(option_name, entry.names)}
        names -= {choice for entry in panel.entries for choice in entry.choices or ()}
        for title, entries in self._divided(panel.entries):
            lines = [_readable(entry, names) for entry in entries]
            show(console, options, panel.copy(title=title or panel.title, entries=lines))

    def _divided(self, entries: Sequence[HelpEntry]) -> Iterator[tuple[str, list[HelpEntry]]]:
        """The groups that have entries; entries of no group under an empty title."""
        by_name = {name: entry for entry in entries for name in map(option_name, entry.names)}
        grouped = {
            title: [by_name[name] for name in names if name in by_name]
            for title, names in self.groups.items()
        }
        in_a_group = [id(entry) for group in grouped.values() for entry in group]
        others = [entry for entry in entries if id(entry) not in in_a_group]
        output = {title: grouped.pop(title) for title in OUTPUT}
        for title, group in {**grouped, "": others, **output}.items():
            if group:
                yield title, group


def option_name(option: str) -> str:
    """The name of an option as Python spells it.

    Args:
        option: The option, such as ``--top-k``.

    Returns:
        The name, such as ``top_k``.
    """
    return option.removeprefix("--").replace("-", "_")


def _readable(entry: HelpEntry, names: Collection[str]) -> HelpEntry:
    """The entry without the line breaks and the markup of a docstring, and with options' dashes."""
    text = str(getattr(entry.description, "primary_renderable", entry.description) or "")
    words = " ".join(text.replace("``", "").split())
    for name in names:
        if "_" in name:
            words = re.sub(rf"\b{name}\b", f"--{name.replace('_', '-')}", words)
    return entry.copy(description=words, default=_default(entry.default))


def _default(default: str | None) -> str | None:
    """A default as it is written on a command line; an empty one is not shown."""
    if default is None or not default.startswith("("):
        return default
    values = ast.literal_eval(default)
    return " ".join(map(str, values)) if values else None
