"""Energy that the machine spends, where it tells.

Linux shows the counters of Intel's and AMD's processors (RAPL) as files under ``powercap``: micro-
joules since some moment, which begin again at zero beyond a limit. The counters are those of whole
processors, and of memory where there is one: what else the machine does is in them too. Virtual
machines mostly have none, and since 2020 mostly only root may read them; then there is no figure.
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
        limit: Where it begins again at zero, in microjoules.
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
        counters: What is added up; none where the machine does not tell.
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
        """Energy between two readings, less than one round of a counter apart.

        At 100 W a counter of 32 bits takes about ten minutes for a round.

        Args:
            before: What ``read`` said first.
            after: What it said later.

        Returns:
            Joules; None where the machine does not tell.
        """
        if not self.counters:
            return None
        spent = 0
        for counter, first, last in zip(self.counters, before, after, strict=True):
            spent += last - first if last >= first else counter.limit - first + last
        return spent / 1e6


def _find(root: Path) -> tuple[tuple[Counter, ...], str]:
    """Processors as a whole, and memory, which is not in them; never a part that is in another."""
    zones = sorted(root.iterdir()) if root.is_dir() else []
    found = []
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
            return (), "the counters may be read by root only"
        except (OSError, ValueError):
            continue
        found.append(counter)
    return tuple(found), "" if found else "the machine shows no counters"
