"""How far long work is: a bar in a terminal or a notebook, else a line every 20 seconds."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from html import escape
from typing import Any, Protocol, TextIO

# Seconds between two lines.
_BETWEEN_LINES = 20.0
_BETWEEN_FRAMES = 0.5


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


class LineTracker:
    """Writes how far work is, a line at a time, for logs and pipes."""

    def __init__(
        self,
        description: str,
        total: float | None,
        unit: str = "it",
        done: float = 0,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to count.

        Args:
            description: Name of the work.
            total: Amount of work in ``unit``; None if unknown.
            unit: Name of what is counted.
            done: Amount of work that was done before a resumption.
            clock: Seconds that pass.
        """
        self._description, self._total, self._unit = description, total, unit
        self._done, self._completed = done, done
        self._note = ""
        self._clock, self._started = clock, clock()

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Count finished work."""
        self._completed += amount
        if note is not None:
            self._note = note

    def line(self) -> str:
        """How far the work is.

        Returns:
            Amount and share, rate, time left and the last note, as far as they are known.
        """
        elapsed = self._clock() - self._started
        rate = (self._completed - self._done) / elapsed if elapsed > 0 else 0.0
        amount = f"{self._completed:,.0f}"
        parts = [f"{amount} {self._unit}"]
        if self._total:
            share = self._completed / self._total
            parts = [f"{amount} of {self._total:,.0f} {self._unit} ({share:.0%})"]
        if rate > 0:
            parts.append(f"{rate:,.1f} {self._unit}/s")
            if self._total:
                parts.append(f"{duration((self._total - self._completed) / rate)} left")
        if self._note:
            parts.append(self._note)
        return f"{self._description}: {', '.join(parts)}"

    def html(self) -> str:
        """The same for a notebook, with a bar.

        Returns:
            A line of HTML.
        """
        done = f' value="{self._completed:g}" max="{self._total:g}"' if self._total else ""
        return f"<progress{done}></progress> {escape(self.line())}"

    @contextmanager
    def showing(self, show: Callable[[], object], seconds: float) -> Iterator[None]:
        """Show how far the work is every so often while the body runs, and at its end.

        Args:
            show: Shows it.
            seconds: Time between two calls.

        Yields:
            Nothing.
        """
        try:
            with _repeating(show, seconds):
                yield
        finally:
            show()

    @contextmanager
    def writing(self, stream: TextIO, seconds: float = _BETWEEN_LINES) -> Iterator[None]:
        """Write a line every so often while the body runs, whether or not the work advances.

        Args:
            stream: Where to.
            seconds: Time between two lines.

        Yields:
            Nothing.
        """

        def write() -> None:
            with suppress(OSError, ValueError):  # nobody reads it any more
                print(self.line(), file=stream, flush=True)

        with _repeating(write, seconds):
            yield


@contextmanager
def _repeating(act: Callable[[], object], seconds: float) -> Iterator[None]:
    """Do something every so often, in a thread of its own, while the body runs."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(seconds):
            act()

    thread = threading.Thread(target=work, daemon=True, name="mistill-progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    Args:
        seconds: Not below 0.

    Returns:
        Such as ``34 min``.
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes / 60:.1f} h" if seconds < 3 * 86400 else f"{seconds / 86400:,.0f} days"


def _notebook_display() -> Callable[..., Any] | None:
    """What shows something in a notebook, where this process is the kernel of one."""
    module = sys.modules.get("IPython")
    shell = None if module is None else module.get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    show: Callable[..., Any] = importlib.import_module("IPython.display").display
    return show


def _bundle(tracker: LineTracker) -> dict[str, str]:
    return {"text/html": tracker.html(), "text/plain": tracker.line()}


@contextmanager
def track(
    description: str, total: float | None, unit: str = "it", done: float = 0
) -> Iterator[Tracker]:
    """Show on stderr how far the work is while the body runs.

    In a terminal and in a notebook this is a bar. Elsewhere it is a line every 20 seconds, which
    the first of the processes that a launcher has started writes.

    Args:
        description: Name of the work.
        total: Amount of work in ``unit``; None if unknown.
        unit: Name of what is counted.
        done: Amount of work that was done before a resumption.

    Yields:
        A tracker to be advanced.
    """
    if sys.stderr is None or os.environ.get("RANK", "0") != "0":
        yield _Silent()
        return
    display = _notebook_display()
    if display is not None:
        tracker = LineTracker(description, total, unit, done)
        handle = display(_bundle(tracker), raw=True, display_id=True)

        def show() -> None:
            handle.update(_bundle(tracker), raw=True)

        with tracker.showing(show, _BETWEEN_FRAMES):
            yield tracker
        return
    if not sys.stderr.isatty():
        tracker = LineTracker(description, total, unit, done)
        with tracker.writing(sys.stderr):
            yield tracker
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
