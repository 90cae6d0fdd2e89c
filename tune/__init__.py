"""Make a teacher, or a student, better before it is distilled or shipped.

Every step takes a model folder and makes another, of the same vocabulary. ``supervised`` teaches a
model to write the answers of conversations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from tune.settings import SupervisedSettings as SupervisedSettings
    from tune.supervision.tuned_folder import supervised as supervised

_HOMES = {
    "SupervisedSettings": "tune.settings",
    "supervised": "tune.supervision.tuned_folder",
}

__all__ = [
    "SupervisedSettings",
    "supervised",
]
__getattr__ = lazy_exports(__name__, _HOMES)
