"""The steps of a recipe that this package makes."""

from __future__ import annotations

from mistill.step_kind import StepKind, calling
from tune.settings import SupervisedSettings

KINDS: tuple[StepKind, ...] = (
    StepKind(
        name="supervised",
        settings=SupervisedSettings,
        models=("model",),
        texts=("texts", "held_out"),
        optional=("held_out",),
        together=True,
        run=calling("tune.supervised", "model"),
    ),
)
