"""Let a layer remember less for its backward pass.

Between two matrix products a layer of Llama or Mistral does cheap arithmetic: it scales by a root
mean square, and it multiplies silu(gate) by up. Written out operation by operation, autograd keeps
what lies between them as well, about a fifth of all that a training step remembers. Here each is
one operation that keeps its inputs and computes the rest again on the way back. Forward passes give
the same bits as transformers' own.

B is batch, T positions, D width, F width of the feed-forward part.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def remember_less(model: nn.Module) -> int:
    """Replace what the norms and feed-forward parts of a model compute with the same for less.

    Args:
        model: A model to be trained; modules that are not known here are left as they are.

    Returns:
        How many modules were changed.
    """
    changed = 0
    for module in model.modules():
        name = type(module).__name__
        if name in ("LlamaRMSNorm", "MistralRMSNorm"):
            module.forward = MethodType(_norm, module)
        elif name in ("LlamaMLP", "MistralMLP") and _is_silu(module.act_fn):
            module.forward = MethodType(_feed_forward, module)
        else:
            continue
        changed += 1
    return changed


def _is_silu(function: Any) -> bool:
    return isinstance(function, nn.SiLU) or type(function).__name__ == "SiLUActivation"


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    output: Tensor = _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)
    return output


def _feed_forward(self: Any, x: Tensor) -> Tensor:
    output: Tensor = self.down_proj(_GatedProduct.apply(self.gate_proj(x), self.up_proj(x)))
    return output


class _GatedProduct(torch.autograd.Function):
    """silu(gate) * up, both of shape (B, T, F)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        share = gate.sigmoid()
        silu = gate * share
        to_up = gradient * silu
        # d silu(g)/dg = s + g s (1 - s) = s + silu (1 - s), with s = sigmoid(g)
        slope = torch.addcmul(share, silu, 1 - share)
        return slope.mul_(gradient).mul_(up), to_up


class _RmsNorm(torch.autograd.Function):
    """w * x / sqrt(mean(x^2) + e) over the last dimension, x of shape (B, T, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.float32)
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = x.to(torch.float32) * inverse
        gradient = gradient.to(torch.float32)
        to_x = to_weight = None
        if ctx.needs_input_grad[1]:
            rows = (gradient * normed).flatten(0, -2)
            to_weight = rows.sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            pulled = gradient * weight
            mean = (pulled * normed).mean(-1, keepdim=True)
            to_x = torch.addcmul(pulled, normed, mean, value=-1).mul_(inverse).to(x.dtype)
        return to_x, to_weight, None
