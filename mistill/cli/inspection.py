"""What a folder is, how it was made, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistill.cli.measured import measured_table, read_measured
from mistill.cli.onnx_report import graph_facts, manifest_facts
from mistill.cost_model.onnx_lint import Lint, lint_file
from mistill.errors import FolderError, MissingExtraError, MistillError
from mistill.folders.folder import (
    FIDELITY_FILE,
    MANIFEST_FILE,
    FolderInfo,
    describe,
    problems,
    read_json,
)
from mistill.folders.lineage import LINEAGE_FILE, fingerprint, read_lineage
from mistill.folders.location import Location, is_remote, location_of
from mistill.folders.targets_folder import (
    TargetsInfo,
    describe_targets,
    is_targets,
    targets_problems,
)
from mistill.text.vocabulary import load_vocabulary
from mistill.weights.gptq_doctor import Diagnosis, examine

if TYPE_CHECKING:
    from rich.console import RenderableType

_FORMS = {
    "model": "float model folder",
    "gptq": "GPTQ folder",
    "nf4": "NF4 folder",
    "onnx": "ONNX folder",
}


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found in a folder.

    Attributes:
        path: The folder.
        info: What it holds, or None if it is too broken to say.
        problems: What keeps it from being used, in words.
        notes: What works but should be known.
        lineage: The steps that led to it.
        fingerprint: A short name for its content.
        targets: What a folder of targets holds; None for a model.
        fidelity: The fidelity card of a distilled student; None where there is none.
        gptq: What the codes of a GPTQ folder are, told from the codes; None for other forms.
        measured: How close a quantized folder is to its source, and to a teacher; None where it
            was not measured.
        graphs: What was found in each ONNX graph, by its file; empty where there is none.
        manifest: What an ONNX folder says of itself, but for its checksums; None for others.
    """

    path: Path | str
    info: FolderInfo | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    lineage: tuple[dict[str, Any], ...]
    fingerprint: str
    targets: TargetsInfo | None = None
    fidelity: dict[str, Any] | None = None
    gptq: Diagnosis | None = None
    measured: dict[str, Any] | None = None
    graphs: Mapping[str, Lint] = field(default_factory=dict)
    manifest: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON values.

        Returns:
            One entry per field; sizes in bytes.
        """
        info = None
        if self.info is not None:
            info = {
                "form": self.info.form,
                "architecture": self.info.architecture,
                "vocabulary_size": self.info.vocabulary_size,
                "layers": self.info.layers,
                "hidden_size": self.info.hidden_size,
                "parameters": self.info.parameters,
                "weight_bytes": self.info.weight_bytes,
                "size_bytes": self.info.size_bytes,
                "bits_per_weight": self.info.bits_per_weight,
                "context_length": self.info.context_length,
                "quantization": self.info.quantization,
            }
        return {
            "path": str(self.path),
            "info": info,
            "targets": None if self.targets is None else self.targets.to_dict(),
            "fidelity": self.fidelity,
            "gptq": None if self.gptq is None else self.gptq.to_dict(),
            "measured": self.measured,
            "graphs": {name: lint.to_dict() for name, lint in self.graphs.items()},
            "manifest": self.manifest,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "lineage": list(self.lineage),
            "fingerprint": self.fingerprint,
        }

    def panel(self) -> RenderableType:
        """The finding for people.

        Returns:
            Something that rich prints.
        """
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[RenderableType] = []
        if self.info is not None:
            parts.append(_facts(self.info, self.fingerprint))
        if self.gptq is not None:
            parts.append(_gptq_facts(self.gptq))
        parts.extend(graph_facts(name, lint) for name, lint in self.graphs.items())
        if self.manifest is not None:
            parts.append(manifest_facts(self.manifest))
        if self.targets is not None:
            parts.append(_targets_facts(self.targets, self.fingerprint))
        if self.fidelity is not None:
            parts.append(_fidelity(self.fidelity))
        if self.measured is not None:
            parts.append(measured_table(self.measured))
        if self.lineage:
            table = Table("step", "from", "settings and facts", "date", title="how it was made")
            for entry in self.lineage:
                table.add_row(
                    str(entry.get("step")),
                    Path(str(entry.get("source") or "")).name,
                    Text(_words(entry)),
                    str(entry.get("date", ""))[:16].replace("T", " "),
                )
            parts.append(table)
        parts.extend(Text(f"! {problem}", style="bold red") for problem in self.problems)
        slow = [str(finding) for lint in self.graphs.values() for finding in lint.findings]
        parts.extend(Text(f"- {note}", style="yellow") for note in (*self.notes, *slow))
        if not self.problems:
            parts.append(Text("nothing is wrong with it", style="green"))
        return Group(*parts)


def inspect_folder(path: str | Path) -> Inspection:
    """FigurePair at a folder without loading its weights.

    Graphs of an ONNX folder, whoever made it, are held against the rules of what is slow on a CPU.
    Of a GPTQ folder zeros, scales and some codes are read, to tell what they are from themselves.
    Of targets every byte is read and compared with the checksums of the manifest.

    Args:
        path: Any folder of the road.

    Returns:
        What was found; problems do not raise.

    Raises:
        FolderError: If there is no such folder.
    """
    folder = Path(path).expanduser()
    if is_remote(path) or is_targets(location_of(path)):
        return _inspect_targets(location_of(path))
    if not folder.is_dir():
        raise FolderError(f"{path} is not a folder; give the folder of a model")
    wrong = problems(folder)
    info = None
    lineage: tuple[dict[str, Any], ...] = ()
    try:
        lineage = tuple(read_lineage(folder))
    except FolderError as error:
        wrong.append(str(error))
    fidelity = measured = None
    try:
        if (folder / FIDELITY_FILE).is_file():
            fidelity = read_json(folder / FIDELITY_FILE)
        measured = read_measured(folder)
    except FolderError as error:
        wrong.append(str(error))
    gptq = None
    if not wrong:
        info = describe(folder)
        if info.form == "gptq":
            try:
                gptq = examine(folder)
                wrong += gptq.contradictions
            except FolderError as error:
                wrong.append(str(error))
    graphs, remarks = _lint_graphs(folder)
    manifest = None
    if info is not None and info.form == "onnx":
        manifest = read_json(folder / MANIFEST_FILE)
        manifest.pop("files", None)
    return Inspection(
        path=folder,
        info=info,
        problems=tuple(wrong),
        notes=(
            *(() if info is None else _notes(folder, lineage)),
            *(() if gptq is None else gptq.notes),
            *remarks,
        ),
        lineage=lineage,
        fingerprint=fingerprint(folder),
        fidelity=fidelity,
        gptq=gptq,
        measured=measured,
        graphs=graphs,
        manifest=manifest,
    )


def _lint_graphs(folder: Path) -> tuple[dict[str, Lint], list[str]]:
    """What is slow in each graph, and which graphs could not be read."""
    found, remarks = {}, []
    for file in sorted((*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx"))):
        name = str(file.relative_to(folder))
        try:
            found[name] = lint_file(file)
        except MissingExtraError as error:
            return {}, [f"its graph was not looked at: {error}"]
        except Exception as error:  # a file of another tool may be anything
            remarks.append(
                f"{name} cannot be read as a graph: {' '.join(str(error).split())[:120]}"
            )
    return found, remarks


def _inspect_targets(location: Location) -> Inspection:
    wrong = targets_problems(location)
    lineage: tuple[dict[str, Any], ...] = ()
    if location.exists(LINEAGE_FILE):
        try:
            lineage = tuple(json.loads(location.read(LINEAGE_FILE)))
        except ValueError as error:
            wrong.append(f"{LINEAGE_FILE} is not valid JSON: {error}")
    manifest = location.read(MANIFEST_FILE) if location.exists(MANIFEST_FILE) else b""
    return Inspection(
        path=location.path,
        info=None,
        problems=tuple(wrong),
        notes=(),
        lineage=lineage,
        fingerprint=hashlib.sha256(manifest).hexdigest(),
        targets=None if wrong else describe_targets(location),
    )


def _notes(folder: Path, lineage: tuple[dict[str, Any], ...]) -> list[str]:
    found = []
    try:
        vocabulary = load_vocabulary(folder)
    except MistillError as error:
        return [str(error)]
    if not vocabulary.end_ids:
        found.append("it names no end-of-turn token, so that a chatbot would never stop")
    if vocabulary.chat_template is None:
        found.append("it has no chat template: good for text, not for chat")
    if not lineage:
        found.append("it has no lineage: mistill did not make it")
    return found


def _facts(info: FolderInfo, name: str) -> RenderableType:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    quantization = info.quantization or {}
    rows = {
        "what": f"{_FORMS[info.form]}, {info.architecture}, {info.layers} layers of width "
        f"{info.hidden_size}",
        "parameters": f"{info.parameters / 1e6:,.1f} M",
        "weights": f"{info.weight_bytes / 1e6:,.1f} MB, {info.bits_per_weight:.2f} bits a weight",
        "all files": f"{info.size_bytes / 1e6:,.1f} MB",
        "vocabulary": f"{info.vocabulary_size:,} tokens",
        "context": f"{info.context_length:,} positions",
        "fingerprint": name[:16],
    }
    if quantization:
        shown = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")
        words = [f"{key} {quantization[key]}" for key in shown if key in quantization]
        rows["quantized as"] = ", ".join([str(quantization.get("quant_method")), *words])
    for key, value in rows.items():
        table.add_row(f"[bold]{key}[/bold]", value)
    return table


def _gptq_facts(found: Diagnosis) -> RenderableType:
    """What the codes told of themselves."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    widths = ", ".join(f"{bits} bits in {count} matrices" for bits, count in found.bits.items())
    kind = "symmetric" if found.symmetric else "asymmetric"
    order = {"plain": "in order", "mixed": "mixed by activation order"}[found.order]
    index = "" if found.index else ", no g_idx"
    rows = {
        "codes": widths or "none",
        "zeros": f"{kind}, {found.checkpoint_format or 'format cannot be told'}: {found.evidence}",
        "groups": f"{order}{index}",
        "scales": ", ".join(f"{kind} in {count}" for kind, count in found.scale_types.items()),
    }
    for key, value in rows.items():
        table.add_row(f"[bold]{key}[/bold]", value)
    return table


