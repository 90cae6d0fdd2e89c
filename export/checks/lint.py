"""Checks of an exported folder before it is complete: fast kernels, and codes of the source."""

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
    """Check the graph of an export, and refuse slow kernels and lost codes.

    Args:
        folder: The folder of the graph.
        source: The folder that it was exported from.
        architecture: Architecture of the decoder.
        settings: Settings of the export.
        options: Options of the graph.
        tuning: The chosen kernels, with the memory bandwidth of their machine.

    Returns:
        Entries of the manifest: slow kernels, bytes, upper bound of the speed, codes.

    Raises:
        ExportError: If a kernel is slow for another reason than the settings, or a code differs
            from the source's.
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
    """Refuse a graph with a slow kernel; warn of one that the settings request.

    Args:
        lint: Findings about the graph.
        settings: Settings of the export.
        options: Options of the graph.

    Raises:
        ExportError: If a kernel is slow that should not be.
    """
    requested_rules = set()
    if settings.accuracy_level == 0:
        requested_rules.add("accuracy-level")
    if options.head_bits == 32:
        requested_rules.add("float-head")
    if options.activations == "float16":
        requested_rules.add("half-precision")
    unexpected: list[Finding] = []
    for finding in lint.findings:
        if finding.rule == "half-precision" and finding.rule in requested_rules:
            continue  # on a CPU, for which it is not made; the manifest keeps it
        if finding.rule in requested_rules:
            _log.warning("the requested settings are slow: %s", finding)
        else:
            unexpected.append(finding)
    if unexpected:
        raise ExportError(
            f"the graph would be slow: {'; '.join(map(str, unexpected))}; nothing was written: "
            "this is a fault of the export, please report it"
        )


def _require_codes(check: CodeCheck | None, settings: OnnxSettings, options: GraphOptions) -> None:
    """Refuse codes of the source that became floats although the settings do not request it."""
    if check is None or settings.precision in ("float32", "float16"):
        return
    requested = {EMBEDDING} if 32 in (options.embedding_bits, options.head_bits) else set()
    requested |= {HEAD} if options.head_bits == 32 else set()
    unexpected = [module for module in check.decoded if module not in requested]
    if unexpected:
        raise ExportError(
            f"the graph holds floats where the source holds codes: {', '.join(unexpected[:3])}; "
            "nothing was written: this is a fault of the export"
        )
