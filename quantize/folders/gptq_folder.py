"""GPTQ, from a float model folder to a folder in the AutoGPTQ layout."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch

from mistill.errors import SettingsError
from mistill.folders.folder import context_length, copy_companions
from mistill.folders.lineage import fingerprint, installed_versions
from mistill.folders.publishing import begun_on, publish, refuse_existing, working
from mistill.progress import Tracker, track
from mistill.pytorch.layers import Batch, LayeredModel
from mistill.pytorch.loading import read_tensors, require_finite_weights
from mistill.pytorch.stages import kept_rows
from mistill.settings import result_settings, settings_from
from mistill.text.blocks import TokenBlocks
from mistill.text.rows import Texts, check_texts, sources_of
from mistill.text.vocabulary import load_vocabulary
from mistill.weights.gptq_layout import EMBEDDING
from mistill.weights.tensor_writer import TensorWriter, packed_tensors
from quantize.calibration_text import draw_blocks
from quantize.folders.auto_gptq_names import name_as_auto_gptq, translated
from quantize.folders.backends import Backend, by_gptqmodel, require_backend
from quantize.folders.float_model import FloatModel, open_float, write_config
from quantize.folders.plan import (
    Plan,
    layer_rest,
    make_plan,
    read_table,
    round_table,
    rounded_rows,
)
from quantize.folders.report import report_of, write_records
from quantize.folders.resuming import Part, PartStore
from quantize.gptq.gptq import GptqResult
from quantize.gptq.layers import quantize_head, quantize_layer
from quantize.measuring.fidelity import FidelityCheck, open_check
from quantize.settings import GptqSettings

if TYPE_CHECKING:
    from quantize.folders.auto_gptq_names import AutoGptqOptions

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """Everything that is decided before any weight is read.

    Attributes:
        model: The float model.
        plan: How each of its modules is stored.
        settings: How to quantize.
        texts: Names of the calibration text.
        blocks: The calibration text.
        dated: The day that the text was rendered with, if the chat template writes it.
    """

    model: FloatModel
    plan: Plan
    settings: GptqSettings
    texts: list[str]
    blocks: TokenBlocks
    dated: dict[str, str]


def to_gptq(
    source: str | Path,
    target: str | Path,
    *,
    texts: Texts,
    held_out: Texts | None = None,
    teacher: str | Path | None = None,
    settings: GptqSettings | None = None,
    backend: Backend = "mistill",
    overwrite: bool = False,
    **options: Unpack[AutoGptqOptions],
) -> Path:
    """Quantize the layers of a model by GPTQ, calibrated on text.

    The norms keep their weights, and so do the embedding and the head unless their bits are set.
    ``quantize_report.json`` and ``.csv`` in the new folder hold loss, damping and time of every
    matrix. One layer at a time is in memory. Finished layers are stored beside the target, so that
    the same call resumes after an interruption and does at most one layer again.

    Args:
        source: A float model folder.
        target: The folder to make, in the AutoGPTQ layout.
        texts: Text to calibrate on; best similar to what the model will read and write.
        held_out: Text to measure the result on; the report holds its KL to the source then.
        teacher: The model that the source learnt from, to compare the result with too.
        settings: How to quantize; or give its fields as options.
        backend: "gptqmodel" quantizes with that library, where it is installed, and leaves its
            files as it writes them; "auto_gptq" ends in an error that says why it cannot be used.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``GptqSettings``, or their names in AutoGPTQ: ``sym``, ``desc_act``,
            ``static_groups``, ``act_group_aware`` and ``mse``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range, the groups do not divide a layer, or there is
            a teacher and no held-out text.
        MissingExtraError: If the backend is a library that cannot be imported.
        FolderError: If the source is broken or quantized already, or computes values that are not
            finite.
        VocabularyError: If the teacher has another vocabulary.
        TextError: If there is no text to calibrate or to measure on.
    """
    settings = settings_from(GptqSettings, settings, translated(options))
    require_backend(backend, settings)
    target = refuse_existing(target, overwrite, [source])
    model = open_float(source)
    job = _open_job(model, texts, settings, begun_on(target))
    check = open_check(model.folder, held_out, teacher, skip_bad_rows=settings.skip_bad_rows)
    if backend == "gptqmodel":
        return by_gptqmodel(
            model,
            target,
            blocks=job.blocks,
            settings=settings,
            check=check,
            overwrite=overwrite,
            texts=job.texts,
        )
    return _run(job, target, check, overwrite)


def make_gptq(
    model: FloatModel,
    target: Path,
    *,
    texts: Texts,
    settings: GptqSettings,
    check: FidelityCheck | None,
    overwrite: bool,
    finish: Callable[[Path], None],
) -> Path:
    """Quantize an opened model by GPTQ, and let the caller add to the folder.

    Args:
        model: The float model.
        target: The folder to make.
        texts: Text to calibrate on.
        settings: How to quantize.
        check: Measures the result; None if nothing is to be measured.
        overwrite: Whether an existing target is replaced.
        finish: Called with the finished folder before it appears.

    Returns:
        The target.
    """
    return _run(
        _open_job(model, texts, settings, begun_on(target)), target, check, overwrite, finish
    )


def require_context(model: FloatModel, block_length: int) -> None:
    """Refuse blocks of text that are longer than a model can read.

    Args:
        model: The float model.
        block_length: Tokens per block.

    Raises:
        SettingsError: If they are too long.
    """
    longest = context_length(model.folder, model.config.to_dict())
    if block_length > longest:
        raise SettingsError(f"block_length {block_length} exceeds the model's {longest} positions")


def _open_job(model: FloatModel, texts: Texts, settings: GptqSettings, today: date) -> _Job:
    plan = make_plan(model, settings)
    require_context(model, settings.block_length)
    check_texts(texts, skip_bad_rows=settings.skip_bad_rows)
    require_finite_weights(model.folder)
    blocks = draw_blocks(texts, model.folder, settings, today=today)
    dated = load_vocabulary(model.folder, today=today).date_key
    return _Job(model, plan, settings, sources_of(texts), blocks, dated)


def _run(
    job: _Job,
    target: Path,
    check: FidelityCheck | None,
    overwrite: bool,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Quantize a model, or finish what an interrupted run left."""
    key = {
        "step": "gptq",
        "source": fingerprint(job.model.folder),
        "settings": result_settings(job.settings),
        "texts": job.blocks.digest,
        "versions": installed_versions(),
        **job.dated,
    }
    with working(target, key, anew=overwrite) as work, torch.inference_mode():
        started = time.perf_counter()
        parts = PartStore(work)
        names = _Quantizer(job.model, job.plan, job.settings, parts).finish(job.blocks)
        result = work / "result"
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        _assemble(result, job, parts, names, check, started)
        if finish is not None:
            finish(result)
        publish(work, target, overwrite)
    return target


