"""The report of a quantized folder: loss, damping and time of every matrix, as JSON and CSV."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mistill.folders.folder import QUANTIZE_REPORT_FILE, QUANTIZE_TABLE_FILE
from mistill.folders.lineage import add_lineage
from mistill.folders.publishing import write_atomically, write_json
from mistill.settings import settings_dict
from mistill.weights.gptq_layout import QuantizedWeight
from quantize.folders.float_model import FloatModel, tensor_patterns
from quantize.gptq.gptq import GptqResult
from quantize.measuring.fidelity import FidelityCheck, report_entry
from quantize.settings import GridSettings, Nf4Settings


@dataclass(frozen=True, kw_only=True)
class ModuleReport:
    """Figures of one quantized matrix.

    Attributes:
        name: The linear module or table.
        bits: Bits per code; None where a library chose.
        group_size: Columns per group, -1 for the whole row; None likewise.
        loss: Mean squared error of an output on the calibration text; None without such text.
        damping: Share of the Hessian's mean diagonal that was added to it; None likewise.
        dead_columns: Inputs that were always zero; None likewise.
        seconds: Wall time; None where it was not taken for each matrix.
    """

    name: str
    bits: int | None = None
    group_size: int | None = None
    loss: float | None = None
    damping: float | None = None
    dead_columns: int | None = None
    seconds: float | None = None


def report_of(
    module: str, weight: QuantizedWeight, seconds: float, result: GptqResult | None = None
) -> ModuleReport:
    """The figures of a quantized matrix.

    Args:
        module: Its name.
        weight: Its codes.
        seconds: The time it took.
        result: The result of GPTQ; None if it was rounded to the nearest codes.

    Returns:
        A line of the report.
    """
    report = ModuleReport(
        name=module, bits=weight.bits, group_size=weight.group_size, seconds=round(seconds, 4)
    )
    if result is None:
        return report
    return replace(
        report,
        loss=float(result.losses.mean()),
        damping=result.damping,
        dead_columns=result.dead_columns,
    )


def write_records(
    target: Path,
    model: FloatModel,
    modules: Sequence[ModuleReport],
    float_names: Sequence[str],
    *,
    step: str,
    settings: Nf4Settings | GridSettings,
    started: float,
    check: FidelityCheck | None,
    **facts: Any,
) -> None:
    """Measure a quantized folder, and write its report and its lineage.

    Args:
        target: The folder being made, which holds the model already.
        model: The float model.
        modules: One entry per quantized matrix.
        float_names: Tensors that stay float.
        step: Name of the step.
        settings: How it was quantized.
        started: When the work began, by ``time.perf_counter``.
        check: Measures the result; None if nothing is to be measured.
        **facts: Further entries of the lineage; ``calibration`` is one of the report too.
    """
    seconds = round(time.perf_counter() - started, 2)
    write_report(
        target,
        modules,
        float_names,
        step=step,
        settings=settings_dict(settings),
        **{name: fact for name, fact in facts.items() if name == "calibration"},
        seconds=seconds,
        **report_entry(check, target),
    )
    add_lineage(
        target,
        step=step,
        settings=settings,
        source=model.folder,
        **facts,
        kept_float=tensor_patterns(float_names),
    )


def write_report(
    target: Path, modules: Sequence[ModuleReport], float_names: Sequence[str], **facts: Any
) -> None:
    """Write the report of a quantized folder, as JSON and as a table.

    Args:
        target: The folder being made.
        modules: One entry per quantized matrix.
        float_names: Tensors that stay float.
        **facts: Further entries of the report.
    """
    report = {
        **facts,
        "modules": [asdict(module) for module in modules],
        "kept": list(float_names),
    }
    write_json(target / QUANTIZE_REPORT_FILE, report, indent=1)
    table = io.StringIO()
    lines = csv.DictWriter(
        table, [field.name for field in fields(ModuleReport)], lineterminator="\n"
    )
    lines.writeheader()
    lines.writerows(asdict(module) for module in modules)
    write_atomically(target / QUANTIZE_TABLE_FILE, table.getvalue())
