"""Two reports compared: what changed, what did not, and what cannot be compared.

A change is reported only where it is significant and the two reports can be compared: speeds and
memory on the same processor with the same threads, quality on the same text. Anything else is shown
with the reason why it is not compared.

- Quality is compared token by token on the text that both models read (``significance.of_mean``).
- Speed is compared by its rounds, on a logarithmic scale, with Welch's test.
- All figures of a pair of reports are tested together (``significance.holm``): a report has dozens
  of them, and in twenty pairs of reports where nothing has changed about one may show a change.
- A change counts only where it is significantly larger than the tolerance (``verdicts``). Where the
  speed of an engine that has not changed differs by more, the machine has changed, and that
  difference is the tolerance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from benchmarks.changes.verdicts import Change, Verdict
from benchmarks.figures.column import EN_DASH, significant
from mistill.shown import escaped

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.options import DiffOptions

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.changes.comparable import machine_drift, notes, obstacles_between
from benchmarks.changes.verdicts import give_verdicts, pair_figures
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
        settings: How large and how certain a change has to be.
        old_date: When the old report was finished.
        new_date: When the new one was.
        notes: What else differs, and what could not be compared.
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
    **options: Unpack[DiffOptions],
) -> ReportDiff:
    """Compare two reports: what changed, what did not, and what cannot be compared.

    Args:
        old: A comparison, the folder of its report, or its ``report.json``.
        new: The same, measured later.
        settings: How large and how certain a change has to be.
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
    figure_pairs = [
        pair_figures(column, before[first], after[second], obstacles.get(column.nature, ""))
        for first, second in names.items()
        for column in columns.values()
        if column.figure(before[first]) is not None or column.figure(after[second]) is not None
    ]
    drift, drift_note = machine_drift(before, after, names)
    tolerances: dict[Nature, float] = {
        "bytes": _SAME_BYTES,
        "memory": settings.clock_tolerance,
        "clock": max(settings.clock_tolerance, drift),
        "text": settings.tolerance,
        "reference": settings.tolerance,
    }
    return ReportDiff(
        settings=settings,
        old_date=before.date,
        new_date=after.date,
        notes=(
            *dict.fromkeys(obstacles.values()),
            *([drift_note] if drift_note and "clock" not in obstacles else []),
            *notes(before, after, names),
        ),
        missing=tuple(model.name for model in before.models if model.name not in names),
        added=tuple(model.name for model in after.models if model.name not in names.values()),
        changes=give_verdicts(figure_pairs, tolerances, settings.confidence),
    )


def _names(old: Comparison, new: Comparison, pairs: Sequence[str]) -> dict[str, str]:
    """Name in the old report to name in the new one."""
    before, after = ({model.name for model in side.models} for side in (old, new))
    renamed = dict(pair.split("=", 1) for pair in pairs)
    for name, side_names, side in (
        *((name, before, "old") for name in renamed),
        *((name, after, "new") for name in renamed.values()),
    ):
        if name not in side_names:
            raise SettingsError(
                f"pairs names {name}, which the {side} report lacks; it has "
                f"{', '.join(sorted(side_names))}"
            )
    names = {name: renamed.get(name, name) for name in (model.name for model in old.models)}
    common = {first: second for first, second in names.items() if second in after}
    if not common:
        raise SettingsError(
            f"the reports have no model in common: the old one has {', '.join(sorted(before))}, "
            f"the new one {', '.join(sorted(after))}; name corresponding models with pairs, OLD=NEW"
        )
    return common


_COLOURS = {"better": "green", "worse": "bold red", "same": "dim", "unknown": "yellow"}


def terminal_table(difference: ReportDiff) -> Table:
    """Every change, model by model.

    Args:
        difference: The two reports compared.

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
        caption=escape("\n".join([summary(difference), *map(_sentence, difference.notes)])),
        caption_justify="left",
    )
    table.add_column(
        f"{difference.old_date[:10]}, then {difference.new_date[:10]}", overflow="fold"
    )
    for head in ("old", "new", "change"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, rows in _rows(difference):
        if len(rows) == 1:  # equal in everything
            table.add_row(Text(name, style="bold"), "", "", "", Text(rows[0][0][-1], style="dim"))
            continue
        table.add_row(Text(name, style="bold"))
        for (title, *figures, verdict_text), verdict in rows:
            table.add_row(f"  {title}", *figures, Text(verdict_text, style=_COLOURS[verdict]))
    return table


def markdown(difference: ReportDiff) -> str:
    """Every change and what could not be compared, as Markdown.

    Args:
        difference: The two reports compared.

    Returns:
        Markdown text.
    """
    lines = [
        "# What changed",
        "",
        summary(difference),
        "",
        f"| model | figure | {difference.old_date[:10]} | {difference.new_date[:10]} | change | |",
        "|---|---|---:|---:|---:|---|",
    ]
    for name, rows in _rows(difference):
        for cells, verdict in rows:
            loud = verdict in ("better", "worse")
            words = [f"**{cell}**" if loud and cell else cell for cell in cells]
            lines.append(f"| {escaped(name)} | {' | '.join(words)} |")
    lines += ["", *(f"- {_sentence(note)}" for note in difference.notes)]
    return "\n".join(lines) + "\n"


def _rows(difference: ReportDiff) -> list[tuple[str, list[tuple[tuple[str, ...], Verdict]]]]:
    """For each model its figures that did not come out equal, in words, with their verdicts."""
    tables = []
    for name in dict.fromkeys(change.model for change in difference.changes):
        changes = [change for change in difference.changes if change.model == name]
        unequal = [change for change in changes if change.reason != "equal"]
        rows: list[tuple[tuple[str, ...], Verdict]] = [
            (
                (
                    _title(change),
                    _figure(change, change.old),
                    _figure(change, change.new),
                    change_in_words(change),
                    verdict_in_words(change, difference),
                ),
                change.verdict,
            )
            for change in unequal
        ]
        if len(unequal) < len(changes):
            title = f"{len(changes) - len(unequal)} figures" if unequal else "all figures"
            rows.append(((title, "", "", "", "equal"), "same"))
        tables.append((name, rows))
    return tables


def summary(difference: ReportDiff) -> str:
    """The result in a sentence or two.

    Args:
        difference: The two reports compared.

    Returns:
        Text.
    """
    counts = {
        verdict: sum(change.verdict == verdict for change in difference.changes)
        for verdict in ("worse", "better", "same", "unknown")
    }
    words = (
        f"{counts['worse']} worse, {counts['better']} better, {counts['same']} the same, "
        f"{counts['unknown']} not compared."
    )
    for names, side in ((difference.missing, "old"), (difference.added, "new")):
        if names:
            words += f" Only in the {side} report: {', '.join(names)}."
    return words


def change_in_words(change: Change) -> str:
    """Relative change of a figure, with its confidence interval.

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


def verdict_in_words(change: Change, difference: ReportDiff) -> str:
    """Better, worse, or why not.

    Args:
        change: The change.
        difference: The comparison it is part of; a reason among its notes is not repeated.

    Returns:
        Text.
    """
    if change.verdict == "same":
        return change.reason
    if change.verdict != "unknown":
        return change.verdict
    is_noted = any(note.endswith(f": {change.reason}") for note in difference.notes)
    return "not compared" if is_noted else f"not compared: {change.reason}"


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
