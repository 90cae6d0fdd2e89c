"""Try a named set of ways to quantize a model, and say what each costs in KL and in bytes.

Every variant is made by the step that its command would run, so that what was measured is what the
command makes, and stays in a folder of its own; a tuned one is made of another one's folder. All
are calibrated on the same blocks and measured on the same held-out ones, a layer at a time. GPTQ
looks at each layer through the quantized layers before it; so Hessians are a variant's own and are
not shared.
"""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import msgspec

from mistill.errors import (
    ArchitectureError,
    FolderError,
    SettingsError,
    TargetExistsError,
    TextError,
    TrainingError,
)
from mistill.folders.folder import describe, read_json
from mistill.folders.lineage import fingerprint, installed_versions
from mistill.folders.publishing import day_of, refuse_existing, write_json
from mistill.folders.renaming import remove_finished_work, remove_leftovers
from mistill.measures.kl import Predictions
from mistill.progress import track
from mistill.settings import require, result_settings, settings_dict, settings_from
from mistill.shown import visible
from mistill.text.blocks import TokenBlocks
from mistill.text.rows import Texts, check_texts, sources_of
from mistill.text.vocabulary import load_vocabulary
from quantize.calibration_text import draw_blocks
from quantize.folders.float_model import open_float
from quantize.folders.gptq_folder import to_gptq
from quantize.folders.rounding_folder import to_rounding
from quantize.measuring.fidelity import measure, open_teacher, predictions
from quantize.mixed.mixed_folder import to_mixed, uniform_bytes
from quantize.nf4.nf4_folder import to_nf4
from quantize.scales.tuned_folder import tune
from quantize.settings import NAMES, GptqSettings, SweepSettings, Variant

if TYPE_CHECKING:
    from rich.table import Table

    from quantize.options import SweepOptions

SWEEP_FILE = "sweep.json"

# Groups whose bytes a mix may have.
_MIXED_LIKE = 64


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """What one variant costs.

    Attributes:
        name: Of the variant, and of its folder.
        command: What makes the same folder.
        weight_bytes: Bytes of its weights, everything counted.
        bits_per_weight: The same for each weight of the model.
        kl: Mean KL(source || variant) per held-out token, in nats.
        kl_standard_error: Of that mean, taken between blocks.
        kl_p99: The divergence that one token in a hundred exceeds.
        agreement: Share of tokens where both would write the same.
        perplexity: On the held-out text.
        teacher_kl: Mean KL(teacher || variant); None without a teacher.
        dominated_by: A variant of no more bytes and a lower KL, or of fewer bytes and no higher
            KL; None if there is none.
    """

    name: str
    command: str
    weight_bytes: int
    bits_per_weight: float
    kl: float
    kl_standard_error: float | None
    kl_p99: float
    agreement: float
    perplexity: float
    teacher_kl: float | None = None
    dominated_by: str | None = None


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """All variants of a sweep.

    Attributes:
        folder: Where their folders are.
        rows: What each costs, from few bytes to many.
        skipped: Why variants were left out, by name.
        tokens: Held-out tokens that were measured on.
        source_perplexity: Of the float model on them.
        source_bytes: Bytes of its weights.
    """

    folder: Path
    rows: tuple[SweepRow, ...]
    skipped: dict[str, str]
    tokens: int
    source_perplexity: float
    source_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values.

        Returns:
            What ``sweep.json`` holds.
        """
        return {**asdict(self), "folder": str(self.folder)}


def sweep(
    source: str | Path,
    target: str | Path,
    *,
    texts: Texts,
    held_out: Texts,
    teacher: str | Path | None = None,
    settings: SweepSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[SweepOptions],
) -> SweepReport:
    """Quantize a model in many ways, and measure each on held-out text.

    ``target`` becomes a folder of folders, with ``sweep.json``. The same call resumes after an
    interruption: variants that are there and measured are left alone.

    Args:
        source: A float model folder.
        target: Where the variants go.
        texts: Text to calibrate on.
        held_out: Text to measure on, which the calibration has not seen.
        teacher: A model with the same vocabulary, to whose predictions the variants are compared
            too.
        settings: What to try; or give its fields as options.
        overwrite: Whether another sweep's folder is replaced.
        **options: Fields of ``SweepSettings``.

    Returns:
        What each variant costs.

    Raises:
        SettingsError: If no variant fits the model.
        TargetExistsError: If the target holds something else.
        TextError: If there is no text.
        VocabularyError: If the teacher has another vocabulary.
    """
    settings = settings_from(SweepSettings, settings, options)
    model = open_float(source)
    for each in (texts, held_out):
        check_texts(each, skip_bad_rows=settings.skip_bad_rows)
    folder = Path(target).expanduser().absolute()
    drawing = GptqSettings(
        samples=settings.held_out_samples,
        block_length=settings.block_length,
        seed=settings.seed,
        skip_bad_rows=settings.skip_bad_rows,
    )
    today = _begun_on(folder)
    blocks = draw_blocks(held_out, model.folder, drawing, today=today)
    calibration = draw_blocks(
        texts, model.folder, replace(drawing, samples=settings.samples), today=today
    )
    teacher_folder = None if teacher is None else open_teacher(teacher, model.folder).path
    key = {
        "source": fingerprint(model.folder),
        "teacher": None if teacher_folder is None else fingerprint(teacher_folder),
        "texts": [calibration.digest, blocks.digest],
        "settings": result_settings(replace(settings, variants=())),
        "versions": installed_versions(),
        **load_vocabulary(model.folder, today=today).date_key,
    }
    others = [] if teacher_folder is None else [teacher_folder]
    state = _begin(folder, key, overwrite, [source, model.folder, *others])
    references = {"source": predictions(model.folder, blocks)}
    if teacher_folder is not None:
        references["teacher"] = predictions(teacher_folder, blocks)
    skipped: dict[str, str] = {}
    variants = settings.chosen()
    with track("Sweeping", total=len(variants), unit="variants") as progress:
        for variant in variants:
            try:
                exists = (folder / variant.name).is_dir()
                if variant.name not in state["rows"] or not exists:
                    inputs = _Inputs(source, teacher or source, folder, texts)
                    row = _make(variant, inputs, settings, references, blocks)
                    state["rows"][variant.name] = row
                    _write(folder, state)
            except (ArchitectureError, SettingsError, TextError, TrainingError) as error:
                skipped[variant.name] = str(error)
            progress.advance(1, variant.name)
    rows = [SweepRow(**state["rows"][v.name]) for v in variants if v.name in state["rows"]]
    if not rows:
        shutil.rmtree(folder)
        raise SettingsError(f"no variant fits {source}: {next(iter(skipped.values()))}")
    itself = measure(model.folder, {"source": references["source"]}, blocks)["source"]
    report = SweepReport(
        folder=folder,
        rows=tuple(sorted(mark_dominated(rows), key=lambda row: (row.weight_bytes, row.kl))),
        skipped=skipped,
        tokens=itself.tokens,
        source_perplexity=itself.perplexity,
        source_bytes=describe(model.folder).weight_bytes,
    )
    _write(folder, {**state, "report": report.to_dict()})
    return report


def mark_dominated(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Name for every variant another one that dominates it.

    Args:
        rows: What variants cost.

    Returns:
        The same, with ``dominated_by`` set: to the one of lowest KL, if there are several.
    """
    marked = []
    for row in rows:
        better = [
            other
            for other in rows
            if (other.weight_bytes <= row.weight_bytes and other.kl < row.kl)
            or (other.weight_bytes < row.weight_bytes and other.kl <= row.kl)
        ]
        best = min(better, key=lambda other: other.kl, default=None)
        marked.append(replace(row, dominated_by=None if best is None else best.name))
    return marked


