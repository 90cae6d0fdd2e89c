"""What has been found about a model, as a report keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.figures.footprint import Footprint, StepBytes
from benchmarks.figures.latency import Latency
from benchmarks.figures.model_result import ModelResult
from benchmarks.figures.perplexity import Perplexity
from benchmarks.measure.lengths import latencies
from benchmarks.measure.subjects import Subject
from benchmarks.settings import BenchSettings
from mistill.cost_model.onnx_cost import memory_speed, product_weights
from mistill.cost_model.products import kernel_speed
from mistill.folders.folder import MANIFEST_FILE, FolderInfo, read_json
from mistill.folders.lineage import fingerprint, read_lineage


def recorded(
    subject: Subject,
    judge: Subject,
    passage_bytes: tuple[int, ...],
    settings: BenchSettings,
    threads: int,
) -> ModelResult:
    """Put together what a report keeps of a model.

    Args:
        subject: The model, measured.
        judge: The reference.
        passage_bytes: Bytes of text that the predicted tokens of each passage spell.
        settings: What was asked for.
        threads: Threads that it computed with.

    Returns:
        The record; no place on this machine is named in it.
    """
    info, answers, entry = subject.info, subject.answers, subject.entry
    turns = subject.transformers_turns
    parent = subject.parent
    lineage = tuple(map(_without_places, read_lineage(info.path)))
    if entry is not None:
        lineage = (*lineage, {"step": entry.rival.name, "settings": entry.rival.settings})
    return ModelResult(
        name=subject.name,
        form=info.form if entry is None else entry.rival.engine,
        architecture=info.architecture,
        layers=info.layers,
        hidden_size=info.hidden_size,
        lineage=lineage,
        fingerprint=fingerprint(info.path),
        footprint=Footprint(
            parameters=info.parameters,
            weight_bytes=info.weight_bytes if entry is None else entry.weight_bytes,
            folder_bytes=info.size_bytes if entry is None else entry.folder_bytes,
            load_seconds=short(answers["open"]["load_seconds"]),
            peak_memory_bytes=answers["memory"]["peak_bytes"],
            resident_memory_bytes=answers["memory"]["resident_bytes"],
        ),
        perplexity=Perplexity(losses=tuple(subject.losses), passage_bytes=passage_bytes),
        fidelity=None if subject is judge else subject.distances[judge.name].fidelity(),
        parent=None if parent is None else parent.name,
        parent_fidelity=None if parent is None else subject.distances[parent.name].fidelity(),
        latency=Latency(turns=tuple(subject.turns)),
        transformers_latency=Latency(turns=tuple(turns)) if turns else None,
        prompts=latencies(subject.at, settings.prompts),
        depths=latencies(subject.at, settings.depths),
        loads=tuple(subject.loads),
        step_bytes=None if entry is not None else step_bytes(info, threads),
        rival=None if entry is None else entry.rival,
        left_out=tuple(subject.left_out),
        quoted=tuple(subject.quoted),
        answers=subject.questioned,
    )


def short(value: float) -> float:
    """Six significant digits: more than any of these measurements holds, and a smaller file.

    Args:
        value: A measurement.

    Returns:
        The same, rounded.
    """
    return float(f"{value:.6g}")


def file_name(value: Any) -> Any:
    """Leave out the place on this machine that a value may name.

    Args:
        value: Any value of a record.

    Returns:
        The file name of an absolute path; anything else as it is, paths as text.
    """
    if isinstance(value, str | Path):
        return Path(value).name if Path(value).is_absolute() else str(value)
    return value


def _without_places(value: Any) -> Any:
    """A step of the lineage, without the places on this machine that it names."""
    if isinstance(value, Mapping):
        return {str(name): _without_places(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(item) for item in value]
    return file_name(value)


def step_bytes(info: FolderInfo, threads: int) -> StepBytes | None:
    """What a step reads and multiplies, by the manifest of an ONNX folder.

    Args:
        info: The folder.
        threads: Threads that would compute.

    Returns:
        The bytes, and what memory and kernels give here; None where there is no manifest.
    """
    file = info.path / MANIFEST_FILE
    manifest = read_json(file) if info.form == "onnx" and file.is_file() else {}
    if "packed_bytes_per_token" not in manifest:
        return None
    return StepBytes(
        weight_bytes=manifest["bytes_per_token"],
        packed_bytes=manifest["packed_bytes_per_token"],
        cache_bytes_per_position=manifest["cache_bytes_per_position"],
        memory_bytes_per_second=short(memory_speed(threads)),
        kernel_seconds=_kernel_seconds(info, threads),
    )


def _kernel_seconds(info: FolderInfo, threads: int) -> float | None:
    """What a step's integer products take out of a cache; None where nothing can read a graph."""
    try:
        import onnx_ir
    except ImportError:
        return None
    weights = product_weights(onnx_ir.load(info.path / "model.onnx").graph)
    return short(sum(count / kernel_speed(kernel, threads) for kernel, count in weights.items()))
