"""The result of one model, as a report records it."""

from __future__ import annotations

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
from mistill.folders.lineage import fingerprint, read_lineage, without_paths


def result_of(
    subject: Subject,
    reference: Subject,
    passage_bytes: tuple[int, ...],
    settings: BenchSettings,
    threads: int,
) -> ModelResult:
    """The result of one model, as a report records it.

    Args:
        subject: The model, measured.
        reference: The reference.
        passage_bytes: Bytes of text that the predicted tokens of each passage spell.
        settings: What was to be measured.
        threads: Threads that it computed with.

    Returns:
        The result; it contains no path of this machine.
    """
    info, answers, entry = subject.info, subject.answers, subject.entry
    # The limits of a step are known of our graphs on a processor.
    runs_here = entry is None and settings.provider == "cpu"
    turns = subject.transformers_turns
    parent = subject.parent
    lineage = tuple(map(without_paths, read_lineage(info.path)))
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
            load_seconds=rounded(answers["open"]["load_seconds"]),
            peak_memory_bytes=answers["memory"]["peak_bytes"],
            resident_memory_bytes=answers["memory"]["resident_bytes"],
        ),
        perplexity=Perplexity(losses=tuple(subject.losses), passage_bytes=passage_bytes),
        fidelity=None if subject is reference else subject.distances[reference.name].fidelity(),
        parent=None if parent is None else parent.name,
        parent_fidelity=None if parent is None else subject.distances[parent.name].fidelity(),
        latency=Latency(turns=tuple(subject.turns)),
        transformers_latency=Latency(turns=tuple(turns)) if turns else None,
        prompts=latencies(subject.turns_at_lengths, settings.prompts),
        depths=latencies(subject.turns_at_lengths, settings.depths),
        loads=tuple(subject.loads),
        step_bytes=step_bytes(info, threads) if runs_here else None,
        rival=None if entry is None else entry.rival,
        left_out=tuple(subject.left_out),
        quoted=tuple(subject.quoted),
        answers=subject.question_answers,
        replies=subject.replies,
    )


def rounded(value: float) -> float:
    """Round to six significant digits, more than any of these measurements has.

    Args:
        value: A measurement.

    Returns:
        The rounded value.
    """
    return float(f"{value:.6g}")


def step_bytes(info: FolderInfo, threads: int) -> StepBytes | None:
    """Bytes that a step reads, according to the manifest of an ONNX folder.

    Args:
        info: The folder.
        threads: Threads to compute with.

    Returns:
        The bytes, and the speed of memory and kernels here; None where there is no manifest.
    """
    file = info.path / MANIFEST_FILE
    manifest = read_json(file) if info.form == "onnx" and file.is_file() else {}
    if "packed_bytes_per_token" not in manifest:
        return None
    return StepBytes(
        weight_bytes=manifest["bytes_per_token"],
        packed_bytes=manifest["packed_bytes_per_token"],
        cache_bytes_per_position=manifest["cache_bytes_per_position"],
        memory_bytes_per_second=rounded(memory_speed(threads)),
        kernel_seconds=_kernel_seconds(info, threads),
    )


def _kernel_seconds(info: FolderInfo, threads: int) -> float | None:
    """Time of a step's integer products with cached weights; None without onnx_ir."""
    try:
        import onnx_ir
    except ImportError:
        return None
    weights = product_weights(onnx_ir.load(info.path / "model.onnx").graph)
    return rounded(sum(count / kernel_speed(kernel, threads) for kernel, count in weights.items()))
