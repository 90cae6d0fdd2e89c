"""What did compression cost, and what did it buy?

``compare`` measures any mix of folders in one run: size, quality, speed and memory. ``diff`` holds
two of its reports against each other, ``misses`` one against a budget; ``evaluate`` lets a folder
answer tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from benchmarks.budget import Miss as Miss
    from benchmarks.budget import misses as misses
    from benchmarks.comparison import Comparison as Comparison
    from benchmarks.comparison import open_report as open_report
    from benchmarks.differences import ReportDiff as ReportDiff
    from benchmarks.differences import diff as diff
    from benchmarks.evaluation import Evaluation as Evaluation
    from benchmarks.evaluation import evaluate as evaluate
    from benchmarks.evaluation_settings import EvalSettings as EvalSettings
    from benchmarks.measuring import compare as compare
    from benchmarks.model_result import ModelResult as ModelResult
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
    "EvalSettings": "benchmarks.evaluation_settings",
    "Evaluation": "benchmarks.evaluation",
    "Miss": "benchmarks.budget",
    "ModelResult": "benchmarks.model_result",
    "ReportDiff": "benchmarks.differences",
    "ShipSettings": "benchmarks.report_settings",
    "best_to_ship": "benchmarks.shipping",
    "compare": "benchmarks.measuring",
    "diff": "benchmarks.differences",
    "evaluate": "benchmarks.evaluation",
    "misses": "benchmarks.budget",
    "open_report": "benchmarks.comparison",
}

__all__ = [
    "BenchSettings",
    "Budget",
    "Comparison",
    "DiffSettings",
    "EvalSettings",
    "Evaluation",
    "Miss",
    "ModelResult",
    "ReportDiff",
    "ShipSettings",
    "best_to_ship",
    "compare",
    "diff",
    "evaluate",
    "misses",
    "open_report",
]
__getattr__ = lazy_exports(__name__, _HOMES)