class _Quantizer:
    """Quantizes the parts of a model in order: embedding, layers, and norm and head."""

    def __init__(
        self, model: FloatModel, plan: Plan, settings: GptqSettings, parts: PartStore
    ) -> None:
        self._model, self._plan, self._settings, self._parts = model, plan, settings, parts
        self._layers = LayeredModel(model.folder)
        self._names = [
            "embedding",
            *(f"{index:05}" for index in range(len(self._layers))),
            "head",
        ]

    def finish(self, blocks: TokenBlocks) -> list[str]:
        """Quantize the parts that are not finished yet; the names of all parts."""
        done = self._parts.finished(self._names)
        total = len(self._plan.matrices)
        before = sum(len(self._parts.facts(name)[0]) for name in self._names[:done])
        if done:
            _log.info("resuming after %d of %d parts", done, len(self._names))
        with track("Quantizing", total=total, unit="matrices", done=before) as progress:
            if done == 0:
                self._parts.put("embedding", self._embedding(progress))
                done = 1
            if done < len(self._names):
                batches, floats = self._start(blocks, done - 1)
                for index in range(done - 1, len(self._layers)):
                    part = self._layer(index, batches, floats, progress)
                    self._parts.put_hidden(index + 1, batches, floats)
                    self._parts.put(self._names[index + 1], part)
                    self._parts.drop_hidden(before=index + 1)
                self._parts.put("head", self._head(batches, progress))
        return self._names

    def _start(self, blocks: TokenBlocks, layers: int) -> tuple[list[Batch], list[Batch]]:
        """The text before the first unfinished layer, through quantized layers and float ones."""
        change, form = None, self._plan.embedding
        if form is not None and self._plan.head_table != EMBEDDING:
            change = rounded_rows(self._settings, form)
        batches = self._layers.batches(blocks, change)
        floats = self._layers.batches(blocks) if self._settings.method == "gptaq" else []
        if layers:
            self._parts.get_hidden(layers, batches, floats)
        return batches, floats

    def _embedding(self, progress: Tracker) -> Part:
        part = Part()
        if self._plan.head_table == EMBEDDING:
            return part  # it is the head as well, and done with it
        table = read_table(self._model, EMBEDDING)
        if self._plan.embedding is None:
            part.keep(f"{EMBEDDING}.weight", table)
            return part
        started = time.perf_counter()
        weight = round_table(table, self._settings, self._plan.embedding)
        seconds = time.perf_counter() - started
        part.add(
            packed_tensors(EMBEDDING, weight, self._plan.layout.checkpoint_format),
            report_of(EMBEDDING, weight, seconds),
        )
        progress.advance(1, EMBEDDING)
        return part

    def _layer(
        self, index: int, batches: list[Batch], floats: list[Batch], progress: Tracker
    ) -> Part:
        part = Part()

        def store(module: str, result: GptqResult, seconds: float) -> None:
            self._add_matrix(part, module, result, seconds, progress)

        with self._layers.layer(index) as layer:
            quantize_layer(layer, index, batches, self._settings, store, floats)
        for name, tensor in layer_rest(self._model, index, self._settings).items():
            part.keep(name, tensor)
        return part

    def _head(self, batches: Sequence[Batch], progress: Tracker) -> Part:
        part = Part()
        for name, tensor in read_tensors(self._model.folder, "model.norm.").items():
            part.keep(f"model.norm.{name}", tensor)
        table_name = self._plan.head_table
        if table_name is None:  # the embedding stays float, and is the head
            return part
        table = read_table(self._model, table_name)
        if self._plan.head is None:
            part.keep(f"{table_name}.weight", table)
            return part
        norm = self._layers.final_norm()
        inputs = kept_rows([norm(batch.hidden) for batch in batches], batches)
        own = self._settings.with_format(self._plan.head)
        result, seconds = quantize_head(table, inputs, own)
        self._add_matrix(part, table_name, result, seconds, progress)
        return part

    def _add_matrix(
        self, part: Part, module: str, result: GptqResult, seconds: float, progress: Tracker
    ) -> None:
        if result.dead_columns:
            _log.info(
                "%s has %d inputs that are always zero",
                module,
                result.dead_columns,
            )
        part.add(
            packed_tensors(module, result.weight, self._plan.layout.checkpoint_format),
            report_of(module, result.weight, seconds, result),
        )
        progress.advance(1, module.removeprefix("model.layers."))


def _assemble(
    result: Path,
    job: _Job,
    parts: PartStore,
    names: Sequence[str],
    check: FidelityCheck | None,
    started: float,
) -> None:
    """Write the files of the target."""
    model, settings = job.model, job.settings
    reports, float_names = [], []
    with TensorWriter(result) as writer:
        for name in names:
            parts.copy_to(writer, name)
            part_reports, part_float_names = parts.facts(name)
            reports += part_reports
            float_names += part_float_names
    write_config(
        model.folder,
        result,
        job.plan.layout,
        damp_percent=settings.damp_percent,
        true_sequential=settings.true_sequential,
        static_groups=settings.order == "static",
        act_group_aware=settings.order == "group",
    )
    if settings.model_file_base_name is not None:
        name_as_auto_gptq(result, settings.model_file_base_name)
    copy_companions(model.folder, result)
    write_records(
        result,
        model,
        reports,
        float_names,
        step="gptq",
        settings=settings,
        started=started,
        check=check,
        texts=job.texts,
        calibration={
            "blocks": len(job.blocks),
            "block_length": job.blocks.block_length,
            "tokens": job.blocks.tokens,
        },
    )
