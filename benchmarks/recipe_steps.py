"""The step of a recipe that this package makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.settings import BenchSettings
from mistill.step_kind import StepKind


def _compare(inputs: Mapping[str, Any], settings: Any, target: Path, overwrite: bool) -> object:
    import benchmarks

    models = inputs["models"]
    others = {key: value for key, value in inputs.items() if key != "models"}
    return benchmarks.compare(models, **others, settings=settings).save(target, overwrite=overwrite)


KINDS = (
    StepKind(
        name="bench",
        settings=BenchSettings,
        models=("models", "reference"),
        texts=("texts",),
        optional=("reference",),
        run=_compare,
    ),
)
