"""A progress bar with rate and time left, shown only in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Tracker(Protocol):
    """Receives the progress of long work."""

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Record finished work.

        Args:
            amount: Finished work in the unit of the bar.
            note: A few words to show beside the bar, such as the present loss.
        """


class _Silent:
    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Show nothing."""


@contextmanager
def track(
    description: str, total: float | None, unit: str = "it", done: float = 0
) -> Iterator[Tracker]:
    """Show a bar on stderr while the body runs; show nothing if stderr is not a terminal.

    Args:
        description: Name of the work.
        total: Amount of work in ``unit``; None if unknown.
        unit: Name of what is counted.
        done: Amount of work that was done before a resumption.

    Yields:
        A tracker to be advanced.
    """
    if not sys.stderr.isatty():
        yield _Silent()
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.1f} {unit}/s", style="cyan")

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(description, total=total, completed=int(done), note="")

        class RichTracker:
            def advance(self, amount: float = 1, note: str | None = None) -> None:
                if note is not None:
                    bar.update(task, note=note)
                bar.advance(task, amount)

        yield RichTracker()
