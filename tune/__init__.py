"""Make a teacher, or a student, better before it is distilled or shipped.

Every step takes a model folder and makes another, of the same vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    pass

_HOMES: dict[str, str] = {}

__all__: list[str] = []
__getattr__ = lazy_exports(__name__, _HOMES)
