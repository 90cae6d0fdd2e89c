"""Signatures know every option that the settings have."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import fields

import pytest

from mistill.compressing import CompressSettings
from tests.options import CLASSES, ROOT, formatted, written, written_class


@pytest.mark.parametrize("file", CLASSES)
def test_the_typed_options_are_those_of_the_settings(file: str) -> None:
    module, classes = CLASSES[file]
    assert (ROOT / file).read_text("utf-8") == formatted(written(module, classes)), (
        "run python -m tests.options"
    )
    options = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for name in classes:
        settings = getattr(importlib.import_module(module), name)
        known = getattr(options, f"{name.removesuffix('Settings')}Options").__annotations__
        assert list(known) == [field.name for field in fields(settings)]


def test_the_options_of_compress_stand_beside_its_settings() -> None:
    source = (ROOT / "mistill" / "compressing.py").read_text("utf-8")
    assert "\n".join(written_class(CompressSettings)) in source


@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("distill.train", "TrainOptions"),
        ("distill.new_student", "StudentOptions"),
        ("distill.heal", "HealOptions"),
        ("distill.cache_targets", "TargetOptions"),
        ("distill.generate_conversations", "GenerateOptions"),
        ("export.to_onnx", "OnnxOptions"),
        ("export.to_gguf", "GgufOptions"),
        ("benchmarks.compare", "BenchOptions"),
        ("benchmarks.misses", "BudgetOptions"),
        ("benchmarks.diff", "DiffOptions"),
        ("benchmarks.best_to_ship", "ShipOptions"),
        ("quantize.to_rounding", "RoundingOptions"),
        ("quantize.to_gptq", "AutoGptqOptions"),
        ("quantize.to_nf4", "Nf4Options"),
        ("quantize.to_mixed", "MixedOptions"),
        ("quantize.rotate", "RotationOptions"),
        ("quantize.tune", "TuningOptions"),
        ("quantize.sweep", "SweepOptions"),
        ("tune.supervised", "SupervisedOptions"),
        ("tune.preferences", "PreferenceOptions"),
        ("tune.reward", "RewardOptions"),
        ("tune.reinforce", "ReinforceOptions"),
        ("mistill.ChatBot", "ChatOptions"),
        ("mistill.compress", "CompressOptions"),
        ("mistill.serve.running.serve", "ServeOptions"),
    ],
)
def test_every_step_names_its_options_in_its_signature(function: str, options: str) -> None:
    package, _, name = function.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(package), name))
    assert re.search(rf"Unpack\[{options}\]", str(signature.parameters["options"].annotation))
