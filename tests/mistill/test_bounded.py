"""Work that takes too long or too much memory is stopped, and this process goes on."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from mistill import bounded
from mistill.bounded import OutOfBoundsError, call_bounded


def test_a_call_gives_what_the_function_gives():
    assert call_bounded("operator:add", "half \ud800 ", "text") == "half \ud800 text"


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        ("operator:pow", (10**10, 10**10), "takes more than 0.5 seconds"),
        ("time:sleep", (60,), "takes more than 0.5 seconds"),
        ("operator:mul", ("x", 10**11), "GiB of memory"),
        ("os:abort", (), "memory, or ends its library"),
        ("signal:raise_signal", (11,), "SIGSEGV"),
        ("os:_exit", (3,), "exit code 3"),
    ],
)
def test_what_exceeds_the_bounds_is_stopped_and_the_next_call_is_served(
    monkeypatch, function, arguments, words
):
    monkeypatch.setattr(bounded, "SECONDS", 0.5)
    with pytest.raises(OutOfBoundsError, match=words):
        call_bounded(function, *arguments)
    assert call_bounded("operator:add", 1, 2) == 3


def test_a_failure_of_ours_is_no_matter_of_bounds():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        call_bounded("operator:truediv", 1, 0)


def test_the_worker_ends_with_the_process_that_started_it():
    program = textwrap.dedent("""
        import os
        from mistill import bounded
        bounded.call_bounded("operator:add", 1, 2)
        print(next(iter(bounded._WORKERS.values()))._process.pid, flush=True)
        os._exit(0)  # no handler runs, as after SIGKILL
    """)
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    worker = int(ran.stdout)
    for _ in range(200):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the worker is still there")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_starts_a_worker_of_its_own():
    assert call_bounded("operator:add", 1, 2) == 3
    queue = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(
        target=lambda: queue.put(call_bounded("operator:add", 3, 4))
    )
    child.start()
    assert queue.get(timeout=30) == 7
    child.join()
    assert call_bounded("operator:add", 1, 2) == 3


def test_a_call_that_takes_long_keeps_no_other_function_waiting():
    over = threading.Event()

    def sleep() -> None:
        call_bounded("time:sleep", 1)
        over.set()

    thread = threading.Thread(target=sleep)
    thread.start()
    assert call_bounded("os:getpid") != os.getpid()
    assert not over.is_set()
    thread.join()
