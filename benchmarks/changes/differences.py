"""Two reports compared: what changed, what did not, and what cannot be told.

A change is called only where chance seldom makes one so large, and where the two reports can be
compared at all: speeds and memory on the same processor with the same threads, quality on the same
text. Anything else is shown with the reason why it is not called.

- Quality is compared token by token on the text that both models read (``significance.of_mean``).
- Speed is compared by its rounds, on a logarithmic scale, by Welch's test.
- All changes of a pair of reports are judged together (``significance.holm``): a report has dozens
  of figures, and in twenty pairs of reports where nothing has changed one may call one.
- A change counts only where it is surely larger than the tolerance (``judging``). Where an engine
  that nobody has changed moved by more, the machine is another today, and that is the tolerance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.changes.verdicts import Change, Verdict
from benchmarks.figures.column import EN_DASH, significant
from benchmarks.report.table import escaped

if TYPE_CHECKING:
    from rich.table import Table

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.changes.comparable import notes, obstacles_between, unsteadiness
from benchmarks.changes.verdicts import judge, look
from benchmarks.figures.column import Nature
from benchmarks.figures.comparison import Comparison
from benchmarks.report.columns import columns_of
from benchmarks.settings import DiffSettings
from mistill.errors import SettingsError
from mistill.settings import settings_dict, settings_from

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = "mistill-bench-diff-1"

#: Bytes on disk are the same every time they are counted; records may grow by a line.
_SAME_BYTES = 0.001


@dataclass(frozen=True, kw_only=True)
class ReportDiff:
    """What differs between two reports.

    Attributes:
        settings: When a change counts as one.
        old_date: When the old report was finished.
        new_date: When the new one was.
        notes: What else is another, and what could not be compared.
        missing: Models of the old report that the new one lacks.
        added: Models of the new report that the old one lacks.
        changes: Every figure of every model that both have.
    """

    settings: DiffSettings
    old_date: str
    new_date: str
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]
    changes: tuple[Change, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What has become worse."""
        return tuple(change for change in self.changes if change.verdict == "worse")

    @property
    def improvements(self) -> tuple[Change, ...]:
        """What has become better."""
        return tuple(change for change in self.changes if change.verdict == "better")

    @property
    def passed(self) -> bool:
        """Whether nothing has become worse, and no model is missing."""
        return not self.regressions and not self.missing

    def table(self) -> Table:
        """The changes as a table for the terminal.

        Returns:
            A table of rich.
        """
        return terminal_table(self)

    def to_markdown(self) -> str:
        """The changes as Markdown, for the comment of a pull request.

        Returns:
            Markdown text.
        """
        return markdown(self)

    def to_dict(self) -> dict[str, Any]:
        """The changes as plain values.

        Returns:
            What a JSON document holds.
        """
        return {
            "schema": SCHEMA,
            **vars(self),
            "settings": settings_dict(self.settings),
            "changes": [change.to_dict() for change in self.changes],
            "regressions": len(self.regressions),
            "improvements": len(self.improvements),
            "passed": self.passed,
        }


def diff(
    old: Comparison | str | Path,
    new: Comparison | str | Path,
    *,
    settings: DiffSettings | None = None,
    **options: Any,
) -> ReportDiff:
    """Say what changed from one report to another, and what cannot be told.

    Args:
        old: A comparison, the folder of its report, or its ``report.json``.
        new: The same, measured later.
        settings: When a change counts as one.
        **options: Fields of ``DiffSettings``, instead of ``settings``.

    Returns:
        Every figure of every model that both have, with a verdict.

    Raises:
        SettingsError: If the two have no model in common, or a name in ``pairs`` is not known.
        FolderError: If a report is missing or broken.
        MissingExtraError: If scipy is not installed.
    """
    settings = settings_from(DiffSettings, settings, options)
    before = old if isinstance(old, Comparison) else Comparison.from_file(old)
    after = new if isinstance(new, Comparison) else Comparison.from_file(new)
    names = _names(before, after, settings.pairs)
    obstacles = obstacles_between(before, after)
    columns = {
        column.key: column
        for side in (before, after)
        for column in columns_of(side.models, side.reference)
    }
    looks = [
        look(column, before[first], after[second], obstacles.get(column.nature, ""))
        for first, second in names.items()
        for column in columns.values()
        if column.figure(before[first]) is not None or column.figure(after[second]) is not None
    ]
    unsteady, words = unsteadiness(before, after, names)
    tolerances: dict[Nature, float] = {
        "bytes": _SAME_BYTES,
        "memory": settings.clock_tolerance,
        "clock": max(settings.clock_tolerance, unsteady),
        "text": settings.tolerance,
        "reference": settings.tolerance,
    }
    return ReportDiff(
        settings=settings,
        old_date=before.date,
        new_date=after.date,
        notes=(
            *dict.fromkeys(obstacles.values()),
            *([words] if words and "clock" not in obstacles else []),
            *notes(before, after, names),
        ),
        missing=tuple(model.name for model in before.models if model.name not in names),
        added=tuple(model.name for model in after.models if model.name not in names.values()),
        changes=judge(looks, tolerances, settings.confidence),
    )


