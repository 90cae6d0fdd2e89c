"""NF4: 4-bit NormalFloat weights, written by bitsandbytes through transformers.

Each run of 64 weights is divided by its largest magnitude and rounded to one of 16 numbers, the
quantiles of a normal distribution (QLoRA, Dettmers et al., 2023, section 3,
https://arxiv.org/abs/2305.14314). It looks at no text. On a CPU it saves memory and not time: every
product turns the codes back into floats first.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from mistill.errors import ArchitectureError, missing_extra
from mistill.folder import add_lineage, copy_companions, creating, refuse_existing
from mistill.pytorch import quiet_transformers
from mistill.settings import settings_dict, settings_from
from quantize.settings import Nf4Settings
from quantize.storage import FloatModel, ModuleReport, open_float, tensor_kinds, write_report

BLOCK = 64


def to_nf4(
    source: str | Path,
    target: str | Path,
    *,
    settings: Nf4Settings | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Store the layers of a model as 4-bit NormalFloat.

    The folder is what transformers writes and ``AutoModelForCausalLM.from_pretrained`` loads where
    bitsandbytes is installed. The embedding, the head and the norms keep their weights.

    Args:
        source: A float model folder.
        target: The folder to make.
        settings: How to store; or give its fields as options.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``Nf4Settings``.

    Returns:
        The target.

    Raises:
        FolderError: If the source is broken or quantized already.
        ArchitectureError: If a matrix has rows that blocks of 64 do not fill.
        MissingExtraError: If bitsandbytes is not installed.
    """
    settings = settings_from(Nf4Settings, settings, options)
    target = refuse_existing(target, overwrite)
    model = open_float(source)
    _require_whole_blocks(model)
    try:
        import bitsandbytes  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_extra("bitsandbytes", "compress") from error
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    started = time.perf_counter()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with quiet_transformers(), creating(target, overwrite) as partial:
        quantized = AutoModelForCausalLM.from_pretrained(
            model.folder,
            dtype="auto",
            quantization_config=quantization,
            device_map={"": "cpu"},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        quantized.save_pretrained(partial)
        names = [f"{name}.weight" for name in model.matrices]
        kept = sorted({name for name, _ in quantized.named_parameters()} - set(names))
        seconds = time.perf_counter() - started
        copy_companions(model.folder, partial)
        reports = [ModuleReport(name=name) for name in model.matrices]
        used = settings_dict(settings)
        write_report(partial, reports, kept, step="nf4", settings=used, seconds=round(seconds, 2))
        add_lineage(
            partial,
            step="nf4",
            settings=used,
            source=model.folder,
            kept_float=tensor_kinds(kept),
        )
    return target


def _require_whole_blocks(model: FloatModel) -> None:
    """Refuse rows that share a block: bitsandbytes 0.50 decodes them wrongly on a CPU."""
    for name, (inputs, _) in model.matrices.items():
        if inputs % BLOCK:
            raise ArchitectureError(
                f"NF4 needs rows of a multiple of {BLOCK} weights, but {name} has {inputs} inputs; "
                "quantize this model by GPTQ"
            )
