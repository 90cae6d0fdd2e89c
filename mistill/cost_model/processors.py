"""How many threads a process may use: the machine's processors are often not all its own.

ONNX Runtime counts the cores of the machine. A container with a quota, or a process held to some
processors, then has more threads than processors, and threads that wait for one another by
spinning take the time of those that work.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger(__name__)

MOST_THREADS = 1024
"""Threads that may be asked for: far more than pay, and few enough to be started."""


def usable_threads(root: Path = Path("/")) -> int:
    """Threads that can run at once in this process.

    Args:
        root: Where ``proc`` and ``sys`` are; another root is for tests.

    Returns:
        The processors that this process may run on, or its share of them if a control group
        limits it; at least 1.
    """
    processors = len(usable_processors()) or os.cpu_count() or 1
    return max(1, int(min([processors, *_quotas(root)])))


def usable_processors() -> list[int]:
    """The processors that this thread may run on, by their numbers.

    Returns:
        In order; empty where the system does not tell.
    """
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def processors_at_work(seconds: float = 0.5) -> float:
    """How many processors the programs of this machine keep busy, watched while this one rests.

    Args:
        seconds: For how long they are watched.

    Returns:
        From 0 to the number of processors of the machine. Where psutil is not installed, the
        system's average of the last minute; 0 where it has none.
    """
    processors = os.cpu_count() or 1
    try:
        import psutil
    except ModuleNotFoundError:
        average = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        return min(average, float(processors))
    return float(psutil.cpu_percent(seconds)) / 100 * processors


def warn_if_busy(threads: int) -> None:
    """Warn before a measurement of time if other programs leave too few processors for it.

    Args:
        threads: Threads that will be timed.
    """
    processors, busy = os.cpu_count() or 1, processors_at_work()
    if processors - busy < min(threads, processors) - 0.3:
        _log.warning(
            "other programs keep %.1f of the %d processors busy, and %d threads are to be timed: "
            "speeds will be too low; end those programs first, or trust only ratios of one run",
            busy,
            processors,
            threads,
        )


@contextmanager
def held_to_first_processor() -> Iterator[None]:
    """Keep this thread on the first of its processors, for a measurement of a moment.

    A thread that another one wakes begins on the waker's processor on some virtual machines, and
    is moved to an idle one only after many milliseconds.
    """
    processors = usable_processors()
    if processors:
        os.sched_setaffinity(0, processors[:1])
    try:
        yield
    finally:
        if processors:
            os.sched_setaffinity(0, processors)


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of every control group that limits this process, of either version.

    Args:
        root: Where ``proc`` and ``sys`` are.
        controller: What the groups limit, such as ``cpu``.

    Yields:
        The group of the process and those around it.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mount):
                break
            yield folder


def _quotas(root: Path) -> Iterator[float]:
    """Processors granted by every control group that this process is in."""
    quotas = map(_quota, control_groups(root, "cpu"))
    return (quota for quota in quotas if quota is not None)


def _quota(folder: Path) -> float | None:
    """Processors granted by one control group: time that it may use in each period of time."""
    try:
        if (folder / "cpu.max").is_file():
            used, period = (folder / "cpu.max").read_text().split()
        else:
            used = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
    except OSError:
        return None
    return None if used in ("max", "-1") else int(used) / int(period)
