"""Any folder as a running language model: ONNX Runtime, PyTorch, sampling, speculative decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from mistill.engine.language_model import LanguageModel as LanguageModel
    from mistill.engine.onnx_model import OnnxModel as OnnxModel
    from mistill.engine.opening import open_model as open_model
    from mistill.engine.sampling import SamplingSettings as SamplingSettings

_HOMES = {
    "LanguageModel": "mistill.engine.language_model",
    "OnnxModel": "mistill.engine.onnx_model",
    "SamplingSettings": "mistill.engine.sampling",
    "open_model": "mistill.engine.opening",
}

__all__ = ["LanguageModel", "OnnxModel", "SamplingSettings", "open_model"]
__getattr__ = lazy_exports(__name__, _HOMES)
