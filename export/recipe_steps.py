"""The step of a recipe that this package makes."""

from __future__ import annotations

from export.settings import OnnxSettings
from mistill.step_kind import StepKind, calling

KINDS = (
    StepKind(
        name="export",
        settings=OnnxSettings,
        models=("source",),
        run=calling("export.to_onnx", "source"),
    ),
)
