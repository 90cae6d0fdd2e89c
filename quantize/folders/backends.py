"""GPTQ by another library, with the same call and the same settings.

gptqmodel is the successor of AutoGPTQ, and needs a compiler when it is installed. AutoGPTQ itself
cannot be imported beside transformers 5; the backend auto_gptq ends in an error that says why.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from mistill.errors import MissingExtraError, SettingsError
from mistill.folders.folder import copy_companions
from mistill.folders.lineage import add_lineage, installed_versions
from mistill.folders.publishing import creating
from mistill.progress import track
from mistill.settings import require, settings_dict
from mistill.shown import one_line
from mistill.text.blocks import TokenBlocks
from mistill.weights.gptq_layout import GptqFormat
from quantize.folders.float_model import FloatModel
from quantize.folders.report import ModuleReport, write_report
from quantize.measuring.fidelity import FidelityCheck, report_entry
from quantize.settings import GptqSettings

Backend = Literal["mistill", "gptqmodel", "auto_gptq"]

# Settings that gptqmodel has no counterpart for, and the value that it works with.
_OURS_ALONE: dict[str, Any] = {
    "method": "gptq",
    "scale_type": "float16",
    "head_bits": None,
    "embedding_bits": None,
    "true_sequential": True,
    "model_file_base_name": None,
}


def require_backend(backend: str, settings: GptqSettings) -> None:
    """Refuse a library that cannot quantize with these settings, before any model is opened.

    Args:
        backend: "mistill", "gptqmodel" or "auto_gptq".
        settings: How to quantize.

    Raises:
        SettingsError: If there is no such backend, or it does not know one of the settings.
        MissingExtraError: If the library is not installed or cannot be imported; the message says
            why, and what to do.
    """
    names = get_args(Backend)
    require(backend in names, f"backend must be one of {', '.join(names)}, not {backend!r}")
    if backend == "auto_gptq":
        _probe_auto_gptq()
    if backend == "gptqmodel":
        gptqmodel_config(settings)
        _import_gptqmodel()


def gptqmodel_config(settings: GptqSettings) -> dict[str, Any]:
    """The settings as gptqmodel's ``QuantizeConfig`` takes them.

    Args:
        settings: How to quantize.

    Returns:
        Its keywords.

    Raises:
        SettingsError: If it has no counterpart for a setting; the message names it.
    """
    for name, value in _OURS_ALONE.items():
        ours = getattr(settings, name, value)
        require(
            ours == value,
            f"gptqmodel has no {name} other than {value!r}, got {ours!r}; "
            "leave it out, or use the backend mistill",
        )
    layout = GptqFormat(
        bits=settings.bits,
        group_size=settings.group_size,
        symmetric=settings.symmetric,
        modules=settings.module_formats(),
    )
    config: dict[str, Any] = {
        "bits": settings.bits,
        "group_size": settings.group_size,
        "sym": settings.symmetric,
        "desc_act": settings.order in ("static", "dynamic"),
        "static_groups": settings.order == "static",
        "act_group_aware": settings.order == "group",
        "damp_percent": settings.damp_percent,
        # The exponent of the error that its own search of scales minimises.
        "mse": 2.4 if settings.scale_search > 1 else 0.0,
        "format": "gptq" if settings.symmetric else "gptq_v2",
    }
    if layout.modules:
        config["dynamic"] = layout.to_config()["dynamic"]
    return config


def by_gptqmodel(
    model: FloatModel,
    target: Path,
    *,
    blocks: TokenBlocks,
    settings: GptqSettings,
    check: FidelityCheck | None = None,
    overwrite: bool = False,
    **facts: Any,
) -> Path:
    """Quantize a model by gptqmodel.

    Args:
        model: The float model.
        target: The folder to make.
        blocks: The text to calibrate on, block by block as mistill draws it.
        settings: How to quantize.
        check: Measures the result; None if nothing is to be measured.
        overwrite: Whether an existing target is replaced.
        **facts: Further entries of the lineage.

    Returns:
        The target, in gptqmodel's own files.

    Raises:
        SettingsError: If gptqmodel has no counterpart for a setting.
        MissingExtraError: If it is not installed or cannot be imported.
    """
    config = gptqmodel_config(settings)
    library = _import_gptqmodel()
    started = time.perf_counter()
    calibration = [
        {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in blocks.ids
    ]
    with creating(target, overwrite) as partial, track("gptqmodel", total=None) as bar:
        # It writes a folder of logs into the current directory.
        with TemporaryDirectory() as elsewhere, chdir(elsewhere):
            quantizer = library.GPTQModel.load(
                str(model.folder), library.QuantizeConfig(**config), device="cpu"
            )
            losses = quantizer.quantize(calibration, batch_size=1, calibration_sort=None)
            quantizer.save(str(partial))
        bar.advance(1)
        copy_companions(model.folder, partial)
        used = settings_dict(settings)
        version = str(getattr(library, "__version__", "unknown"))
        write_report(
            partial,
            _reports(losses, settings),
            [],
            step="gptq",
            backend=f"gptqmodel {version}",
            settings=used,
            seconds=round(time.perf_counter() - started, 2),
            **report_entry(check, partial),
        )
        add_lineage(
            partial,
            step="gptq",
            settings=settings,
            source=model.folder,
            backend=f"gptqmodel {version}",
            backend_settings=config,
            calibration={
                "blocks": len(blocks),
                "block_length": blocks.block_length,
                "tokens": blocks.tokens,
            },
            **facts,
        )
    return target


def _reports(losses: Mapping[str, Any], settings: GptqSettings) -> list[ModuleReport]:
    """The figures that gptqmodel logged for each matrix."""
    reports = []
    for entry in (one for group in losses.values() for one in _entries(group)):
        name = f"model.layers.{entry.get('layer')}.{entry.get('module')}"
        form = settings.format_of(name)
        reports.append(
            ModuleReport(
                name=name,
                bits=None if form is None else form.bits,
                group_size=None if form is None else form.group_size,
                loss=_number(entry.get("loss")),
                damping=_number(entry.get("damp")),
                seconds=_number(entry.get("time")),
            )
        )
    return reports


def _entries(group: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in group if isinstance(entry, Mapping)] if group else []


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _import_gptqmodel() -> Any:
    if (os.cpu_count() or 1) <= 2:
        # It divides its workers among pools and has none left for one of them.
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    try:
        return importlib.import_module("gptqmodel")
    except ImportError as error:
        if error.name == "gptqmodel":
            raise MissingExtraError(
                "gptqmodel is not installed; with torch 2.13 and a C compiler: "
                "pip install 'gptqmodel>=7.6,<7.7' --no-build-isolation. "
                "Or leave backend out: mistill's own GPTQ needs neither"
            ) from error
        raise MissingExtraError(
            f"gptqmodel is installed but cannot be imported: {error}. "
            "Leave backend out for mistill's own GPTQ"
        ) from error


def _probe_auto_gptq() -> None:
    """Raise an error that says why AutoGPTQ cannot be used here."""
    instead = (
        "leave backend out: mistill's own GPTQ takes auto-gptq's setting names and writes its "
        "format; backend='gptqmodel' uses the library that succeeded it"
    )
    try:
        importlib.import_module("auto_gptq")
    except ImportError as error:
        if error.name == "auto_gptq":
            raise MissingExtraError(
                "auto_gptq is not installed, and installing it would not help: its last version, "
                "0.7.1, imports no_init_weights from transformers, which transformers 5 lacks; "
                f"{instead}"
            ) from error
        versions = installed_versions()
        raise MissingExtraError(
            f"auto_gptq cannot be imported with transformers {versions.get('transformers')}: "
            f"{one_line(error)}; its last version, 0.7.1 of March 2024, does not "
            f"support transformers 5, and the project is archived; {instead}"
        ) from error
    raise SettingsError(
        "auto_gptq can be imported here, but it is archived and mistill does not call it; "
        f"{instead}"
    )
