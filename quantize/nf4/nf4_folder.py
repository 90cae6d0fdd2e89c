"""Store a float model folder as NF4, 4-bit NormalFloat weights as bitsandbytes writes them.

It needs no calibration text, and one matrix at a time is in memory. The codes are those of
bitsandbytes (``quantize.nf4.nf4_codec``), which is needed neither here nor to read the folder in
mistill.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from mistill.errors import ArchitectureError, FolderError
from mistill.folders.folder import copy_companions, read_config, tensor_headers
from mistill.folders.publishing import creating, refuse_existing, write_json
from mistill.progress import track
from mistill.pytorch.loading import read_tensors
from mistill.settings import settings_from
from mistill.text.rows import Texts
from mistill.weights.tensor_writer import TensorWriter
from quantize.folders.float_model import FloatModel, open_float
from quantize.folders.report import ModuleReport, write_records
from quantize.measuring.fidelity import open_check
from quantize.nf4.nf4_codec import BLOCK, encode_nf4
from quantize.settings import Nf4Settings

if TYPE_CHECKING:
    from quantize.options import Nf4Options


def to_nf4(
    source: str | Path,
    target: str | Path,
    *,
    held_out: Texts | None = None,
    teacher: str | Path | None = None,
    settings: Nf4Settings | None = None,
    overwrite: bool = False,
    **options: Unpack[Nf4Options],
) -> Path:
    """Store the layers of a model as 4-bit NormalFloat.

    The folder is what transformers writes and ``AutoModelForCausalLM.from_pretrained`` loads where
    bitsandbytes is installed. The embedding, the head and the norms keep their weights.

    Args:
        source: A float model folder.
        target: The folder to make.
        held_out: Text to measure the result on; the report holds its KL to the source then.
        teacher: The model that the source learnt from, to compare the result with too.
        settings: How to store; or give its fields as options.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``Nf4Settings``.

    Returns:
        The target.

    Raises:
        SettingsError: If there is a teacher and no held-out text.
        FolderError: If the source is broken or quantized already.
        ArchitectureError: If a matrix has rows that blocks of 64 do not fill.
        VocabularyError: If the teacher has another vocabulary.
        TextError: If there is no text to measure on.
    """
    settings = settings_from(Nf4Settings, settings, options)
    target = refuse_existing(target, overwrite, [source])
    model = open_float(source)
    _require_whole_blocks(model)
    check = open_check(model.folder, held_out, teacher, skip_bad_rows=settings.skip_bad_rows)

    started = time.perf_counter()
    reports: list[ModuleReport] = []
    float_names: list[str] = []
    with creating(target, overwrite) as partial:
        with (
            TensorWriter(partial) as writer,
            track("Encoding", total=len(model.matrices), unit="matrices") as progress,
        ):
            for name in _names(model):
                tensor = read_tensors(model.folder, name)[""]
                module = name.removesuffix(".weight")
                if module not in model.matrices:
                    writer.add(name, tensor)
                    float_names.append(name)
                    continue
                started_at = time.perf_counter()
                try:
                    encoded = encode_nf4(tensor, settings.double_quantization)
                except ValueError as error:
                    raise FolderError(
                        f"{name} of {model.folder} cannot be stored: {error}"
                    ) from error
                for part, values in encoded.items():
                    writer.add(f"{module}.{part}", values)
                seconds = round(time.perf_counter() - started_at, 4)
                reports.append(ModuleReport(name=module, seconds=seconds))
                progress.advance(1)
        _write_config(model.folder, partial, settings)
        copy_companions(model.folder, partial)
        write_records(
            partial,
            model,
            reports,
            float_names,
            step="nf4",
            settings=settings,
            started=started,
            check=check,
        )
    return target


def _names(model: FloatModel) -> Iterator[str]:
    """The tensors that the new folder is made of, in the order of the files."""
    for name in tensor_headers(model.folder):
        tied_head = name == "lm_head.weight" and model.config.tie_word_embeddings
        if not tied_head and not name.endswith("rotary_emb.inv_freq"):
            yield name


def _write_config(source: Path, target: Path, settings: Nf4Settings) -> None:
    """The parent's config, and how to read the weights, as transformers writes both."""
    config = read_config(source)
    config["quantization_config"] = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": settings.double_quantization,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    write_json(target / "config.json", config)


def _require_whole_blocks(model: FloatModel) -> None:
    """Refuse rows that share a block: bitsandbytes 0.50 decodes them wrongly on a CPU."""
    for name, (inputs, _) in model.matrices.items():
        if inputs % BLOCK:
            raise ArchitectureError(
                f"NF4 needs rows of a multiple of {BLOCK} weights, but {name} has {inputs} inputs; "
                "quantize this model by GPTQ"
            )