def _targets_facts(info: TargetsInfo, name: str) -> RenderableType:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    settings, teacher = info.settings, info.teacher
    method = settings["method"]
    how = f"the {settings['top_k']} most probable tokens"
    if method != "top_k":
        how = f"{settings['draws']} {method} draws"
    stored = f"{info.stored_tokens / info.positions:.2f} different tokens"
    nats = "" if info.mean_entropy is None else f", entropy {info.mean_entropy:.3f} nats"
    rows = {
        "what": f"targets from {teacher['name']} ({teacher['form']}, {teacher['dtype']})",
        "text": f"{info.tokens:,} tokens in {info.pieces:,} pieces of at most "
        f"{settings['block_length']}, {info.positions:,} positions that count",
        "of each": f"{how} at temperature {settings['temperature']:g}",
        "on average": f"{stored} a position{nats}",
        "all files": f"{info.size_bytes / 1e6:,.2f} MB, {info.bytes_per_position:.2f} bytes a "
        f"position, in {info.shards} {settings['codec']} shards",
        "vocabulary": f"{info.vocabulary_size:,} tokens",
        "fingerprint": name[:16],
    }
    for key, value in rows.items():
        table.add_row(f"[bold]{key}[/bold]", value)
    return table


def _fidelity(card: Mapping[str, Any]) -> RenderableType:
    """The fidelity card as a table: how close to its teacher, and to what its text alone taught."""
    from rich.table import Table

    students = [("as it came", {"held_out": card["before"]}), ("distilled", card["student"])]
    students += [
        (words, card[name])
        for name, words in (
            ("twin_of_equal_tokens", "from text alone, equal tokens"),
            ("twin_of_equal_time", "from text alone, equal time"),
        )
        if card.get(name)
    ]
    table = Table(title="how faithful it is, on held-out text")
    table.add_column("student")
    for heading in ("tokens", *_CARD):
        table.add_column(heading, justify="right")
    for words, student in students:
        found = student["held_out"]
        cells = [
            "-" if found.get(name) is None else format(found[name], how)
            for name, how in _CARD.values()
        ]
        table.add_row(words, f"{student.get('tokens', 0):,}", *cells)
    return table


_CARD = {
    "KL": ("kl", ".4f"),
    "99%": ("kl_p99", ".2f"),
    "agreement": ("agreement", ".1%"),
    "accepted": ("acceptance", ".1%"),
    "perplexity": ("perplexity", ".2f"),
    "calibration error": ("calibration_error", ".3f"),
}


def _words(entry: Mapping[str, Any]) -> str:
    """Settings and facts of a step in a few words."""
    known = ("step", "settings", "source", "source_fingerprint", "versions", "date")
    pairs = dict(entry.get("settings") or {})
    pairs |= {key: value for key, value in entry.items() if key not in known}
    shown = []
    for key, value in pairs.items():
        if value is None or value == [] or isinstance(value, dict):
            continue
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        shown.append(f"{key} {text if len(text) <= 60 else text[:57] + '...'}")
    return ", ".join(shown)
