"""Teach a small model to predict what a large one predicts.

``new_student`` cuts a student out of its teacher, ``heal`` mends the cut in closed form, ``train``
distils, ``generate_conversations``
lets a teacher write the text to learn from, and ``cache_targets`` keeps what it says, so that it
need not be there again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from distill.conversations import generate_conversations as generate_conversations
    from distill.healing.healed_folder import heal as heal
    from distill.reversing import reverse_conversations as reverse_conversations
    from distill.settings import GenerateSettings as GenerateSettings
    from distill.settings import HealSettings as HealSettings
    from distill.settings import StudentSettings as StudentSettings
    from distill.settings import TargetSettings as TargetSettings
    from distill.settings import TrainSettings as TrainSettings
    from distill.student.student_folder import new_student as new_student
    from distill.targets.cached_teacher import open_targets as open_targets
    from distill.targets.targets_folder import cache_targets as cache_targets
    from distill.training.trained_folder import train as train
    from mistill.loss.losses import forward_kl as forward_kl

_HOMES = {
    "GenerateSettings": "distill.settings",
    "HealSettings": "distill.settings",
    "StudentSettings": "distill.settings",
    "TargetSettings": "distill.settings",
    "TrainSettings": "distill.settings",
    "cache_targets": "distill.targets.targets_folder",
    "forward_kl": "mistill.loss.losses",
    "generate_conversations": "distill.conversations",
    "heal": "distill.healing.healed_folder",
    "new_student": "distill.student.student_folder",
    "open_targets": "distill.targets.cached_teacher",
    "reverse_conversations": "distill.reversing",
    "train": "distill.training.trained_folder",
}

__all__ = [
    "GenerateSettings",
    "HealSettings",
    "StudentSettings",
    "TargetSettings",
    "TrainSettings",
    "cache_targets",
    "forward_kl",
    "generate_conversations",
    "heal",
    "new_student",
    "open_targets",
    "reverse_conversations",
    "train",
]
__getattr__ = lazy_exports(__name__, _HOMES)
