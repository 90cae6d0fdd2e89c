"""The size of a model on disk and in memory."""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The size of one model on disk and in memory.

    Attributes:
        parameters: Number of weights of the dense model; a shared embedding counts once.
        weight_bytes: Bytes of the files that hold weights.
        folder_bytes: Bytes of all files, tokenizer and records included.
        load_seconds: Time to open the folder, libraries already loaded, files in the page cache.
        peak_memory_bytes: Most memory that a process which ran only this model ever held: Python,
            libraries, weights and cache.
        resident_memory_bytes: Memory of that process after writing.
    """

    parameters: int
    weight_bytes: int
    folder_bytes: int
    load_seconds: float
    peak_memory_bytes: int
    resident_memory_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight of the dense model, scales and tables counted."""
        return self.weight_bytes * 8 / self.parameters


@dataclass(frozen=True, kw_only=True)
class Load:
    """One loading of a model by a process that had not loaded it before.

    Attributes:
        cold: Whether the files had been dropped from the page cache.
        seconds: Time to open the folder, libraries already loaded.
        first_token_seconds: From a prompt being handed over right after to the first token; an
            engine that maps its file reads much of it only now.
    """

    cold: bool
    seconds: float
    first_token_seconds: float


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """Bytes that a step of one token reads from memory, and the speed limit that follows.

    Attributes:
        weight_bytes: Weights as they are stored.
        packed_bytes: Weights as the engine lays them out in memory.
        cache_bytes_per_position: Keys and values for each earlier token.
        memory_bytes_per_second: Memory bandwidth of this machine with the threads of the run.
        kernel_seconds: Time of a step's integer matrix products with the threads of the run when
            the weights are in the processor's cache; None if that was not measured.
    """

    weight_bytes: int
    packed_bytes: int
    cache_bytes_per_position: int
    memory_bytes_per_second: float
    kernel_seconds: float | None = None

    def ceiling(self, depth: float) -> float:
        """Tokens per second that memory bandwidth and integer kernels allow, whichever is less.

        Args:
            depth: Earlier tokens, on average over the steps.

        Returns:
            Tokens per second.
        """
        bytes_read = self.packed_bytes + depth * self.cache_bytes_per_position
        return 1 / max(bytes_read / self.memory_bytes_per_second, self.kernel_seconds or 0.0)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of a process.

    Attributes:
        peak_bytes: The most that it ever held in physical memory.
        resident_bytes: What it holds now.
    """

    peak_bytes: int
    resident_bytes: int


def own_memory() -> Memory:
    """Memory of this process, as the kernel counts it.

    On Linux these are VmHWM and VmRSS. ``ru_maxrss`` is not used there: a child inherits it from
    the process that started it, so a small child of a large parent looks large.

    Returns:
        Peak and present size.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        text = status.read_text("ascii", errors="replace")
        kibibytes = dict(re.findall(r"^(VmHWM|VmRSS):\s+(\d+) kB$", text, re.MULTILINE))
        return Memory(
            peak_bytes=int(kibibytes["VmHWM"]) * 1024, resident_bytes=int(kibibytes["VmRSS"]) * 1024
        )
    if sys.platform == "win32":
        return _memory_of_windows()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024
    return Memory(peak_bytes=peak_bytes, resident_bytes=peak_bytes)


def _memory_of_windows() -> Memory:
    class Counters(ctypes.Structure):
        _fields_ = (
            ("size", ctypes.c_ulong),
            ("faults", ctypes.c_ulong),
            *((name, ctypes.c_size_t) for name in ("peak", "resident", *"abcdef")),
        )

    counters = Counters(size=ctypes.sizeof(Counters))
    libraries = getattr(ctypes, "windll")  # noqa: B009
    libraries.kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(libraries.kernel32.GetCurrentProcess())
    libraries.psapi.GetProcessMemoryInfo(process, ctypes.byref(counters), counters.size)
    return Memory(peak_bytes=int(counters.peak), resident_bytes=int(counters.resident))