def _names(old: Comparison, new: Comparison, pairs: Sequence[str]) -> dict[str, str]:
    """Name in the old report to name in the new one."""
    before, after = ({model.name for model in side.models} for side in (old, new))
    asked = dict(pair.split("=", 1) for pair in pairs)
    for name, known, side in (
        *((name, before, "old") for name in asked),
        *((name, after, "new") for name in asked.values()),
    ):
        if name not in known:
            raise SettingsError(
                f"pairs names {name}, which the {side} report lacks; it has "
                f"{', '.join(sorted(known))}"
            )
    names = {name: asked.get(name, name) for name in (model.name for model in old.models)}
    found = {first: second for first, second in names.items() if second in after}
    if not found:
        raise SettingsError(
            f"the reports have no model in common: the old one has {', '.join(sorted(before))}, "
            f"the new one {', '.join(sorted(after))}; say which is which with pairs, OLD=NEW"
        )
    return found


_COLOURS = {"better": "green", "worse": "bold red", "same": "dim", "unknown": "yellow"}


def terminal_table(found: ReportDiff) -> Table:
    """Every change, model by model.

    Args:
        found: What differs.

    Returns:
        A table of rich.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption=escape("\n".join([summary(found), *map(_sentence, found.notes)])),
        caption_justify="left",
    )
    table.add_column(f"{found.old_date[:10]}, then {found.new_date[:10]}", overflow="fold")
    for head in ("old", "new", "change"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, rows in _rows(found):
        if len(rows) == 1:  # equal in everything
            table.add_row(Text(name, style="bold"), "", "", "", Text(rows[0][0][-1], style="dim"))
            continue
        table.add_row(Text(name, style="bold"))
        for (title, *figures, words), verdict in rows:
            table.add_row(f"  {title}", *figures, Text(words, style=_COLOURS[verdict]))
    return table


def markdown(found: ReportDiff) -> str:
    """Every change and what could not be compared, as Markdown.

    Args:
        found: What differs.

    Returns:
        Markdown text.
    """
    lines = [
        "# What changed",
        "",
        summary(found),
        "",
        f"| model | figure | {found.old_date[:10]} | {found.new_date[:10]} | change | |",
        "|---|---|---:|---:|---:|---|",
    ]
    for name, rows in _rows(found):
        for cells, verdict in rows:
            loud = verdict in ("better", "worse")
            words = [f"**{cell}**" if loud and cell else cell for cell in cells]
            lines.append(f"| {escaped(name)} | {' | '.join(words)} |")
    lines += ["", *(f"- {_sentence(note)}" for note in found.notes)]
    return "\n".join(lines) + "\n"


def _rows(found: ReportDiff) -> list[tuple[str, list[tuple[tuple[str, ...], Verdict]]]]:
    """For each model its figures that did not come out equal, in words, with their verdicts."""
    tables = []
    for name in dict.fromkeys(change.model for change in found.changes):
        changes = [change for change in found.changes if change.model == name]
        moved = [change for change in changes if change.reason != "equal"]
        rows: list[tuple[tuple[str, ...], Verdict]] = [
            (
                (
                    _title(change),
                    _figure(change, change.old),
                    _figure(change, change.new),
                    change_in_words(change),
                    verdict_in_words(change, found),
                ),
                change.verdict,
            )
            for change in moved
        ]
        if len(moved) < len(changes):
            title = f"{len(changes) - len(moved)} figures" if moved else "all figures"
            rows.append(((title, "", "", "", "equal"), "same"))
        tables.append((name, rows))
    return tables


def summary(found: ReportDiff) -> str:
    """What there is to know in a sentence or two.

    Args:
        found: What differs.

    Returns:
        Text.
    """
    counts = {
        verdict: sum(change.verdict == verdict for change in found.changes)
        for verdict in ("worse", "better", "same", "unknown")
    }
    words = (
        f"{counts['worse']} worse, {counts['better']} better, {counts['same']} the same, "
        f"{counts['unknown']} not compared."
    )
    for names, side in ((found.missing, "old"), (found.added, "new")):
        if names:
            words += f" Only in the {side} report: {', '.join(names)}."
    return words


def change_in_words(change: Change) -> str:
    """How far a figure moved, and how far that may be off.

    Args:
        change: The change.

    Returns:
        Such as ``+12.3% (+8.1 to +16.5)``; a dash where there is no ratio.
    """
    if change.relative is None:
        return EN_DASH
    words = _percent(change.relative)
    if change.interval is None or change.interval[0] == change.interval[1]:
        return words
    low, high = (_percent(end).removesuffix("%") for end in change.interval)
    return f"{words} ({low} to {high})"


def verdict_in_words(change: Change, found: ReportDiff) -> str:
    """Better, worse, or why not.

    Args:
        change: The change.
        found: What it is part of; a reason that its notes give is not given again.

    Returns:
        Text.
    """
    if change.verdict == "same":
        return change.reason
    if change.verdict != "unknown":
        return change.verdict
    known = any(note.endswith(f": {change.reason}") for note in found.notes)
    return "not compared" if known else f"not compared: {change.reason}"


def _percent(share: float) -> str:
    size = abs(share * 100)
    text = f"{size:,.0f}" if size >= 100 else significant(size, 2 if size < 10 else 3)
    return f"{'-' if share < 0 else '+'}{text}%"


def _title(change: Change) -> str:
    unit = change.column.unit
    return f"{change.column.title}{f', {unit}' if unit else ''}"


def _figure(change: Change, value: float | None) -> str:
    return EN_DASH if value is None else change.column.write(value)


def _sentence(note: str) -> str:
    return f"{note[:1].upper()}{note[1:]}."
