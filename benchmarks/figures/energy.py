"""Energy that the machine uses, where it has counters for it.

Linux shows the energy counters of Intel's and AMD's processors (RAPL) as files under ``powercap``:
microjoules since some moment, which wrap around at a limit. They count whole processors, and
memory where there is a counter for it, so other programs are counted too. Most virtual machines
have none, and since 2020 most systems let only root read them; then there is no figure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")

# A processor as a whole, and below it one of its parts.
_PACKAGE = re.compile(r"intel-rapl:\d+")
_PART = re.compile(r"intel-rapl:\d+:\d+")


@dataclass(frozen=True)
class Counter:
    """A counter of energy.

    Attributes:
        name: What it counts, such as ``package-0``.
        file: Microjoules so far.
        limit: Where it wraps around to zero, in microjoules.
    """

    name: str
    file: Path
    limit: int

    def read(self) -> int:
        """Microjoules so far.

        Returns:
            The counter.
        """
        return int(self.file.read_text("ascii"))


class EnergyMeter:
    """Joules between two moments.

    Attributes:
        counters: The counters that are added up; none where the machine has none.
        reason: Why there is none; empty where there is one.
    """

    counters: tuple[Counter, ...]
    reason: str

    def __init__(self, root: Path = POWERCAP) -> None:
        """Look for counters.

        Args:
            root: Where the kernel shows them.
        """
        self.counters, self.reason = _find(root)

    def read(self) -> tuple[int, ...]:
        """The counters now.

        Returns:
            Microjoules, one for each counter.
        """
        return tuple(counter.read() for counter in self.counters)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float | None:
        """Energy between two readings, between which a counter wraps around at most once.

        At 100 W a counter of 32 bits wraps around about every ten minutes.

        Args:
            before: The first reading.
            after: The second reading.

        Returns:
            Joules; None where the machine has no counters.
        """
        if not self.counters:
            return None
        spent = 0
        for counter, first, last in zip(self.counters, before, after, strict=True):
            spent += last - first if last >= first else counter.limit - first + last
        return spent / 1e6


def _find(root: Path) -> tuple[tuple[Counter, ...], str]:
    """Counters of whole processors, and of memory, which those leave out: nothing counts twice."""
    zones = sorted(root.iterdir()) if root.is_dir() else []
    counters = []
    for zone in zones:
        try:
            name = (zone / "name").read_text("ascii").strip()
            whole = _PACKAGE.fullmatch(zone.name) and name.startswith("package")
            memory = _PART.fullmatch(zone.name) and name == "dram"
            if not (whole or memory):
                continue
            limit = int((zone / "max_energy_range_uj").read_text("ascii"))
            counter = Counter(name, zone / "energy_uj", limit)
            counter.read()
        except PermissionError:
            return (), "only root may read the counters"
        except (OSError, ValueError):
            continue
        counters.append(counter)
    return tuple(counters), "" if counters else "the machine has no energy counters"
