"""Before a folder is declared done: is its graph fast, and are its codes the source's?"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from export.checks.code_check import CodeCheck, check_codes, check_outliers
from export.kernels.choosing import Tuning
from export.settings import MODEL_FILE, GraphOptions, OnnxSettings
from export.weights.architecture import EMBEDDING, HEAD, Architecture
from mistill.cost_model.onnx_cost import memory_speed
from mistill.cost_model.onnx_lint import Finding, Lint, lint_file
from mistill.cost_model.processors import usable_threads
from mistill.errors import ExportError

_log = logging.getLogger(__name__)


def lint_export(
    folder: Path,
    source: Path,
    architecture: Architecture,
    settings: OnnxSettings,
    options: GraphOptions,
    tuning: Tuning | None = None,
) -> dict[str, Any]:
    """Look at a graph that was just written, and refuse what nobody asked for.

    Args:
        folder: Where the graph is.
        source: The folder that it was exported from.
        architecture: The decoder.
        settings: What was asked for.
        options: The same, as far as the graph was told.
        tuning: What the kernels were chosen by, which knows the speed of its machine's memory.

    Returns:
        What the manifest says of it: slow kernels, bytes, the speed that memory allows, codes.

    Raises:
        ExportError: If a kernel is slow for another reason than what was asked for, or a code is
            not the source's.
    """
    lint = lint_file(folder / MODEL_FILE)
    require_fast(lint, settings, options)
    codes = check_codes(folder, source, architecture)
    _require_codes(codes, settings, options)
    check_outliers(folder, source)
    if settings.memory_speed is not None:
        speed = settings.memory_speed * 1e9
    elif tuning is not None:
        speed = tuning.probe.memory_bytes_per_second
    else:
        speed = memory_speed(usable_threads())
    return {
        **asdict(lint.cost),
        "memory_bytes_per_second": round(speed),
        "ceiling_tokens_per_second": round(lint.cost.ceiling(speed), 1),
        "slow_kernels": [str(finding) for finding in lint.findings],
        "codes": None if codes is None else {**asdict(codes), "decoded": len(codes.decoded)},
    }


def require_fast(lint: Lint, settings: OnnxSettings, options: GraphOptions) -> None:
    """Refuse a graph with a slow kernel; warn of one that was asked for.

    Args:
        lint: What was found in the graph.
        settings: What was asked for.
        options: The same, as far as the graph was told.

    Raises:
        ExportError: If a kernel is slow that should not be.
    """
    asked = set()
    if settings.accuracy_level == 0:
        asked.add("accuracy-level")
    if options.head_bits == 32:
        asked.add("float-head")
    wrong: list[Finding] = []
    for finding in lint.findings:
        if finding.rule in asked:
            _log.warning("the requested settings are slow: %s", finding)
        else:
            wrong.append(finding)
    if wrong:
        raise ExportError(
            f"the graph would be slow: {'; '.join(map(str, wrong))}; nothing was written: this is "
            "a fault of the export, please report it"
        )


def _require_codes(check: CodeCheck | None, settings: OnnxSettings, options: GraphOptions) -> None:
    """Refuse codes of the source that became floats although nobody asked for it."""
    if check is None or settings.precision == "float32":
        return
    asked = {EMBEDDING} if 32 in (options.embedding_bits, options.head_bits) else set()
    asked |= {HEAD} if options.head_bits == 32 else set()
    wrong = [module for module in check.decoded if module not in asked]
    if wrong:
        raise ExportError(
            f"the graph holds floats where the source holds codes: {', '.join(wrong[:3])}; nothing "
            "was written: this is a fault of the export"
        )
