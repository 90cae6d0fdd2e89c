"""Load a model onto devices, or over the memory of several, and quantize it to NF4 on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from mistill.errors import ArchitectureError, missing_extra
from mistill.folders.folder import FolderInfo
from mistill.pytorch.four_bit import keep_as_stored
from mistill.pytorch.loading import (
    check_weights,
    empty_model,
    plain_config,
    quiet_transformers,
    require_finite_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Weights that share a scale in bitsandbytes' NF4.
_NF4_BLOCK = 64


def require_nf4_fits(info: FolderInfo) -> None:
    """Refuse a float model that cannot be quantized to NF4 while it is loaded.

    Args:
        info: A float folder.

    Raises:
        ArchitectureError: If its rows do not fill blocks of four-bit weights.
        MissingExtraError: If bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_extra("bitsandbytes", "compress") from error
    for name, module in empty_model(plain_config(info.path)).named_modules():
        if (
            isinstance(module, torch.nn.Linear)
            and name != "lm_head"
            and module.in_features % _NF4_BLOCK
        ):
            raise ArchitectureError(
                f"NF4 needs rows of a multiple of {_NF4_BLOCK} weights, but {name} has "
                f"{module.in_features} inputs; choose another precision"
            )


def load_spread(
    info: FolderInfo,
    dtype: torch.dtype,
    device_map: str | Mapping[str, Any],
    *,
    nf4: bool = False,
) -> PreTrainedModel:
    """Load a float or NF4 folder onto devices, float weights quantized to NF4 if asked for.

    Quantized weights have quantized scales too (double quantization; QLoRA, Dettmers et al., 2023,
    section 3, https://arxiv.org/abs/2305.14314). The embedding, the head and the norms stay float.

    Args:
        info: A folder; for ``nf4`` a float one that ``require_nf4_fits`` has let pass.
        dtype: What to hold float weights in and to compute in.
        device_map: Where each module goes, as accelerate understands it.
        nf4: Whether float weights become NF4.

    Returns:
        The model, in eval mode; its 4-bit layers never repack.

    Raises:
        FolderError: If the folder is broken.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = plain_config(info.path)
    check_weights(info.path, config)
    require_finite_weights(info.path)
    options: dict[str, Any] = {} if info.form == "nf4" else {"config": config}
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            info.path,
            dtype=dtype,
            device_map=device_map,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    keep_as_stored(model)
    if nf4:
        _let_go_of_files(model)
    return cast("PreTrainedModel", model.eval())


def _let_go_of_files(model: PreTrainedModel) -> None:
    """Copy what the CPU still reads from the files of the model, which hold all of its floats.

    A tensor that is loaded as it is stored is a view of its mapped file, and one such view keeps
    every page of it that quantizing has touched: more than the 4-bit weights take.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            parameter.data = parameter.data.clone()
