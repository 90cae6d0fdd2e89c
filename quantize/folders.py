"""GPTQ and plain rounding, from a float model folder to a folder in the AutoGPTQ layout."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mistill.errors import FolderError, SettingsError
from mistill.folder import (
    add_lineage,
    context_length,
    copy_companions,
    creating,
    refuse_existing,
)
from mistill.gptq_layout import GptqFormat
from mistill.progress import track
from mistill.pytorch import read_tensors
from mistill.settings import settings_dict, settings_from
from mistill.text import Texts, TokenBlocks, check_texts, pack, read_documents
from mistill.vocabulary import load_vocabulary
from quantize.calibration import (
    MATRICES,
    Batch,
    LayeredModel,
    matrices,
    mean_outer_product,
    walk_layer,
)
from quantize.gptq import GptqResult, quantize_weight, round_weight
from quantize.settings import GptqSettings, RoundingSettings
from quantize.storage import (
    FloatModel,
    ModuleReport,
    TensorWriter,
    open_float,
    require_fit,
    tensor_kinds,
    write_config,
    write_report,
)

_log = logging.getLogger(__name__)

# Blocks read for each one drawn, so that another seed draws others.
_POOL = 8


def to_gptq(
    source: str | Path,
    target: str | Path,
    *,
    texts: Texts,
    settings: GptqSettings | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Quantize the layers of a model by GPTQ, calibrated on text.

    The embedding, the head and the norms keep their weights. ``quantize_report.json`` in the new
    folder names them, and holds loss, damping and time of every matrix.

    Args:
        source: A float model folder.
        target: The folder to make, in the AutoGPTQ layout.
        texts: Text to calibrate on; best of the kind that the model will read and write.
        settings: How to quantize; or give its fields as options.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``GptqSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range, or the groups do not divide a layer.
        FolderError: If the source is broken or quantized already, or computes no finite numbers.
        TextError: If there is no text to calibrate on.
    """
    settings = settings_from(GptqSettings, settings, options)
    target = refuse_existing(target, overwrite)
    model = open_float(source)
    require_fit(model, settings.bits, settings.group_size)
    longest = context_length(model.folder, model.config.to_dict())
    if settings.block_length > longest:
        raise SettingsError(
            f"block_length {settings.block_length} exceeds the model's {longest} positions"
        )
    check_texts(texts)
    blocks = draw_blocks(texts, model.folder, settings)

    started = time.perf_counter()
    layout = _layout(settings)
    reports: list[ModuleReport] = []
    with (
        torch.inference_mode(),
        creating(target, overwrite) as partial,
        TensorWriter(partial) as writer,
        track("Quantizing", total=len(model.matrices), unit="matrices") as progress,
    ):

        def store(module: str, result: GptqResult, seconds: float) -> None:
            writer.add_quantized(module, result.weight, layout.checkpoint_format)
            reports.append(_report(module, result, seconds))
            progress.advance(1, module.removeprefix("model.layers."))

        layers = LayeredModel(model.folder, model.config)
        batches = layers.embed(blocks)
        kept = _copy_outside(model, writer)
        for index in range(len(layers)):
            quantize_layer(layers.layer(index), index, batches, settings, store)
            kept += _copy_rest(model, index, writer)
        write_config(
            model.folder,
            partial,
            layout,
            damp_percent=settings.damp_percent,
            true_sequential=settings.true_sequential,
            act_group_aware=settings.order == "group",
        )
        copy_companions(model.folder, partial)
        calibration = {
            "blocks": len(blocks),
            "block_length": blocks.block_length,
            "tokens": blocks.tokens,
        }
        write_report(
            partial,
            reports,
            kept,
            step="gptq",
            settings=settings_dict(settings),
            calibration=calibration,
            seconds=round(time.perf_counter() - started, 2),
        )
        add_lineage(
            partial,
            step="gptq",
            settings=settings_dict(settings),
            source=model.folder,
            texts=_named(texts),
            calibration=calibration,
            kept_float=tensor_kinds(kept),
        )
    return target


