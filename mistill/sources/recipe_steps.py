"""The step of a recipe that makes a plain model folder of a teacher."""

from __future__ import annotations

from mistill.step_kind import StepKind, calling

KINDS = (
    StepKind(
        name="teacher",
        settings=None,
        models=("source",),
        run=calling("mistill.save_model", "source"),
    ),
)
