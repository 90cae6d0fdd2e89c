"""The steps of a recipe that this package makes."""

from __future__ import annotations

from typing import Any

from mistill.step_kind import StepKind, calling
from quantize.settings import (
    GptqSettings,
    MixedSettings,
    Nf4Settings,
    RotationSettings,
    RoundingSettings,
    TuningSettings,
)


def _quantizer(
    name: str, settings: type[Any], function: str, *, calibrated: bool = False
) -> StepKind:
    """A step that quantizes a source, and measures the result where held-out text is named."""
    texts = ("texts", "held_out") if calibrated else ("held_out",)
    return StepKind(
        name=name,
        settings=settings,
        models=("source", "teacher"),
        texts=texts,
        optional=("teacher", "held_out"),
        needs=(("teacher", "held_out"),),
        run=calling(function, "source"),
    )


KINDS = (
    _quantizer("gptq", GptqSettings, "quantize.to_gptq", calibrated=True),
    _quantizer("rounding", RoundingSettings, "quantize.to_rounding"),
    _quantizer("mixed", MixedSettings, "quantize.to_mixed", calibrated=True),
    _quantizer("nf4", Nf4Settings, "quantize.to_nf4"),
    StepKind(
        name="rotate",
        settings=RotationSettings,
        models=("source",),
        run=calling("quantize.rotate", "source"),
    ),
    StepKind(
        name="tune",
        settings=TuningSettings,
        models=("source", "teacher"),
        texts=("texts", "held_out"),
        optional=("held_out",),
        run=calling("quantize.tune", "source"),
    ),
)
