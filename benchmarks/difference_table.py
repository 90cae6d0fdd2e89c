"""Two reports compared, as a table: for the terminal, and in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.changes.differences import ReportDiff
from benchmarks.changes.verdicts import Change, Verdict
from benchmarks.figures.column import EN_DASH, significant
from benchmarks.report.table import escaped

if TYPE_CHECKING:
    from rich.table import Table

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
