"""What did compression cost, and what did it buy?

``compare`` measures any mix of folders in one run: size, quality, speed and memory. ``diff`` holds
two of its reports against each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from benchmarks.comparison import Comparison as Comparison
    from benchmarks.comparison import ModelResult as ModelResult
    from benchmarks.comparison import open_report as open_report
    from benchmarks.differences import DiffSettings as DiffSettings
    from benchmarks.differences import ReportDiff as ReportDiff
    from benchmarks.differences import diff as diff
    from benchmarks.measuring import compare as compare
    from benchmarks.settings import BenchSettings as BenchSettings

_HOMES = {
    "BenchSettings": "benchmarks.settings",
    "Comparison": "benchmarks.comparison",
    "DiffSettings": "benchmarks.differences",
    "ModelResult": "benchmarks.comparison",
    "ReportDiff": "benchmarks.differences",
    "compare": "benchmarks.measuring",
    "diff": "benchmarks.differences",
    "open_report": "benchmarks.comparison",
}

__all__ = [
    "BenchSettings",
    "Comparison",
    "DiffSettings",
    "ModelResult",
    "ReportDiff",
    "compare",
    "diff",
    "open_report",
]
__getattr__ = lazy_exports(__name__, _HOMES)
