"""Saving a model as a plain folder, under the name that scripts import it by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from mistill.sources.source import resolve_model as resolve_model
    from mistill.sources.source import save_model as save_model

_HOMES = {
    "resolve_model": "mistill.sources.source",
    "save_model": "mistill.sources.source",
}

__all__ = ["resolve_model", "save_model"]
__getattr__ = lazy_exports(__name__, _HOMES)