def _begun_on(folder: Path) -> date:
    """The day on which a sweep was begun, or today."""
    file = folder / SWEEP_FILE
    key = read_json(file).get("key") if file.is_file() else None
    return day_of(key.get("date") if isinstance(key, dict) else None)


def _begin(
    folder: Path, key: dict[str, Any], overwrite: bool, sources: Sequence[str | Path]
) -> dict[str, Any]:
    """Start a sweep, or resume one that was interrupted."""
    file = folder / SWEEP_FILE
    if folder.exists():
        state = _read_state(file) if file.is_file() else {}
        if state.get("key") == key:
            return state
        if not state:
            # Not even overwrite may delete a folder of unknown contents.
            raise TargetExistsError(
                f"{folder} exists already and holds no sweep; choose another name"
            )
        if not overwrite:
            raise TargetExistsError(
                f"{folder} exists already and holds another sweep; choose another name or "
                "overwrite it"
            )
        for name in NAMES:
            remove_leftovers(folder / name)
            remove_finished_work(folder / name)
        refuse_existing(folder, overwrite, sources)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    state = {"key": key, "rows": {}}
    _write(folder, state)
    return state


def _read_state(file: Path) -> dict[str, Any]:
    """What a sweep has measured so far; anybody may have changed the file."""
    state = read_json(file)
    if not isinstance(state.get("key"), dict) or not isinstance(state.get("rows"), dict):
        raise FolderError(f"{file} is damaged: it should hold a key and rows; remove the folder")
    for name, row in state["rows"].items():
        try:
            typed = msgspec.convert(row, SweepRow)
        except msgspec.ValidationError as error:
            raise FolderError(
                f"{file} is damaged: the row {visible(name)} is no result of a sweep "
                f"({visible(str(error))}); remove the folder"
            ) from error
        figures = [value for value in vars(typed).values() if isinstance(value, float)]
        if typed.name != name or name not in NAMES or not all(map(math.isfinite, figures)):
            raise FolderError(
                f"{file} is damaged: the row {visible(name)} is no result of a sweep; remove the "
                "folder"
            )
    return state


