"""bitsandbytes' 4-bit layers, kept as they were stored.

bitsandbytes (0.50.2) repacks the codes and scales of a ``Linear4bit`` in place on
a CPU with AVX512-BF16, the first time that it runs in eval mode on an input without a gradient, and
multiplies by a kernel for inference from then on. The kernel has no gradient, so that training
after one evaluation goes astray without an error; ``dequantize_4bit`` reads the new order as the
old one, and gives other weights; and what ``state_dict`` turns back has scales in bfloat16, or in
another order. A layer asks ``support_avx512bf16_for_cpu`` of itself whether it may do so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mistill.errors import ArchitectureError

if TYPE_CHECKING:
    import torch
    from torch import nn

LAYER = "Linear4bit"
"""Name of bitsandbytes' class, by which its layers are known without importing it."""


def keep_as_stored(model: nn.Module) -> int:
    """Let no 4-bit layer of a model repack its weights, whatever the processor.

    To be called on every model that holds such layers, right after loading.

    Args:
        model: The model; its layers are changed in place.

    Returns:
        How many 4-bit layers there are.
    """
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ == LAYER]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        require_as_stored(layer)
    return len(layers)


def hold_codes_as(model: nn.Module, dtype: torch.dtype) -> int:
    """Hold the codes of 4-bit layers in tensors of floats, whose bits they are, in place.

    FSDP2 divides tensors of floats alone; what it gathers again has the same bits, as long as it
    casts nothing on the way.

    Args:
        model: The model; its codes are in bytes.
        dtype: The type of its other weights, whatever the bits would come to as floats.

    Returns:
        How many 4-bit layers there are.

    Raises:
        ArchitectureError: If a layer was repacked, or its codes do not fill such floats.
    """
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ == LAYER]
    for layer in layers:
        require_as_stored(layer)
        codes = layer.weight.data
        if codes.numel() % dtype.itemsize:
            raise ArchitectureError(
                f"{codes.numel()} bytes of 4-bit codes do not fill numbers of type {dtype}; use "
                "several processes without FSDP"
            )
        layer.weight.data = codes.reshape(-1).view(dtype).reshape(-1, 1)
        layer.weight.quant_storage = layer.quant_storage = dtype
    return len(layers)


def require_as_stored(layer: Any) -> None:
    """Refuse a 4-bit layer whose codes are no longer in the order in which they are read.

    Args:
        layer: A ``Linear4bit``.

    Raises:
        ArchitectureError: If bitsandbytes has repacked it.
    """
    state = getattr(layer.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise ArchitectureError(
            "bitsandbytes has repacked a 4-bit layer for its inference kernel, so that its weights "
            "can neither be trained through nor read; load the model again by mistill"
        )
