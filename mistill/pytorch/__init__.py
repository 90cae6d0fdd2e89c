"""A folder as a transformers model, whole or one layer at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from mistill.engine.pytorch_model import PytorchModel as PytorchModel
    from mistill.pytorch.loading import check_weights as check_weights
    from mistill.pytorch.loading import load_pytorch as load_pytorch
    from mistill.pytorch.loading import plain_config as plain_config
    from mistill.pytorch.loading import read_tensors as read_tensors
    from mistill.pytorch.loading import stored_tensors as stored_tensors

_HOMES = {
    "PytorchModel": "mistill.engine.pytorch_model",
    "check_weights": "mistill.pytorch.loading",
    "load_pytorch": "mistill.pytorch.loading",
    "plain_config": "mistill.pytorch.loading",
    "read_tensors": "mistill.pytorch.loading",
    "stored_tensors": "mistill.pytorch.loading",
}

__all__ = [
    "PytorchModel",
    "check_weights",
    "load_pytorch",
    "plain_config",
    "read_tensors",
    "stored_tensors",
]
__getattr__ = lazy_exports(__name__, _HOMES)
