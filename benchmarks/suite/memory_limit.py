"""A program that may hold so much memory and take so long, and what became of it.

A control group of the user's own systemd is tried first: the kernel then ends the program, files
that it has mapped counted as it counts them on a laptop of that size. Where there is none, the
program's memory is watched a hundred times a second and the program is ended above the limit. What
is watched is what the kernel cannot drop and read again: pages of mapped files are not counted.
``RLIMIT_AS`` is no substitute, because it counts every mapped file as a whole.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Way = Literal["systemd", "watching", "none"]
Ending = Literal["finished", "memory", "time", "failed"]

_LOOK_SECONDS = 0.01
_KINDS = re.compile(r"^(RssAnon|RssShmem):\s+(\d+) kB$", re.MULTILINE)
# What a process in such a scope prints: the limit of its own control group.
_OWN_LIMIT = (
    "from pathlib import Path; group = Path('/proc/self/cgroup').read_text().rpartition('::')[2]; "
    "print(Path('/sys/fs/cgroup' + group.strip(), 'memory.max').read_text())"
)


@dataclass
class Ended:
    """How a program ended.

    Attributes:
        ending: ``finished``; ``memory`` or ``time``, if it was ended for exceeding that limit; or
            ``failed`` by itself.
        lines: What it printed, line by line.
        peak_bytes: The most memory it was seen with that the kernel cannot drop.
        errors: The end of what it wrote to standard error.
    """

    ending: Ending = "finished"
    lines: list[str] = field(default_factory=list)
    peak_bytes: int = 0
    errors: str = ""


def find_way(limit_bytes: int) -> Way:
    """How memory is limited on this machine, by trying it.

    Args:
        limit_bytes: The limit.

    Returns:
        ``systemd`` if a program in a scope of its own has this limit, else ``watching``.
    """
    try:
        done = subprocess.run(
            [*_scope(limit_bytes), sys.executable, "-c", _OWN_LIMIT],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "watching"
    return "systemd" if done.stdout.strip() == str(limit_bytes) else "watching"


def run_limited(
    words: Sequence[str],
    way: Way,
    limit_bytes: int,
    limit_seconds: float,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run a program within limits.

    Args:
        words: The program and its arguments.
        way: What ``find_way`` returned, or ``none`` for no limit of memory.
        limit_bytes: Memory that it may hold.
        limit_seconds: Time that it may take, start included.
        environment: Its environment variables; those of this process by default.

    Returns:
        How it ended, and what it printed until then.
    """
    scope = _scope(limit_bytes) if way == "systemd" else []
    ended = Ended()
    errors: list[str] = []
    with subprocess.Popen(
        [*scope, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        readers = [
            threading.Thread(target=ended.lines.extend, args=(process.stdout,)),
            threading.Thread(target=errors.extend, args=(process.stderr,)),
        ]
        for reader in readers:
            reader.start()
        try:
            _watch(process, ended, way, limit_bytes, limit_seconds)
        finally:
            process.kill()
            code = process.wait()
            for reader in readers:
                reader.join()
    ended.errors = "".join(errors)[-2000:]
    if ended.ending == "finished" and code:
        # The kernel ends the largest process of a group with signal 9, which a shell tells as 137.
        ended.ending = "memory" if way == "systemd" and code in (-9, 137) else "failed"
    return ended


def _watch(
    process: subprocess.Popen[str],
    ended: Ended,
    way: Way,
    limit_bytes: int,
    limit_seconds: float,
) -> None:
    """Look at a process until it ends or exceeds a limit, which is then noted."""
    deadline = time.monotonic() + limit_seconds
    while process.poll() is None:
        held = held_bytes(process.pid)
        ended.peak_bytes = max(ended.peak_bytes, held)
        if way == "watching" and held > limit_bytes:
            ended.ending = "memory"
            return
        if time.monotonic() > deadline:
            ended.ending = "time"
            return
        time.sleep(_LOOK_SECONDS)


def held_bytes(process: int) -> int:
    """Memory of a process that the kernel cannot drop and read again from a file.

    Args:
        process: Its id.

    Returns:
        Bytes; 0 once it has ended.
    """
    try:
        text = Path(f"/proc/{process}/status").read_text("ascii", errors="replace")
    except OSError:
        return 0
    return sum(int(size) for _, size in _KINDS.findall(text)) * 1024


def _scope(limit_bytes: int) -> list[str]:
    return [
        *("systemd-run", "--user", "--scope", "--quiet", "--collect"),
        *("-p", f"MemoryMax={limit_bytes}", "-p", "MemorySwapMax=0"),
    ]
