"""Make a large language model small enough to chat on a laptop.

What the steps ``distill``, ``quantize``, ``export`` and ``benchmarks`` share, and all that a
laptop needs to chat. Importing it loads neither PyTorch nor transformers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

# ONNX Runtime reports usage to its maker unless this is set before it is first imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# So does the library of the Hub, which trl asks to, unless this is set before its first import.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from mistill.chat.bot import ChatBot as ChatBot
    from mistill.compressing import CompressSettings as CompressSettings
    from mistill.compressing import compress as compress
    from mistill.engine.language_model import LanguageModel as LanguageModel
    from mistill.engine.opening import open_model as open_model
    from mistill.errors import MistillError as MistillError
    from mistill.folders.folder import FolderInfo as FolderInfo
    from mistill.folders.folder import open_folder as open_folder
    from mistill.serve.running import serve as serve
    from mistill.sharing import push as push
    from mistill.sources.source import save_model as save_model

__version__ = "0.1.0"

_HOMES = {
    "ChatBot": "mistill.chat.bot",
    "CompressSettings": "mistill.compressing",
    "FolderInfo": "mistill.folders.folder",
    "LanguageModel": "mistill.engine.language_model",
    "MistillError": "mistill.errors",
    "compress": "mistill.compressing",
    "open_folder": "mistill.folders.folder",
    "open_model": "mistill.engine.opening",
    "push": "mistill.sharing",
    "save_model": "mistill.sources.source",
}

__all__ = [
    "ChatBot",
    "CompressSettings",
    "FolderInfo",
    "LanguageModel",
    "MistillError",
    "__version__",
    "compress",
    "open_folder",
    "open_model",
    "push",
    "save_model",
    "serve",
]
_lazy = lazy_exports(__name__, _HOMES)


def __getattr__(name: str) -> object:
    if name == "serve":  # a package that can be called, see there
        import mistill.serve

        return mistill.serve
    return _lazy(name)
