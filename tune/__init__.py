"""Make a teacher, or a student, better before it is distilled or shipped.

Every step takes a model folder and makes another, of the same vocabulary. ``supervised`` teaches a
model to write the answers of conversations, ``preferences`` which of two answers is better,
``reward`` to score answers as people did, and ``reinforce`` what a judge says of its own answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from tune.pairwise.preferences_folder import preferences as preferences
    from tune.policy.reinforce_folder import reinforce as reinforce
    from tune.scoring.reward_folder import reward as reward
    from tune.settings import PreferenceSettings as PreferenceSettings
    from tune.settings import ReinforceSettings as ReinforceSettings
    from tune.settings import RewardSettings as RewardSettings
    from tune.settings import SupervisedSettings as SupervisedSettings
    from tune.supervision.tuned_folder import supervised as supervised

_HOMES = {
    "PreferenceSettings": "tune.settings",
    "ReinforceSettings": "tune.settings",
    "RewardSettings": "tune.settings",
    "SupervisedSettings": "tune.settings",
    "preferences": "tune.pairwise.preferences_folder",
    "reinforce": "tune.policy.reinforce_folder",
    "reward": "tune.scoring.reward_folder",
    "supervised": "tune.supervision.tuned_folder",
}

__all__ = [
    "PreferenceSettings",
    "ReinforceSettings",
    "RewardSettings",
    "SupervisedSettings",
    "preferences",
    "reinforce",
    "reward",
    "supervised",
]
__getattr__ = lazy_exports(__name__, _HOMES)
