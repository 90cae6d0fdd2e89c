"""A student that learns through low-rank adapters, and becomes a plain model again.

Beside each frozen matrix W of the layers, and of the head where it is not the embedding, stand B
and A of rank r; the layer computes W x + s B A x and only B and A are trained (LoRA, Hu et al.,
2021, https://arxiv.org/abs/2106.09685). What is saved is W + s B A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mistill.errors import missing_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALE = 2.0
"""s: the usual alpha of twice the rank, divided by the rank."""

_NAME = "default"
_BASE = ".base_layer."


def require_peft() -> None:
    """Refuse to make adapters without the library for them.

    Raises:
        MissingExtraError: If peft is not installed.
    """
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_extra("peft", "tune") from error


def add_adapters(student: PreTrainedModel, rank: int) -> None:
    """Put adapters beside the matrices of a student, in place, and freeze all else.

    A begins at random, from PyTorch's global generator, and B at 0: nothing changes at first.

    Args:
        student: A Llama or Mistral.
        rank: r.
    """
    from peft import LoraConfig, inject_adapter_in_model

    kinds = {
        name.rpartition(".")[2]
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear)
    }
    if student.config.tie_word_embeddings:
        kinds.discard("lm_head")
    config = LoraConfig(
        r=rank, lora_alpha=round(SCALE * rank), lora_dropout=0.0, target_modules=sorted(kinds)
    )
    inject_adapter_in_model(config, student, adapter_name=_NAME)


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a student with its adapters added to the matrices beside which they stand.

    Args:
        weights: A state dict, with adapters or without.

    Returns:
        The state dict of the plain architecture.
    """
    plain = {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            continue
        if _BASE in name:
            module, _, last = name.partition(_BASE)
            if last == "weight":
                up, down = (weights[f"{module}.lora_{part}.{_NAME}.weight"] for part in "BA")
                tensor = tensor + SCALE * (up @ down)
            name = f"{module}.{last}"
        plain[name] = tensor
    return plain
