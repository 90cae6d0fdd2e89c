"""An ONNX folder that is fast on a CPU, or the same model for llama.cpp.

``to_onnx`` writes a float, GPTQ or NF4 folder as a graph for ONNX Runtime, codes unchanged, that
ONNX Runtime GenAI also opens. ``to_gguf`` writes it as a file for llama.cpp and Ollama.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from export.kernels.probe import probe_cpu as probe_cpu
    from export.llama_cpp.gguf_file import to_gguf as to_gguf
    from export.onnx_folder import to_onnx as to_onnx
    from export.settings import GgufSettings as GgufSettings
    from export.settings import OnnxSettings as OnnxSettings

_HOMES = {
    "GgufSettings": "export.settings",
    "OnnxSettings": "export.settings",
    "probe_cpu": "export.kernels.probe",
    "to_gguf": "export.llama_cpp.gguf_file",
    "to_onnx": "export.onnx_folder",
}

__all__ = ["GgufSettings", "OnnxSettings", "probe_cpu", "to_gguf", "to_onnx"]
__getattr__ = lazy_exports(__name__, _HOMES)