def to_rounding(
    source: str | Path,
    target: str | Path,
    *,
    settings: RoundingSettings | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Round the layers of a model to the nearest codes, the baseline that GPTQ is judged by.

    The folder has the layout, and the bytes, of a GPTQ folder with the same bits and groups.

    Args:
        source: A float model folder.
        target: The folder to make, in the AutoGPTQ layout.
        settings: How to round; or give its fields as options.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``RoundingSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range, or the groups do not divide a layer.
        FolderError: If the source is broken or quantized already.
    """
    settings = settings_from(RoundingSettings, settings, options)
    target = refuse_existing(target, overwrite)
    model = open_float(source)
    require_fit(model, settings.bits, settings.group_size)

    started = time.perf_counter()
    layout = _layout(settings)
    reports = []
    with (
        creating(target, overwrite) as partial,
        TensorWriter(partial) as writer,
        track("Rounding", total=len(model.matrices), unit="matrices") as progress,
    ):
        kept = _copy_outside(model, writer)
        for index in range(model.config.num_hidden_layers):
            for name in MATRICES:
                begun = time.perf_counter()
                module = f"model.layers.{index}.{name}"
                W = read_tensors(model.folder, f"{module}.")["weight"].float()
                weight = round_weight(W, settings)
                writer.add_quantized(module, weight, layout.checkpoint_format)
                seconds = round(time.perf_counter() - begun, 4)
                reports.append(ModuleReport(name=module, seconds=seconds))
                progress.advance(1)
            kept += _copy_rest(model, index, writer)
        write_config(model.folder, partial, layout)
        copy_companions(model.folder, partial)
        write_report(
            partial,
            reports,
            kept,
            step="rounding",
            settings=settings_dict(settings),
            seconds=round(time.perf_counter() - started, 2),
        )
        add_lineage(
            partial,
            step="rounding",
            settings=settings_dict(settings),
            source=model.folder,
            kept_float=tensor_kinds(kept),
        )
    return target


def draw_blocks(texts: Texts, folder: Path, settings: GptqSettings) -> TokenBlocks:
    """Draw the blocks to calibrate on from the beginning of some text.

    Args:
        texts: What ``mistill.text.read_documents`` reads.
        folder: The model, for its vocabulary.
        settings: How many blocks, of which length, and the seed.

    Returns:
        As many blocks as asked for, in the order of the text, or all if there are fewer.

    Raises:
        TextError: If there is no text.
    """
    wanted = settings.samples * settings.block_length
    documents = read_documents(texts, load_vocabulary(folder), limit=_POOL * wanted)
    blocks = pack(documents, settings.block_length)
    if len(blocks) <= settings.samples:
        if len(blocks) < settings.samples:
            _log.warning(
                "the text fills only %d of the %d blocks asked for", len(blocks), settings.samples
            )
        return blocks
    generator = np.random.default_rng(settings.seed)
    drawn = generator.choice(len(blocks), settings.samples, replace=False)
    return blocks[np.sort(drawn)]


@dataclass
class _Stage:
    """Matrices that share their inputs, and the mean of x x^T over these."""

    names: Sequence[str]
    H: Tensor
    seconds: float


# Called with the name of a matrix, its codes, and the seconds they took.
Store = Callable[[str, GptqResult, float], None]


def quantize_layer(
    layer: nn.Module,
    index: int,
    batches: Sequence[Batch],
    settings: GptqSettings,
    store: Store,
) -> None:
    """Quantize the matrices of one layer, and move the calibration text past it.

    Args:
        layer: A decoder layer in float32; its weights become those that the codes stand for.
        index: Its place in the model.
        batches: What enters the layer; afterwards, what leaves it when quantized.
        settings: How to quantize.
        store: Takes each result.

    Raises:
        FolderError: If the inputs of a matrix are not finite numbers.
    """
    place = f"model.layers.{index}"

    def observe(names: Sequence[str], inputs: list[Tensor]) -> _Stage:
        begun = time.perf_counter()
        H = mean_outer_product(inputs)
        if not H.isfinite().all():
            raise FolderError(
                f"the inputs of {place}.{names[0]} are not finite numbers on the calibration text; "
                "the model's weights are damaged, or its training diverged"
            )
        return _Stage(names, H, time.perf_counter() - begun)

    def solve(stage: _Stage) -> None:
        begun = time.perf_counter()
        modules = list(matrices(layer, stage.names))
        stacked = torch.cat([module.weight for module in modules])
        result = quantize_weight(stacked, stage.H, settings)
        parts = result.split([module.out_features for module in modules])
        seconds = (stage.seconds + time.perf_counter() - begun) / len(modules)
        for name, module, part in zip(stage.names, modules, parts, strict=True):
            module.weight.copy_(torch.from_numpy(part.weight.dequantize()))
            store(f"{place}.{name}", part, seconds)

    if settings.true_sequential:
        outputs = walk_layer(layer, batches, lambda names, x: solve(observe(names, x)))
    else:
        stages: list[_Stage] = []
        walk_layer(layer, batches, lambda names, x: stages.append(observe(names, x)))
        for stage in stages:
            solve(stage)
        outputs = walk_layer(layer, batches, lambda names, x: None)
    for batch, hidden in zip(batches, outputs, strict=True):
        batch.hidden = hidden


def _report(module: str, result: GptqResult, seconds: float) -> ModuleReport:
    if result.dead_columns:
        _log.info("%s has %d inputs that are always zero", module, result.dead_columns)
    return ModuleReport(
        name=module,
        loss=float(result.losses.mean()),
        damping=result.damping,
        dead_columns=result.dead_columns,
        seconds=round(seconds, 4),
    )


def _layout(settings: GptqSettings | RoundingSettings) -> GptqFormat:
    return GptqFormat(
        bits=settings.bits,
        group_size=settings.group_size,
        symmetric=settings.symmetric,
        checkpoint_format="gptq" if settings.symmetric else "gptq_v2",
    )


def _copy_outside(model: FloatModel, writer: TensorWriter) -> list[str]:
    """Copy what belongs to no layer: embedding, last norm, and the head if it is its own."""
    kept = []
    for module in ("model.embed_tokens.", "model.norm.", "lm_head."):
        for name, tensor in read_tensors(model.folder, module).items():
            if module == "lm_head." and model.config.tie_word_embeddings:
                continue
            writer.add(f"{module}{name}", tensor)
            kept.append(f"{module}{name}")
    return kept


def _copy_rest(model: FloatModel, index: int, writer: TensorWriter) -> list[str]:
    """Copy what is in a layer besides its matrices: norms, and biases where there are any."""
    layer = f"model.layers.{index}."
    weights = {f"{name}.weight" for name in MATRICES}
    kept = []
    for name, tensor in read_tensors(model.folder, layer).items():
        if name not in weights and not name.endswith("rotary_emb.inv_freq"):
            writer.add(f"{layer}{name}", tensor)
            kept.append(f"{layer}{name}")
    return kept


def _named(texts: Texts) -> list[str]:
    return [str(texts)] if isinstance(texts, str | Path) else [str(text) for text in texts]
