"""A linear module of codes whose scales can be trained.

N is outputs, K inputs, G groups of input columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mistill.weights.gptq_layout import QuantizedWeight


class ScaledLinear(nn.Module):
    """Computes with the weight that codes stand for, times a gain for each of its scales.

    The float weight exists only during a product and is decoded again in the backward pass, so that
    a layer is held as its codes, a fourth of the bytes.

    ``gain``, of shape (G, N), is the factor by which each scale has changed.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        """Begin with the scales as they are stored.

        Args:
            weight: Codes and scales.
            bias: Shape (N,), or None.
        """
        super().__init__()
        scales = torch.from_numpy(np.ascontiguousarray(weight.scales.T.astype(np.float32)))
        zeros = torch.from_numpy(np.ascontiguousarray(weight.zeros.T))
        self.gain = nn.Parameter(torch.ones_like(scales))
        self.bias = bias
        self.register_buffer("codes", torch.from_numpy(np.ascontiguousarray(weight.codes.T)))
        self.register_buffer("groups", torch.from_numpy(weight.g_idx.astype(np.int64)))
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros.float())

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs, under autocast in its type.

        Args:
            x: Shape (..., K).

        Returns:
            Shape (..., N), in the type that was computed in.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _ScaledProduct.apply(x, self.gain, self)
        return y if self.bias is None else y + self.bias

    def unscaled(self) -> Tensor:
        """The weight at gains of one, transposed.

        Returns:
            Shape (K, N), float32.
        """
        parts: Any = self
        weight: Tensor = parts.codes.float()
        weight -= parts.zeros[parts.groups]
        return weight.mul_(parts.scales[parts.groups])

    def tuned_scales(self) -> Tensor:
        """The trained scales.

        Returns:
            Shape (G, N), as the layout stores them, float32.
        """
        parts: Any = self
        scales: Tensor = parts.scales * self.gain.detach()
        return scales


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, module: ScaledLinear) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.module = module
        groups: Any = module.groups
        return x @ module.unscaled().mul_(gain[groups]).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, gain = ctx.saved_tensors
        groups = ctx.module.groups
        weight = ctx.module.unscaled()
        slope = (x.flatten(0, -2).T @ gradient.flatten(0, -2)).float()
        to_gain = torch.zeros_like(gain).index_add_(0, groups, slope.mul_(weight))
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ weight.mul_(gain[groups]).to(gradient.dtype).T
        return to_x, to_gain, None
