"""What did compression cost, and what did it buy?

``compare`` measures any mix of folders in one run: size, quality, speed and memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from benchmarks.comparison import Comparison as Comparison
    from benchmarks.comparison import ModelResult as ModelResult
    from benchmarks.measuring import compare as compare
    from benchmarks.settings import BenchSettings as BenchSettings

_HOMES = {
    "BenchSettings": "benchmarks.settings",
    "Comparison": "benchmarks.comparison",
    "ModelResult": "benchmarks.comparison",
    "compare": "benchmarks.measuring",
}

__all__ = ["BenchSettings", "Comparison", "ModelResult", "compare"]
__getattr__ = lazy_exports(__name__, _HOMES)
