"""How much memory a process may still take: the machine's free memory is often not all its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from typing import Any

from mistill.cost_model.processors import control_groups

UNKNOWN = 4 << 30
"""Free memory that is assumed where the system does not tell."""


def free_memory(root: Path = Path("/")) -> int:
    """Memory that this process may take before the machine or a control group runs short.

    Args:
        root: Where ``proc`` and ``sys`` are; another root is for tests.

    Returns:
        Bytes; memory that only caches files counts as free.
    """
    limits = [_of_machine(root)]
    for folder in control_groups(root, "memory"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            limits.append(_of_group(folder))
    return max(0, min(limits))


def _of_machine(root: Path) -> int:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return _fields((root / "proc/meminfo").read_text())["MemAvailable:"] * 1024
    if sys.platform == "win32":
        return _of_windows()
    # Elsewhere the system tells only how much there is; half of it is often in use.
    return physical_memory() // 2 or UNKNOWN


def _of_group(folder: Path) -> int:
    """What a control group may still take; raises ValueError where it has no limit."""
    newer = (folder / "memory.max").is_file()
    limit = (folder / ("memory.max" if newer else "memory.limit_in_bytes")).read_text()
    used = (folder / ("memory.current" if newer else "memory.usage_in_bytes")).read_text()
    statistics = _fields((folder / "memory.stat").read_text())
    cached = statistics["inactive_file" if newer else "total_inactive_file"]
    return int(limit) - int(used) + cached


def _fields(text: str) -> dict[str, int]:
    rows = (line.split() for line in text.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}


def physical_memory() -> int:
    """Memory of the machine.

    Returns:
        Bytes; 0 where the system does not tell.
    """
    if sys.platform == "win32":
        return int(_windows_status().physical)
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


def _of_windows() -> int:
    return int(_windows_status().free)


def _windows_status() -> Any:
    class MemoryStatus(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("physical", "free", "a", "b", "c", "d", "e")),
        )

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    getattr(ctypes, "windll").kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # noqa: B009
    return status
