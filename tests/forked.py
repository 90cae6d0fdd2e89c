"""Commands run in a forked copy of this process: quickly, alone, and stopped when they hang.

A crash of a library ends the copy and not the tests, and whatever reaches standard error is seen,
also what native code writes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

MOST_MEMORY = 16 << 30


class Ran(NamedTuple):
    """How a command ended: its exit code, or None where it was stopped, and what it wrote."""

    code: int | None
    out: str
    err: str


def run_forked(words: Sequence[str], *, cwd: Path, stdin: str = "", seconds: float = 60.0) -> Ran:
    """Run ``mistill`` with some words in a copy of this process."""
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(3)
        ]
        files[0].write(stdin)
        files[0].flush()
        files[0].seek(0)
        child = os.fork()
        if child == 0:
            _run(words, cwd, files, seconds)
        deadline = time.monotonic() + seconds
        code: int | None = None
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.002)
        for file in files[1:]:
            file.seek(0)
        return Ran(code, files[1].read(), files[2].read())


def _run(words: Sequence[str], cwd: Path, files: Sequence[IO[str]], seconds: float) -> None:
    code = 99
    try:
        for number, file in enumerate(files):
            os.dup2(file.fileno(), number)
        sys.stdin = os.fdopen(os.dup(0), "r", encoding="utf-8")
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", encoding="utf-8") for n in (1, 2))
        with contextlib.suppress(ImportError):
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(cwd)
        # Where it hangs it says so before it is stopped.
        faulthandler.dump_traceback_later(0.9 * seconds, file=files[2])
        from mistill.cli.app import main

        # Warnings are shown as outside of the tests, where they are no errors.
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning):
            warnings.simplefilter("ignore", category)

        code = main(list(words))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
