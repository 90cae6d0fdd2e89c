"""Which optimizer moves which weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mistill.errors import SettingsError, missing_extra
from mistill.training.processes import OptimizerName

_BETAS = (0.9, 0.95)


def make_optimizer(
    model: nn.Module, *, name: OptimizerName, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW that decays matrices only (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101).

    Norms and biases are scales and shifts that have no reason to be small. Embedding and head
    rows of tokens that a text never holds would decay towards 0 without being trained.

    By the name ``adamw_8bit`` both moments of every matrix are kept in a byte a weight, with a
    scale for each run of 256 (Dettmers et al., 2021, https://arxiv.org/abs/2110.02861).

    Args:
        model: The model to train; what has no gradient is left out.
        name: Which optimizer.
        learning_rate: The rate to start with; above 0.
        weight_decay: Of matrices of the layers; norms, biases and tables of tokens have none.

    Returns:
        The optimizer: PyTorch's in its fused form, or bitsandbytes'.
    """
    tables = {
        id(module.weight)
        for label, module in model.named_modules()
        if isinstance(module, nn.Embedding) or label.endswith("lm_head")
    }
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and id(parameter) not in tables
            (decayed if is_matrix else spared).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, weight_decay), (spared, 0.0))
        if parameters
    ]
    options: dict[str, Any] = {"lr": learning_rate, "betas": _BETAS}
    if name == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    from bitsandbytes.optim.adamw import AdamW8bit

    eight_bit: torch.optim.Optimizer = AdamW8bit(groups, **options)
    return eight_bit


def require_optimizer(name: OptimizerName) -> None:
    """Refuse an optimizer that cannot work here.

    Args:
        name: Which optimizer.

    Raises:
        MissingExtraError: If its library is not installed.
        SettingsError: If its library cannot compute on this machine.
    """
    if name != "adamw_8bit":
        return
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ModuleNotFoundError as error:
        raise missing_extra("bitsandbytes", "compress") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = nn.Parameter(torch.zeros(4096, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        AdamW8bit([weight], lr=1.0).step()
        works = bool((weight < 0).all())
    except (NotImplementedError, RuntimeError):
        works = False
    if not works:
        raise SettingsError(
            f"this build of bitsandbytes has no 8-bit AdamW for {device}; choose the optimizer "
            "adamw, or install a bitsandbytes that has"
        )
