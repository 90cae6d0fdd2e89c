"""The machine that a measurement was made on.

Recorded is what decides the speed of matrix products: the processor, its vector instructions, how
many cores could be used, and what else was running. The names of the machine and its user are not
recorded.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures.energy import EnergyMeter
from mistill.cost_model.free_memory import physical_memory
from mistill.cost_model.processors import usable_threads
from mistill.folders.lineage import installed_versions

_CPUINFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
# The instructions that engines choose their kernels by, x86 first.
_INSTRUCTIONS_OF_NOTE = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16"),
    *("amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a measurement was made on and with.

    Attributes:
        processor: The processor's own name.
        instructions: Vector instructions that decide the speed of matrix products.
        cores: Physical cores; None where the system does not report it.
        processors: Logical processors of the machine.
        usable_processors: Those that this process may use, control groups considered.
        threads: Threads that every engine computed with.
        memory_bytes: Physical memory.
        system: Operating system and release.
        governor: How the clock frequency is chosen; None where the system does not report it.
        virtual: Whether the processor reports a virtual machine.
        load_average: Processes at work in the minute before the measurement; None where the
            system does not say.
        versions: Libraries and their versions.
        energy_counters: Names of the energy counters that can be read, such as ``package-0``.
        no_energy: Why there are none; empty where there are some, and in old reports.
    """

    processor: str
    instructions: tuple[str, ...]
    cores: int | None
    processors: int
    usable_processors: int
    threads: int
    memory_bytes: int
    system: str
    governor: str | None
    virtual: bool
    load_average: float | None
    versions: dict[str, str]
    energy_counters: tuple[str, ...] = ()
    no_energy: str = ""


def describe_machine(threads: int) -> Machine:
    """Describe this machine.

    Args:
        threads: Threads that every engine computes with.

    Returns:
        The description.
    """
    cpuinfo = _CPUINFO.read_text("utf-8", errors="replace") if _CPUINFO.is_file() else ""
    flags = set(" ".join(_fields(cpuinfo, "flags") + _fields(cpuinfo, "Features")).split())
    core_ids = set(zip(_fields(cpuinfo, "physical id"), _fields(cpuinfo, "core id"), strict=False))
    names = _fields(cpuinfo, "model name")
    meter = EnergyMeter()
    return Machine(
        processor=names[0] if names else platform.processor() or platform.machine(),
        instructions=tuple(name for name in _INSTRUCTIONS_OF_NOTE if name in flags),
        cores=len(core_ids) or None,
        processors=os.cpu_count() or 1,
        usable_processors=usable_threads(),
        threads=threads,
        memory_bytes=physical_memory(),
        system=f"{platform.system()} {platform.release()}",
        governor=_GOVERNOR.read_text("ascii").strip() if _GOVERNOR.is_file() else None,
        virtual="hypervisor" in flags,
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        versions=installed_versions(),
        energy_counters=tuple(counter.name for counter in meter.counters),
        no_energy=meter.reason,
    )


def _fields(cpuinfo: str, name: str) -> list[str]:
    return re.findall(rf"^{name}\s*: (.*)$", cpuinfo, re.MULTILINE)
