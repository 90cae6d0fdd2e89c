"""How far long work is, where there is no terminal."""

from __future__ import annotations

import io
import sys
import time
import types

import pytest

from mistill import progress
from mistill.progress import LineTracker, track


def test_a_line_says_share_rate_and_time_left() -> None:
    now = [100.0]
    tracker = LineTracker("healing", 40, "layers", done=10, clock=lambda: now[0])
    assert tracker.line() == "healing: 10 of 40 layers (25%)"
    now[0] = 110.0
    tracker.advance(5)
    tracker.advance(5, "loss 0.5")
    assert tracker.line() == ("healing: 20 of 40 layers (50%), 1.0 layers/s, 20 s left, loss 0.5")
    now[0] = 1110.0
    assert "34 min left" in tracker.line()
    now[0] = 100_000.0
    assert "55.5 h left" in tracker.line()


def test_work_of_unknown_size_says_what_is_done() -> None:
    now = [0.0]
    tracker = LineTracker("reading", None, "B", clock=lambda: now[0])
    tracker.advance(3_000_000)
    now[0] = 2.0
    assert tracker.line() == "reading: 3,000,000 B, 1,500,000.0 B/s"


def test_lines_are_written_though_nothing_advances_and_stop_at_the_end() -> None:
    written = io.StringIO()
    tracker = LineTracker("waiting", 2, "steps")
    with tracker.writing(written, seconds=0.01):
        deadline = time.monotonic() + 5
        while written.getvalue().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
    lines = written.getvalue().splitlines()
    assert lines[:2] == ["waiting: 0 of 2 steps (0%)"] * 2
    time.sleep(0.05)
    assert written.getvalue().splitlines() == lines


@pytest.mark.parametrize(("rank", "writes"), [(None, True), ("0", True), ("1", False)])
def test_the_first_process_writes_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, writes: bool
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    with track("work", 3, "steps") as tracker:
        tracker.advance()
    assert isinstance(tracker, LineTracker) == writes
    assert stream.getvalue() == ""  # too short for a line


def test_a_stream_that_is_closed_ends_the_lines_and_not_the_work() -> None:
    stream = io.StringIO()
    stream.close()
    with LineTracker("work", 1).writing(stream, seconds=0.001):
        time.sleep(0.02)


def test_a_notebook_shows_a_bar_that_moves_and_ends_full(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []

    class Handle:
        def update(self, bundle: dict[str, str], raw: bool) -> None:
            shown.append(bundle)

    def display(bundle: dict[str, str], raw: bool, display_id: bool) -> Handle:
        shown.append(bundle)
        return Handle()

    notebook = types.ModuleType("IPython")
    notebook.get_ipython = lambda: types.SimpleNamespace(kernel=1)  # type: ignore[attr-defined]
    shows = types.ModuleType("IPython.display")
    shows.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", shows)
    monkeypatch.setattr(progress, "_BETWEEN_FRAMES", 0.01)
    with track("distilling <b>", 4, "tokens") as tracker:
        tracker.advance(2)
        deadline = time.monotonic() + 5
        while len(shown) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        tracker.advance(2)
    assert shown[0]["text/plain"] == "distilling <b>: 0 of 4 tokens (0%)"
    assert 'value="2" max="4"' in shown[2]["text/html"]
    assert 'value="4" max="4"></progress> distilling &lt;b&gt;: 4 of 4' in shown[-1]["text/html"]
    notebook.get_ipython = lambda: None  # type: ignore[attr-defined]
    count = len(shown)
    with track("plain", 1):
        pass
    assert len(shown) == count
