"""A server's process: started, watched and stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.serving.streams import Server
from mistill.errors import ServerError

START_SECONDS = 120.0
STOP_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a process has taken so far.

    Attributes:
        processor_seconds: Processor time, of all threads.
        resident_bytes: Memory that it holds.
        peak_bytes: The most memory that it has held.
        descriptors: Open files and connections.
    """

    processor_seconds: float
    resident_bytes: int
    peak_bytes: int
    descriptors: int


def usage_of(process: int | None) -> Usage | None:
    """What a process has taken so far.

    Args:
        process: Its number.

    Returns:
        What Linux tells of it; None elsewhere, or if it has ended.
    """
    if process is None:
        return None
    folder = Path(f"/proc/{process}")
    with contextlib.suppress(OSError):
        # The name of the program, in brackets, may hold spaces.
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        status = dict(
            line.split(":", 1) for line in (folder / "status").read_text().splitlines() if line
        )
        ticks = int(fields[11]) + int(fields[12])
        return Usage(
            processor_seconds=ticks / os.sysconf("SC_CLK_TCK"),
            resident_bytes=int(status["VmRSS"].split()[0]) * 1024,
            peak_bytes=int(status["VmHWM"].split()[0]) * 1024,
            descriptors=len(list((folder / "fd").iterdir())),
        )
    return None


@contextlib.contextmanager
def running(command: Sequence[str], url: str) -> Iterator[tuple[Server, int]]:
    """Start a server, and stop it in the end.

    Args:
        command: Its command line.
        url: Where it will answer.

    Yields:
        The server, once it answers, and the number of its process.

    Raises:
        ServerError: If it ends or does not answer in time.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            yield _wait_for(process, url, log), process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def running_folder(
    folder: Path, *options: str, threads: int | None = None
) -> Iterator[tuple[Server, int]]:
    """Start ``mistill serve`` for a folder, and stop it in the end.

    Args:
        folder: An ONNX folder.
        *options: More options of the command.
        threads: Threads to compute with.

    Yields:
        The server, once it answers, and the number of its process.
    """
    port = free_port()
    command = [sys.executable, "-m", "mistill", "serve", str(folder), "--port", str(port)]
    command += [] if threads is None else ["--threads", str(threads)]
    with running([*command, *options], f"http://127.0.0.1:{port}") as started:
        yield started


def free_port() -> int:
    """A port that nobody listens on.

    Returns:
        Its number.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def _wait_for(process: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> Server:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            return Server(url)
        except ServerError as error:
            if process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
                continue
            raise ServerError(f"the server did not start: {_tail(log) or error}") from error


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").split("\n")
    return " ".join(line for line in lines if line.strip())[-500:]
