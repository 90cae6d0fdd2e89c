"""The command ``mistill``: parse, call the Python API, print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from mistill.cli.app import main as main

_HOMES = {
    "main": "mistill.cli.app",
}

__all__ = ["main"]
__getattr__ = lazy_exports(__name__, _HOMES)
