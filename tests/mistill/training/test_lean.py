"""What a layer need not remember, it computes again, with the same result."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm

from mistill.training.lean import remember_less

SIZES: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}


def modules_of_a_layer() -> list[nn.Module]:
    torch.manual_seed(0)
    norms: list[Any] = [LlamaRMSNorm(24, eps=1e-5), MistralRMSNorm(24, eps=1e-5)]
    for norm in norms:
        nn.init.normal_(norm.weight)
    return [
        *norms,
        LlamaMLP(LlamaConfig(**SIZES)),
        MistralMLP(MistralConfig(**SIZES, num_key_value_heads=2)),
    ]


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradients of the input and all weights under a fixed pull."""
    x = x.clone().requires_grad_(True)
    y = module(x)
    pull = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    return y, list(torch.autograd.grad(y, [x, *module.parameters()], pull))


@pytest.mark.parametrize("module", modules_of_a_layer(), ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_keep_their_bits_and_gradients_their_values(
    module: nn.Module, dtype: torch.dtype
) -> None:
    plain, lean = module.to(dtype), deepcopy(module).to(dtype)
    assert remember_less(lean) == 1
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)

    wanted, wanted_gradients = run(plain, x)
    found, gradients = run(lean, x)

    assert torch.equal(found, wanted)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    for gradient, reference in zip(gradients, wanted_gradients, strict=True):
        assert gradient.dtype == reference.dtype
        error = (gradient - reference).float().norm() / reference.float().norm()
        assert error < tolerance


def test_the_gradient_of_a_norm_is_that_of_its_definition() -> None:
    lean = LlamaRMSNorm(24)
    nn.init.normal_(lean.weight)
    remember_less(lean)
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(2))
    exact = x.double().requires_grad_(True)
    weight = lean.weight.detach().double().requires_grad_(True)

    y = weight * exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    pull = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    wanted = torch.autograd.grad(y, [exact, weight], pull)

    for gradient, reference in zip(run(lean, x)[1], wanted, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", modules_of_a_layer(), ids=lambda m: type(m).__name__)
def test_less_is_remembered(module: nn.Module) -> None:
    x = torch.randn(64, 24)

    def remembered(module: nn.Module) -> int:
        ours = {x.data_ptr(), *(p.data_ptr() for p in module.parameters())}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in ours:
                kept[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(x.requires_grad_(True))
        return sum(tensor.nbytes for tensor in kept.values())

    plain = remembered(module)
    remember_less(module)
    # Of a norm one number a row is left; of gate, silu, up and product three of four.
    share = 0.05 if "Norm" in type(module).__name__ else 0.76
    assert remembered(module) <= share * plain


def test_what_is_not_known_is_left_alone() -> None:
    odd = LlamaMLP(LlamaConfig(**SIZES, hidden_act="gelu"))
    assert remember_less(nn.Sequential(odd, nn.LayerNorm(24), nn.Linear(24, 24))) == 0
