"""A fresh student: random weights, sizes of its own, and its teacher's vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill.settings import StudentSettings
from distill.student.sizing import Sizes, fitting_layers
from mistill.folders.publishing import write_json
from mistill.pytorch.loading import plain_config
from mistill.settings import require

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def write_fresh(folder: Path, config: Mapping[str, Any], seed: int) -> None:
    """Write the config and the weights of a fresh student.

    Args:
        folder: The folder being made.
        config: Its config.json.
        seed: Where the random weights start.
    """
    from safetensors.torch import save_file

    write_json(folder / "config.json", config)
    weights = random_weights(plain_config(folder), seed)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def fresh_config(teacher: Mapping[str, Any], settings: StudentSettings) -> dict[str, Any]:
    """The config of a student with sizes of its own and all else from its teacher.

    The width of a head is the teacher's if neither ``hidden_size`` nor ``attention_heads`` is
    given, else their quotient.

    Args:
        teacher: The teacher's config.json, of any form.
        settings: The sizes wanted.

    Returns:
        config.json of the student.

    Raises:
        SettingsError: If one size does not divide by another, or if not even one layer fits.
    """
    hidden = settings.hidden_size or int(teacher["hidden_size"])
    heads = settings.attention_heads or int(teacher["num_attention_heads"])
    teacher_groups = teacher.get("num_key_value_heads") or teacher["num_attention_heads"]
    groups = settings.key_value_heads or int(teacher_groups)
    require(
        hidden % heads == 0,
        f"hidden_size must be a multiple of attention_heads; got {hidden} and {heads}",
    )
    require(
        heads % groups == 0,
        f"attention_heads must be a multiple of key_value_heads; got {heads} and {groups}",
    )
    head_dim = hidden // heads
    if settings.hidden_size is None and settings.attention_heads is None:
        head_dim = int(teacher.get("head_dim") or head_dim)
    require(
        head_dim % 2 == 0,
        f"hidden_size / attention_heads must be even, since rotary positions turn pairs; got "
        f"{hidden} / {heads} = {head_dim}",
    )
    changed = {
        **teacher,
        "hidden_size": hidden,
        "intermediate_size": settings.intermediate_size or int(teacher["intermediate_size"]),
        "num_hidden_layers": settings.layers or int(teacher["num_hidden_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "dtype": "float32",
    }
    for name in ("quantization_config", "layer_types", "torch_dtype", "auto_map", "_name_or_path"):
        changed.pop(name, None)
    changed["num_hidden_layers"] = (
        fitting_layers(Sizes.of(changed), settings) or changed["num_hidden_layers"]
    )
    return changed


def random_weights(config: PreTrainedConfig, seed: int) -> dict[str, Tensor]:
    """Weights as transformers starts them for training.

    Args:
        config: A plain config.
        seed: Where they start; the caller's own random state is left alone.

    Returns:
        Float32 tensors by name; a head that is tied to the embedding is not among them.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    # It would start the padding token's row at zero, and that token may well be the end of turn.
    config.pad_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return {name: weight.detach() for name, weight in model.named_parameters()}