def _write(folder: Path, state: Mapping[str, Any]) -> None:
    write_json(folder / SWEEP_FILE, state, indent=1)


@dataclass(frozen=True)
class _Inputs:
    """What variants are made of.

    Attributes:
        source: The float model.
        teacher: The model that scales learn from.
        folder: Where the variants go.
        texts: Text to calibrate on and to learn from.
    """

    source: str | Path
    teacher: str | Path
    folder: Path
    texts: Texts


def _make(
    variant: Variant,
    inputs: _Inputs,
    settings: SweepSettings,
    references: Mapping[str, Predictions],
    blocks: TokenBlocks,
) -> dict[str, Any]:
    """Quantize a variant unless its folder exists, and measure it."""
    options = dict(variant.options)
    source, target = inputs.source, inputs.folder / variant.name
    if variant.of is not None:
        source = inputs.folder / variant.of
        require(source.is_dir(), f"there is no {variant.of} to make it of")
    read: set[str] = set()
    if variant.step == "mixed":
        options["size_mb"] = uniform_bytes(open_float(source), _MIXED_LIKE) / 1e6
    if variant.step in ("gptq", "mixed"):
        read = {"samples", "block_length", "seed"}
    if variant.step == "tune":
        read = {"block_length", "seed"}
        options["teacher"] = str(inputs.teacher)
    if read:
        options |= {k: v for k, v in settings_dict(settings).items() if k in read}
        options |= {"skip_bad_rows": True} if settings.skip_bad_rows else {}
    if variant.step == "tune":
        # Other blocks than those that the codes were calibrated on, as far as the text goes.
        options["seed"] = settings.seed + 1
    if not target.exists():
        steps: dict[str, Callable[..., Path]] = {
            "gptq": to_gptq,
            "mixed": to_mixed,
            "nf4": to_nf4,
            "rounding": to_rounding,
            "tune": tune,
        }
        arguments = {"texts": inputs.texts, **options} if read else options
        steps[variant.step](source, target, **arguments)
    info = describe(target)
    fidelity = measure(target, references, blocks)
    source_fidelity, teacher = fidelity["source"], fidelity.get("teacher")
    row = SweepRow(
        name=variant.name,
        command=_command(variant.step, source, target, inputs.texts if read else None, options),
        weight_bytes=info.weight_bytes,
        bits_per_weight=info.bits_per_weight,
        kl=source_fidelity.kl,
        kl_standard_error=source_fidelity.kl_standard_error,
        kl_p99=source_fidelity.kl_p99,
        agreement=source_fidelity.agreement,
        perplexity=source_fidelity.perplexity,
        teacher_kl=None if teacher is None else teacher.kl,
    )
    return asdict(row)


def _command(
    step: str, source: str | Path, target: Path, texts: Texts | None, options: Mapping[str, Any]
) -> str:
    """The command that makes the same folder."""
    words = ["mistill", "quantize", step, str(source), str(target)]
    for name in [] if texts is None else sources_of(texts):
        words += ["--texts", name]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return shlex.join(words)


# --- as a table -----------------------------------------------------------------------------------


def sweep_table(report: SweepReport) -> Table:
    """Draw a sweep as a table: the size of each variant, and what it costs.

    Args:
        report: What was measured.

    Returns:
        A table, a line for each variant.
    """
    from rich.table import Table

    has_teacher = any(row.teacher_kl is not None for row in report.rows)
    table = Table(
        title=f"{report.folder.name}: {report.tokens:,} held-out tokens, the float model has "
        f"{report.source_bytes / 1e6:.1f} MB and perplexity {report.source_perplexity:.2f}",
        caption="variants in grey are no better than another of as few bytes",
    )
    table.add_column("variant")
    for name in (
        "MB",
        "bits a weight",
        "KL to source",
        *(["KL to teacher"] if has_teacher else []),
    ):
        table.add_column(name, justify="right")
    for name in ("perplexity", "same token"):
        table.add_column(name, justify="right")
    table.add_column("beaten by")
    for row in report.rows:
        error = row.kl_standard_error
        cells = [
            row.name,
            f"{row.weight_bytes / 1e6:.1f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.kl:.4f}" + ("" if error is None else f" \u00b1 {error:.4f}"),
            *([f"{row.teacher_kl:.4f}"] if row.teacher_kl is not None else []),
            f"{row.perplexity:.2f}",
            f"{row.agreement:.1%}",
            row.dominated_by or "",
        ]
        table.add_row(*cells, style="dim" if row.dominated_by else "")
    return table


def sweep_notes(report: SweepReport) -> str:
    """The commands that make the variants worth having, and why others were left out.

    Args:
        report: What was measured.

    Returns:
        A line for each of them.
    """
    worth = [f"{row.name}: {row.command}" for row in report.rows if row.dominated_by is None]
    return "\n".join(
        [*worth, *(f"{name} was left out: {reason}" for name, reason in report.skipped.items())]
    )
