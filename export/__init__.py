"""An ONNX folder that is fast on a CPU.

``to_onnx`` writes a float, GPTQ or NF4 folder as a graph for ONNX Runtime, codes unchanged, that
ONNX Runtime GenAI also opens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from export.onnx_folder import to_onnx as to_onnx
    from export.settings import OnnxSettings as OnnxSettings

_HOMES = {"OnnxSettings": "export.settings", "to_onnx": "export.onnx_folder"}

__all__ = ["OnnxSettings", "to_onnx"]
__getattr__ = lazy_exports(__name__, _HOMES)
