"""Plain rounding, from a float model folder to a folder in the AutoGPTQ layout."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mistill.folder import copy_companions
from mistill.gptq_layout import EMBEDDING, HEAD, ModuleFormat, QuantizedWeight
from mistill.lineage import add_lineage
from mistill.progress import track
from mistill.publishing import creating, refuse_existing
from mistill.pytorch import read_tensors
from mistill.settings import settings_dict, settings_from
from quantize.calibration import MATRICES
from quantize.layout import layer_rest, make_plan, read_table, report_of, round_table
from quantize.overrides import format_of, with_format
from quantize.report import ModuleReport, write_report
from quantize.rounding import round_weight
from quantize.settings import RoundingSettings
from quantize.storage import TensorWriter, open_float, tensor_kinds, write_config


def to_rounding(
    source: str | Path,
    target: str | Path,
    *,
    settings: RoundingSettings | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Round the layers of a model to the nearest codes, the baseline that GPTQ is judged by.

    The folder has the layout, and the bytes, of a GPTQ folder with the same bits and groups. One
    matrix at a time is in memory.

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
    plan = make_plan(model, settings)

    started = time.perf_counter()
    reports: list[ModuleReport] = []
    kept: list[str] = []
    with (
        creating(target, overwrite) as partial,
        TensorWriter(partial) as writer,
        track("Rounding", total=len(plan.matrices), unit="matrices") as progress,
    ):

        def store(module: str, weight: QuantizedWeight, begun: float) -> None:
            writer.add_quantized(module, weight, plan.layout.checkpoint_format)
            reports.append(report_of(module, weight, time.perf_counter() - begun))
            progress.advance(1, module.removeprefix("model.layers."))

        def table(module: str, form: ModuleFormat | None) -> None:
            begun = time.perf_counter()
            weights = read_table(model, module)
            if form is None:
                writer.add(f"{module}.weight", weights)
                kept.append(f"{module}.weight")
            else:
                store(module, round_table(weights, settings, form), begun)

        table(EMBEDDING, plan.embedding)
        if plan.head_table == HEAD:
            table(HEAD, plan.head)
        for name, tensor in read_tensors(model.folder, "model.norm.").items():
            writer.add(f"model.norm.{name}", tensor)
            kept.append(f"model.norm.{name}")
        for index in range(model.config.num_hidden_layers):
            for matrix in MATRICES:
                begun = time.perf_counter()
                module = f"model.layers.{index}.{matrix}"
                form = format_of(settings, module)
                if form is not None:
                    W = read_tensors(model.folder, f"{module}.")["weight"]
                    store(module, round_weight(W, with_format(settings, form)), begun)
            for name, tensor in layer_rest(model, index, settings).items():
                writer.add(name, tensor)
                kept.append(name)
        used = settings_dict(settings)
        write_config(model.folder, partial, plan.layout)
        copy_companions(model.folder, partial)
        seconds = round(time.perf_counter() - started, 2)
        write_report(partial, reports, kept, step="rounding", settings=used, seconds=seconds)
        add_lineage(
            partial,
            step="rounding",
            settings=used,
            source=model.folder,
            kept_float=tensor_kinds(kept),
        )
    return target
