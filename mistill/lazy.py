"""Public names that are imported when they are first used.

``import distill`` must be quick and must not load torch; ``distill.train`` may. Each package
lists where its public names live, and Python asks ``__getattr__`` for them (PEP 562).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose public names live in modules not yet imported.

    Args:
        package: Name of the package, for the error message.
        homes: Public name to the module that defines it.

    Returns:
        A function to be bound to ``__getattr__`` in the package's ``__init__``.
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    # What a user sees who completes a name: the public ones, imported yet or not.
    module = vars(sys.modules[package])
    module["__dir__"] = lambda: sorted({*homes, *module.get("__all__", ())} - {"__version__"})
    return __getattr__
