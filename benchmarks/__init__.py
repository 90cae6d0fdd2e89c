"""What compression costs in quality, and what it saves in size, time and memory.

``compare`` measures any mix of folders in one run: size, quality, speed and memory. ``diff``
compares two of its reports, ``misses`` checks one against a budget, ``evaluate`` measures a folder
on tasks, ``judge_replies`` lets a judge compare two models' replies in both orders, and
``bench_serving`` measures a server under the load of many clients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from benchmarks.changes.differences import ReportDiff as ReportDiff
    from benchmarks.changes.differences import diff as diff
    from benchmarks.figures.comparison import Comparison as Comparison
    from benchmarks.figures.model_result import ModelResult as ModelResult
    from benchmarks.judging.win_rate import Judgement as Judgement
    from benchmarks.judging.win_rate import judge_replies as judge_replies
    from benchmarks.measure.measuring import compare as compare
    from benchmarks.report.budget import Miss as Miss
    from benchmarks.report.budget import misses as misses
    from benchmarks.report.report import open_report as open_report
    from benchmarks.report.shipping import best_to_ship as best_to_ship
    from benchmarks.serving.serving_report import ServingReport as ServingReport
    from benchmarks.serving.serving_report import bench_serving as bench_serving
    from benchmarks.settings import BenchSettings as BenchSettings
    from benchmarks.settings import Budget as Budget
    from benchmarks.settings import DiffSettings as DiffSettings
    from benchmarks.settings import EvalSettings as EvalSettings
    from benchmarks.settings import JudgeSettings as JudgeSettings
    from benchmarks.settings import ServingSettings as ServingSettings
    from benchmarks.settings import ShipSettings as ShipSettings
    from benchmarks.tasks.evaluation import Evaluation as Evaluation
    from benchmarks.tasks.evaluation import evaluate as evaluate

_HOMES = {
    "BenchSettings": "benchmarks.settings",
    "Budget": "benchmarks.settings",
    "Comparison": "benchmarks.figures.comparison",
    "DiffSettings": "benchmarks.settings",
    "EvalSettings": "benchmarks.settings",
    "Evaluation": "benchmarks.tasks.evaluation",
    "JudgeSettings": "benchmarks.settings",
    "Judgement": "benchmarks.judging.win_rate",
    "Miss": "benchmarks.report.budget",
    "ModelResult": "benchmarks.figures.model_result",
    "ReportDiff": "benchmarks.changes.differences",
    "ServingReport": "benchmarks.serving.serving_report",
    "ServingSettings": "benchmarks.settings",
    "ShipSettings": "benchmarks.settings",
    "bench_serving": "benchmarks.serving.serving_report",
    "best_to_ship": "benchmarks.report.shipping",
    "compare": "benchmarks.measure.measuring",
    "diff": "benchmarks.changes.differences",
    "evaluate": "benchmarks.tasks.evaluation",
    "judge_replies": "benchmarks.judging.win_rate",
    "misses": "benchmarks.report.budget",
    "open_report": "benchmarks.report.report",
}

__all__ = [
    "BenchSettings",
    "Budget",
    "Comparison",
    "DiffSettings",
    "EvalSettings",
    "Evaluation",
    "JudgeSettings",
    "Judgement",
    "Miss",
    "ModelResult",
    "ReportDiff",
    "ServingReport",
    "ServingSettings",
    "ShipSettings",
    "bench_serving",
    "best_to_ship",
    "compare",
    "diff",
    "evaluate",
    "judge_replies",
    "misses",
    "open_report",
]
__getattr__ = lazy_exports(__name__, _HOMES)
