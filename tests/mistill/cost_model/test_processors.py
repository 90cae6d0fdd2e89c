"""What other programs leave of the processors is seen before anything is timed."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from mistill.cost_model.processors import processors_at_work, warn_if_busy


def test_a_program_that_computes_is_seen() -> None:
    code = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as program:
        try:
            assert program.stdout is not None
            program.stdout.readline()
            assert 0.5 < processors_at_work(0.5) <= (os.cpu_count() or 1)
        finally:
            program.kill()


@pytest.mark.parametrize(
    ("percent", "threads", "warns"),
    [(0.0, 4, False), (5.0, 4, False), (50.0, 2, False), (50.0, 3, True), (100.0, 1, True)],
)
def test_a_machine_without_free_processors_is_warned_of(
    percent: float,
    threads: int,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: percent)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    warn_if_busy(threads)
    assert ("other programs keep" in caplog.text) is warns
    assert not warns or f"{percent / 25:.1f} of the 4 processors" in caplog.text


def test_without_psutil_the_average_of_the_last_minute_stands_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    assert processors_at_work() == 4.0
    warn_if_busy(1)
    assert "other programs keep 4.0 of the 4 processors" in caplog.text
    monkeypatch.delattr(os, "getloadavg")
    assert processors_at_work() == 0.0
