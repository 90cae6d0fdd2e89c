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

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.changes.comparable import notes, obstacles_between, unsteadiness
from benchmarks.changes.verdicts import Change, judge, look
from benchmarks.figures.column import Nature
from benchmarks.figures.comparison import Comparison, open_report
from benchmarks.report.columns import columns_of
from benchmarks.report_settings import DiffSettings
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
        from benchmarks.difference_table import terminal_table

        return terminal_table(self)

    def to_markdown(self) -> str:
        """The changes as Markdown, for the comment of a pull request.

        Returns:
            Markdown text.
        """
        from benchmarks.difference_table import markdown

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
    """
    settings = settings_from(DiffSettings, settings, options)
    before = old if isinstance(old, Comparison) else open_report(old)
    after = new if isinstance(new, Comparison) else open_report(new)
    names = _names(before, after, settings.pairs)
    obstacles = obstacles_between(before, after)
    columns = {column.key: column for side in (before, after) for column in columns_of(side)}
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
