"""What did compression cost, and what did it buy?

``compare`` measures any mix of folders in one run: size, quality, speed and memory. ``diff`` holds
two of its reports against each other, ``misses`` one against a budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from benchmarks.budget import Miss as Miss
    from benchmarks.budget import misses as misses
    from benchmarks.comparison import Comparison as Comparison
    from benchmarks.comparison import ModelResult as ModelResult
    from benchmarks.comparison import open_report as open_report
    from benchmarks.differences import ReportDiff as ReportDiff
    from benchmarks.differences import diff as diff
    from benchmarks.measuring import compare as compare
    from benchmarks.report_settings import Budget as Budget
    from benchmarks.report_settings import DiffSettings as DiffSettings
    from benchmarks.report_settings import ShipSettings as ShipSettings
    from benchmarks.settings import BenchSettings as BenchSettings
    from benchmarks.shipping import best_to_ship as best_to_ship

_HOMES = {
    "BenchSettings": "benchmarks.settings",
    "Budget": "benchmarks.report_settings",
    "Comparison": "benchmarks.comparison",
    "DiffSettings": "benchmarks.report_settings",
    "Miss": "benchmarks.budget",
    "ModelResult": "benchmarks.comparison",
    "ReportDiff": "benchmarks.differences",
    "ShipSettings": "benchmarks.report_settings",
    "best_to_ship": "benchmarks.shipping",
    "compare": "benchmarks.measuring",
    "diff": "benchmarks.differences",
    "misses": "benchmarks.budget",
    "open_report": "benchmarks.comparison",
}

__all__ = [
    "BenchSettings",
    "Budget",
    "Comparison",
    "DiffSettings",
    "Miss",
    "ModelResult",
    "ReportDiff",
    "ShipSettings",
    "best_to_ship",
    "compare",
    "diff",
    "misses",
    "open_report",
]
__getattr__ = lazy_exports(__name__, _HOMES)
