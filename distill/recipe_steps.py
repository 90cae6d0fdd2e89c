"""The steps of a recipe that this package makes."""

from __future__ import annotations

from distill.settings import (
    GenerateSettings,
    HealSettings,
    StudentSettings,
    TargetSettings,
    TrainSettings,
)
from mistill.folders.folder import MANIFEST_FILE
from mistill.step_kind import StepKind, calling

KINDS = (
    StepKind(
        name="generate",
        settings=GenerateSettings,
        models=("teacher", "reward", "forward"),
        texts=("prompts",),
        optional=("reward", "forward"),
        output=".jsonl",
        run=calling("distill.generate_conversations", "teacher", "prompts"),
    ),
    StepKind(
        name="reverse",
        settings=None,
        models=(),
        texts=("texts",),
        output=".jsonl",
        run=calling("distill.reverse_conversations", "texts"),
    ),
    StepKind(
        name="student",
        settings=StudentSettings,
        models=("teacher",),
        texts=("texts",),
        optional=("texts",),
        run=calling("distill.new_student", "teacher"),
    ),
    StepKind(
        name="heal",
        settings=HealSettings,
        models=("student", "teacher"),
        texts=("texts",),
        run=calling("distill.heal", "student"),
    ),
    StepKind(
        name="targets",
        settings=TargetSettings,
        models=("teacher",),
        texts=("texts",),
        last_file=MANIFEST_FILE,
        together=True,
        run=calling("distill.cache_targets", "teacher"),
    ),
    StepKind(
        name="distill",
        settings=TrainSettings,
        models=("student", "teacher", "targets"),
        texts=("texts", "held_out"),
        optional=("teacher", "targets", "held_out"),
        one_of=("teacher", "targets"),
        together=True,
        run=calling("distill.train", "student"),
    ),
)
