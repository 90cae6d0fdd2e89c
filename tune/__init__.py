"""Make a teacher, or a student, better before it is distilled or shipped.

Every step takes a model folder and makes another, of the same vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from tune.pairwise.preferences_folder import preferences as preferences
    from tune.settings import PreferenceSettings as PreferenceSettings

_HOMES = {
    "PreferenceSettings": "tune.settings",
    "preferences": "tune.pairwise.preferences_folder",
}

__all__ = ["PreferenceSettings", "preferences"]
__getattr__ = lazy_exports(__name__, _HOMES)
