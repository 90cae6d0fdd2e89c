"""The report of a quantized folder: loss, damping and time of every matrix, as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mistill.folders.folder import QUANTIZE_REPORT_FILE, QUANTIZE_TABLE_FILE
from mistill.folders.publishing import write_atomically, write_json
from mistill.weights.gptq_layout import QuantizedWeight
from quantize.gptq.gptq import GptqResult


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
