"""Heads of every kind against plain autograd through the model's own forward pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mistill.errors import ArchitectureError
from mistill.loss.heads import FourBitWeight, Head, PlainWeight, as_head, read_head
from mistill.loss.losses import head_loss
from mistill.loss.targets import DenseTargets

N, V, D, RANK = 9, 70, 64, 3


def numbers(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def naive(
    hidden: Tensor, head: Head, teacher: Tensor, next_ids: Tensor, share: float = 0.3
) -> Tensor:
    """The definition, by autograd over full logits."""
    assert head.plain is not None
    logits = hidden @ head.plain.t()
    if head.adapter is not None:
        down, up, size = head.adapter
        logits = logits + size * (hidden @ down.t()) @ up.t()
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    p = torch.softmax(teacher, dim=-1)
    kl = (p * (p.log() - torch.log_softmax(logits, dim=-1))).sum()
    nll = torch.nn.functional.cross_entropy(logits, next_ids, reduction="sum")
    return ((1 - share) * kl + share * nll) / N


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        {"bias"},
        {"adapter"},
        {"scale"},
        {"soft_cap"},
        {"scale", "soft_cap"},
        {"bias", "adapter", "scale", "soft_cap"},
    ],
    ids=lambda parts: "+".join(sorted(parts)),
)
def test_all_that_acts_on_the_logits_counts_in_loss_and_gradients(
    parts: set[str], frozen: bool
) -> None:
    def build() -> tuple[Tensor, Head, list[Tensor]]:
        hidden = numbers(0, N, D, scale=0.3).requires_grad_()
        weight = numbers(1, V, D, scale=0.3).requires_grad_(not frozen)
        bias = numbers(2, V).requires_grad_() if "bias" in parts else None
        adapter = None
        if "adapter" in parts:
            down, up = numbers(3, RANK, D).requires_grad_(), numbers(4, V, RANK).requires_grad_()
            adapter = (down, up, 0.5)
        head = Head(
            weight=PlainWeight(weight),
            bias=bias,
            adapter=adapter,
            scale=0.25 if "scale" in parts else 1.0,
            soft_cap=2.0 if "soft_cap" in parts else None,
        )
        trained = [weight, bias, *(adapter[:2] if adapter else ())]
        leaves = [leaf for leaf in trained if leaf is not None and leaf.requires_grad]
        return hidden, head, [hidden, *leaves]

    teacher_hidden, teacher_weight = numbers(5, N, D, scale=0.3), numbers(6, V, D, scale=0.3)
    next_ids = torch.arange(N)
    hidden, head, theirs = build()
    expected = naive(hidden, head, teacher_hidden @ teacher_weight.t(), next_ids)
    expected.backward()
    hidden, head, ours = build()
    result = head_loss(
        hidden,
        head,
        DenseTargets(teacher_hidden, as_head(teacher_weight)),
        next_ids,
        positions_in_step=N,
        cross_entropy=0.3,
        memory_mib=2.5 * 4 * V * 8 / 2**20,
    )
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-10, atol=0)
    for mine, his in zip(ours, theirs, strict=True):
        assert his.grad is not None
        torch.testing.assert_close(mine.grad, his.grad, rtol=1e-8, atol=1e-13)


def test_a_head_in_four_bits_is_read_a_few_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr("mistill.loss.heads._SLICE_BYTES", 16 * D * 4)
    for nested in (False, True):
        values = numbers(1, V, D, scale=0.3).float()
        packed, state = functional.quantize_4bit(
            values, blocksize=64, quant_type="nf4", compress_statistics=nested
        )
        whole = functional.dequantize_4bit(packed, state).float()
        weight = FourBitWeight(packed, state, D)
        parts = list(weight.slices(torch.float32))
        assert len(parts) == 5
        torch.testing.assert_close(torch.cat([part for _, part in parts]), whole, rtol=0, atol=0)

        teacher = DenseTargets(numbers(5, N, D).float(), as_head(numbers(6, V, D).float()))
        gradients, losses = [], []
        for head in (Head(weight), as_head(whole)):
            hidden = numbers(0, N, D).float().requires_grad_()
            result = head_loss(hidden, head, teacher, torch.arange(N), positions_in_step=N)
            result.loss.backward()
            gradients.append(hidden.grad)
            losses.append(result.loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def model_with(head: Any, **config: Any) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(model_type="made-up", **config), get_output_embeddings=lambda: head
    )


def test_a_head_is_read_with_its_bias_scale_and_cap() -> None:
    linear = nn.Linear(4, 6, bias=True)
    found = read_head(
        model_with(linear, logit_scale=0.5, logits_scaling=4.0, final_logit_softcapping=30.0)
    )
    assert found.plain is linear.weight
    assert found.bias is linear.bias
    assert found.scale == 0.125
    assert found.soft_cap == 30.0
    hidden = torch.randn(3, 4)
    expected = 30 * torch.tanh(0.125 * linear(hidden) / 30)
    out = torch.empty(3, 6)
    with torch.no_grad():
        found.frozen(torch.float32).logits(hidden, out=out)
    torch.testing.assert_close(out, expected.detach())


def test_a_head_of_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(ArchitectureError, match="made-up is a Conv1d"):
        read_head(model_with(nn.Conv1d(4, 6, 1)))
    with pytest.raises(ArchitectureError, match=r"lm_head_multiplier = 0\.5"):
        read_head(model_with(nn.Linear(4, 6), lm_head_multiplier=0.5))


# peft asks transformers by a name that transformers 6 will drop
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_head_with_an_adapter_of_peft_is_read_with_it() -> None:
    peft = pytest.importorskip("peft")
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = peft.get_peft_model(
        MistralForCausalLM(config),
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=["lm_head", "q_proj"]),
    )
    inner = model.get_base_model()
    nn.init.normal_(inner.lm_head.lora_B["default"].weight)
    head = read_head(inner)
    assert head.adapter is not None
    assert head.adapter[2] == 3.0
    hidden = torch.randn(5, 16)
    with torch.no_grad():
        expected = inner.lm_head(hidden)
        found = head.frozen(torch.float32).logits(hidden, out=torch.empty(5, 50))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    config_with_dropout = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["lm_head"])
    other = peft.get_peft_model(MistralForCausalLM(config), config_with_dropout)
    with pytest.raises(ArchitectureError, match="dropout"):
        read_head(other.get_base_model())
