"""Work that a stranger's file asks for, done by a process that may be stopped.

A chat template is a program, a regular expression may take longer than the universe lasts, and a
grammar may overflow the stack of the library that compiles it. Such work is done by a worker
process with bounds of time and memory; whatever happens to it, this process goes on. There is one
worker for each function, so that a grammar which takes seconds keeps no chat template waiting. It
starts at the first call, serves one call after another, and ends with this process.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

SECONDS = 5.0
"""Seconds that one call may take; what is honest takes milliseconds."""

MEMORY_BYTES = 2 << 30
"""Memory that the worker may take, where the system can limit it."""

_LENGTH_BYTES = 8
_MOST_RESULT_BYTES = 1 << 28
# -I keeps Python from importing from the current folder, which may be a stranger's.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from mistill.bounded import serve; serve()"


class OutOfBoundsError(Exception):
    """A call took too long or too much memory, or ended its process; the message says which."""


def call_bounded(function: str, *arguments: Any) -> Any:
    """Call a function in the worker process.

    Args:
        function: Its module and name, such as ``mistill.text.chat_template:rendered``. Its result
            must be a JSON value.
        *arguments: What it is given, as pickle carries it.

    Returns:
        Its result.

    Raises:
        OutOfBoundsError: If it exceeds the bounds, or its process dies.
        RuntimeError: If it raises anything; what may be expected it should return.
    """
    with _STARTING:
        worker = _WORKERS.setdefault(function, _Worker())
    return worker.call(function, arguments)


class _Worker:
    """The worker process, started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def call(self, function: str, arguments: tuple[Any, ...]) -> Any:
        with self._lock:
            # One that somebody has killed in the meantime is replaced.
            if self._process is None or self._process.poll() is not None:
                self.stop()
                self._process = _start()
            try:
                reply = _ask(self._process, pickle.dumps((function, arguments)))
            except BaseException:
                # An interrupt too: a worker in the middle of a call serves no other.
                self.stop()
                raise
        if "failure" in reply:
            if reply["failure"] == "MemoryError":
                raise OutOfBoundsError(f"takes more than {MEMORY_BYTES >> 30} GiB of memory")
            raise RuntimeError(f"{function} failed: {reply['failure']}")
        return reply["result"]

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            _close(process)
            process.wait()

    def forget(self) -> None:
        """Leave the worker to the process that this one was forked from."""
        process, self._process = self._process, None
        self._lock = threading.Lock()
        if process is not None:
            _close(process)
            process.returncode = 0  # it is no child of this process


def _start() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [
            sys.executable,
            "-I",
            "-c",
            _PROGRAM.format(path=[str(Path(p).resolve()) for p in sys.path]),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=sys.platform != "win32",  # Ctrl-C is not for it
    )
    assert process.stdout is not None
    if not process.stdout.read(1):  # it has imported what it needs, and time counts from now on
        process.kill()
        process.wait()
        raise RuntimeError("the worker process for templates and expressions does not start")
    return process


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):  # what was not written when it died
            pipe.close()


def _ask(process: subprocess.Popen[bytes], request: bytes) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = time.monotonic() + SECONDS
    timer = None
    if sys.platform == "win32":  # where pipes cannot be waited for
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
    try:
        process.stdin.write(len(request).to_bytes(_LENGTH_BYTES, "little") + request)
        process.stdin.flush()
        head = _read(process.stdout, _LENGTH_BYTES, deadline)
        body = _read(process.stdout, int.from_bytes(head, "little"), deadline)
    except (EOFError, BrokenPipeError) as error:
        code = process.wait()
        if time.monotonic() >= deadline or (code < 0 and -code == _CPU_SIGNAL):
            raise OutOfBoundsError(f"takes more than {SECONDS:g} seconds") from error
        raise OutOfBoundsError(_last_words(code)) from error
    finally:
        if timer is not None:
            timer.cancel()
    reply: dict[str, Any] = json.loads(body)
    return reply


_CPU_SIGNAL = int(getattr(signal, "SIGXCPU", 0))


def _last_words(code: int) -> str:
    if code == -int(getattr(signal, "SIGABRT", 0)):
        return f"takes more than {MEMORY_BYTES >> 30} GiB of memory, or ends its library"
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"ends the process that reads it ({name})"


def _read(pipe: IO[bytes], count: int, deadline: float) -> bytes:
    """Read so many bytes before a moment."""
    content = b""
    while len(content) < count:
        if sys.platform == "win32":
            part = pipe.read(count - len(content))
        else:
            descriptor = pipe.fileno()
            ready, _, _ = select.select([descriptor], [], [], max(0, deadline - time.monotonic()))
            part = os.read(descriptor, min(count - len(content), 1 << 20)) if ready else b""
            if not ready:
                raise OutOfBoundsError(f"takes more than {SECONDS:g} seconds")
        if not part:
            raise EOFError
        content += part
    return content


_WORKERS: dict[str, _Worker] = {}
_STARTING = threading.Lock()


@atexit.register
def _stop_all() -> None:
    for worker in _WORKERS.values():
        worker.stop()


def _forget_all() -> None:
    global _STARTING
    _STARTING = threading.Lock()
    for worker in _WORKERS.values():
        worker.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


# --- in the worker process ----------------------------------------------------------------------


def serve() -> None:
    """Answer calls from standard input on standard output, until the input ends."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not mix with the replies
    _limit_memory()
    replies.write(b".")
    replies.flush()
    while head := requests.read(_LENGTH_BYTES):
        function, arguments = pickle.loads(requests.read(int.from_bytes(head, "little")))
        _limit_time()
        body = _answer(function, arguments)
        replies.write(len(body).to_bytes(_LENGTH_BYTES, "little") + body)
        replies.flush()


def _answer(function: str, arguments: tuple[Any, ...]) -> bytes:
    module, _, name = function.partition(":")
    try:
        result = getattr(importlib.import_module(module), name)(*arguments)
        body = json.dumps({"result": result}).encode()
        if len(body) > _MOST_RESULT_BYTES:
            raise MemoryError
        return body
    except MemoryError:
        return b'{"failure": "MemoryError"}'
    except BaseException as error:
        return json.dumps({"failure": f"{type(error).__name__}: {error}"[:2000]}).encode()


def _limit_memory() -> None:
    for name, bytes_allowed in (("RLIMIT_AS", MEMORY_BYTES), ("RLIMIT_CORE", 0)):
        # Windows has no such module; macOS refuses to set the first.
        with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
            import resource

            resource.setrlimit(getattr(resource, name), (bytes_allowed, bytes_allowed))


def _limit_time() -> None:
    """End this process when it has computed for long, even if the one that asked is gone."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime + SECONDS) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
