"""The steps of a recipe that this package makes."""

from __future__ import annotations

from mistill.step_kind import StepKind, calling
from tune.settings import (
    PreferenceSettings,
    ReinforceSettings,
    RewardSettings,
    SupervisedSettings,
)

KINDS: tuple[StepKind, ...] = (
    StepKind(
        name="supervised",
        settings=SupervisedSettings,
        models=("model",),
        texts=("texts", "held_out", "other_texts"),
        optional=("held_out", "other_texts"),
        together=True,
        run=calling("tune.supervised", "model"),
    ),
    StepKind(
        name="preferences",
        settings=PreferenceSettings,
        models=("model",),
        texts=("pairs", "held_out", "other_texts"),
        optional=("held_out", "other_texts"),
        run=calling("tune.preferences", "model"),
    ),
    StepKind(
        name="reward",
        settings=RewardSettings,
        models=("model",),
        texts=("pairs", "held_out"),
        optional=("held_out",),
        run=calling("tune.reward", "model"),
    ),
    StepKind(
        name="reinforce",
        settings=ReinforceSettings,
        models=("model", "reward"),
        texts=("prompts", "held_out", "other_texts"),
        optional=("reward", "held_out", "other_texts"),
        by_hand=("function",),
        run=calling("tune.reinforce", "model"),
    ),
)
