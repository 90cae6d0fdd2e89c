"""Plain rounding, from a float model folder to a folder in the AutoGPTQ layout."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from torch import Tensor

from mistill.folders.folder import copy_companions
from mistill.folders.publishing import creating, refuse_existing
from mistill.progress import Tracker, track
from mistill.pytorch.loading import read_tensors
from mistill.pytorch.stages import MATRICES
from mistill.settings import settings_from
from mistill.text.rows import Texts
from mistill.weights.gptq_layout import EMBEDDING, HEAD, ModuleFormat, QuantizedWeight
from mistill.weights.tensor_writer import TensorWriter
from quantize.folders.float_model import FloatModel, open_float, write_config
from quantize.folders.plan import Plan, layer_rest, make_plan, read_table, round_table
from quantize.folders.report import ModuleReport, report_of, write_records
from quantize.gptq.rounding import round_weight
from quantize.measuring.fidelity import open_check
from quantize.settings import RoundingSettings

if TYPE_CHECKING:
    from quantize.options import RoundingOptions


def to_rounding(
    source: str | Path,
    target: str | Path,
    *,
    held_out: Texts | None = None,
    teacher: str | Path | None = None,
    settings: RoundingSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[RoundingOptions],
) -> Path:
    """Round the layers of a model to the nearest codes, the baseline of GPTQ.

    The folder has the layout, and the bytes, of a GPTQ folder with the same bits and groups. One
    matrix at a time is in memory.

    Args:
        source: A float model folder.
        target: The folder to make, in the AutoGPTQ layout.
        held_out: Text to measure the result on; the report holds its KL to the source then.
        teacher: The model that the source learnt from, to compare the result with too.
        settings: How to round; or give its fields as options.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``RoundingSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range, the groups do not divide a layer, or there is
            a teacher and no held-out text.
        FolderError: If the source is broken or quantized already.
        VocabularyError: If the teacher has another vocabulary.
        TextError: If there is no text to measure on.
    """
    settings = settings_from(RoundingSettings, settings, options)
    target = refuse_existing(target, overwrite, [source])
    model = open_float(source)
    plan = make_plan(model, settings)
    check = open_check(model.folder, held_out, teacher, skip_bad_rows=settings.skip_bad_rows)

    started = time.perf_counter()
    with creating(target, overwrite) as partial:
        with (
            TensorWriter(partial) as writer,
            track("Rounding", total=len(plan.matrices), unit="matrices") as progress,
        ):
            work = _Rounder(writer, model, plan, settings, progress)
            work.tables()
            for index in range(model.config.num_hidden_layers):
                work.layer(index)
        write_config(model.folder, partial, plan.layout)
        copy_companions(model.folder, partial)
        write_records(
            partial,
            model,
            work.reports,
            work.float_names,
            step="rounding",
            settings=settings,
            started=started,
            check=check,
        )
    return target


class _Rounder:
    """Writes the parts of a rounded model, and collects their reports."""

    def __init__(
        self,
        writer: TensorWriter,
        model: FloatModel,
        plan: Plan,
        settings: RoundingSettings,
        progress: Tracker,
    ) -> None:
        self._writer, self._model, self._plan = writer, model, plan
        self._settings, self._progress = settings, progress
        self.reports: list[ModuleReport] = []
        self.float_names: list[str] = []

    def tables(self) -> None:
        """Write the embedding, the head and the norm before it."""
        self._table(EMBEDDING, self._plan.embedding)
        if self._plan.head_table == HEAD:
            self._table(HEAD, self._plan.head)
        for name, tensor in read_tensors(self._model.folder, "model.norm.").items():
            self._keep(f"model.norm.{name}", tensor)

    def layer(self, index: int) -> None:
        """Write a decoder layer, reading one matrix at a time."""
        for matrix in MATRICES:
            started_at = time.perf_counter()
            module = f"model.layers.{index}.{matrix}"
            form = self._settings.format_of(module)
            if form is not None:
                W = read_tensors(self._model.folder, f"{module}.")["weight"]
                self._store(module, round_weight(W, self._settings.with_format(form)), started_at)
        for name, tensor in layer_rest(self._model, index, self._settings).items():
            self._keep(name, tensor)

    def _table(self, module: str, form: ModuleFormat | None) -> None:
        started_at = time.perf_counter()
        weights = read_table(self._model, module)
        if form is None:
            self._keep(f"{module}.weight", weights)
        else:
            self._store(module, round_table(weights, self._settings, form), started_at)

    def _keep(self, name: str, tensor: Tensor) -> None:
        self._writer.add(name, tensor)
        self.float_names.append(name)

    def _store(self, module: str, weight: QuantizedWeight, started_at: float) -> None:
        self._writer.add_quantized(module, weight, self._plan.layout.checkpoint_format)
        self.reports.append(report_of(module, weight, time.perf_counter() - started_at))
        self._progress.advance(1, module.removeprefix("model.layers."))
