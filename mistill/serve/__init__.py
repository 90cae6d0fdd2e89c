"""A chatbot over HTTP: what OpenAI's clients ask for, and a page to chat in.

``mistill.serve("chatbot")`` runs it until it is told to stop. Importing this package does not load
uvicorn.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from mistill.serve.running import serve as serve
    from mistill.serve.settings import ServeSettings as ServeSettings

_HOMES = {"ServeSettings": "mistill.serve.settings", "serve": "mistill.serve.running"}

__all__ = ["ServeSettings", "serve"]
__getattr__ = lazy_exports(__name__, _HOMES)


class _Serve(ModuleType):
    """The package under the name that the function has too: ``mistill.serve(...)`` calls it."""

    def __call__(self, *arguments: Any, **options: Any) -> int:
        from mistill.serve.running import serve

        return serve(*arguments, **options)


sys.modules[__name__].__class__ = _Serve
