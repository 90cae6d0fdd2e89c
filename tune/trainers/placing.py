"""Where models are loaded and looked at, and in which numbers."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from mistill.folders.folder import FolderInfo
    from tune.settings import Base, TrainerSettings

_log = logging.getLogger(__name__)

# Bytes of a GPU that a look at a model takes beside its weights.
_ROOM = 2 * 2**30


def place_for(model_bytes: int, device: torch.device) -> torch.device:
    """Where a whole model is looked at: on the device that trained, if it fits there.

    A model that was trained in four bits may be larger than the GPU when its weights are floats.

    Args:
        model_bytes: Of its weights.
        device: The device that trained.

    Returns:
        That device, or the CPU.
    """
    import torch

    if device.type != "cuda":
        return device
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if model_bytes + _ROOM <= free:
        return device
    _log.info("the merged model does not fit the GPU and is measured on the CPU")
    return torch.device("cpu")


def load_base(
    info: FolderInfo, base: Base, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A model as it is trained through adapters, or whole.

    Args:
        info: A float folder, or one in NF4 for the base ``nf4``.
        base: Whether float weights become NF4 (QLoRA).
        dtype: What float weights are held in, and what 4-bit layers compute in.
        device: Where to.

    Returns:
        The model, in eval mode; its 4-bit layers never repack.
    """
    from mistill.pytorch.loading import load_pytorch
    from mistill.pytorch.spread import load_spread

    if base == "nf4" and info.form == "model":
        return load_spread(info, dtype, {"": device}, nf4=True)
    model: Any = load_pytorch(info.path, dtype=dtype)
    loaded: PreTrainedModel = model.to(device)
    return loaded


def computes_in_bfloat16(settings: TrainerSettings, device: torch.device) -> bool:
    """Whether a trainer of TRL computes in bfloat16.

    Args:
        settings: How it trains.
        device: Where.

    Returns:
        What the precision says; of auto, whether the device is a GPU.
    """
    if settings.precision == "auto":
        return device.type == "cuda"
    return settings.precision == "bfloat16"


def type_of_base(base: Base, device: torch.device, *, low_precision: bool) -> torch.dtype:
    """In what a trainer of TRL holds frozen float weights, and 4-bit layers compute.

    On a CPU it is float32: bfloat16 arithmetic over NF4 bends the gradient there by a fifth.

    Args:
        base: How frozen weights are held.
        device: Where it computes.
        low_precision: Whether it computes in bfloat16.

    Returns:
        float32, or bfloat16 beside NF4 on a GPU.
    """
    import torch

    low = base == "nf4" and low_precision and device.type != "cpu"
    return torch.bfloat16 if low else torch.float32
