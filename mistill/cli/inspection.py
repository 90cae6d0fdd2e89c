"""What a folder holds, how it was made, and what is wrong with it.

It is one file because each form of folder adds a few lines to what is read and to what is shown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistill.cli.fidelity import fidelity_table, read_fidelity
from mistill.cli.onnx_report import graph_facts, manifest_facts
from mistill.cli.reward_report import read_reward, reward_facts
from mistill.cost_model.onnx_lint import Lint, lint_file
from mistill.errors import FolderError, MissingExtraError, MistillError, TextError
from mistill.folders.folder import (
    FIDELITY_FILE,
    MANIFEST_FILE,
    FolderInfo,
    describe,
    problems,
    read_json,
)
from mistill.folders.json_text import parse_json
from mistill.folders.lineage import LINEAGE_FILE, checked_lineage, fingerprint, read_lineage
from mistill.folders.location import Location, is_remote, location_of
from mistill.folders.settled_config import contradictions
from mistill.folders.targets_folder import (
    TargetsInfo,
    describe_targets,
    is_targets,
    targets_problems,
)
from mistill.progress import track
from mistill.shown import facts_table, one_line, plain
from mistill.sources.source import resolve_model
from mistill.text.vocabulary import Vocabulary, load_vocabulary
from mistill.weights.gptq_doctor import Diagnosis, examine
from mistill.weights.nf4_doctor import nf4_problems

if TYPE_CHECKING:
    from rich.console import RenderableType

_FORMS = {
    "model": "float model folder",
    "gptq": "GPTQ folder",
    "nf4": "NF4 folder",
    "onnx": "ONNX folder",
}


_EVERY_BYTE = "every byte was compared with the checksums of manifest.json"
_LOOKED_AT = {
    "onnx": _EVERY_BYTE,
    "targets": _EVERY_BYTE,
    "gptq": "looked at: the small files, names, types and sizes of all tensors, scales, zero "
    "points and some codes; not looked at: the other codes, of which this form has no checksums",
    "model": "looked at: the small files, names, types and sizes of all tensors; not looked at: "
    "the weights, of which this form has no checksums",
    "nf4": "looked at: the small files, names, types and sizes of all tensors; not looked at: "
    "the weights, of which this form has no checksums",
}
_NOTHING = "because of the problems, not everything was looked at"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A folder as ``mistill inspect`` describes it.

    Attributes:
        path: Path of the folder.
        info: What it holds; None if it is too damaged to be read.
        problems: Sentences about what keeps it from being used.
        notes: Sentences about what a user should know although it works.
        lineage: The steps that made it.
        fingerprint: A short name for its content.
        targets: What a folder of targets holds; None for a model.
        fidelity: The fidelity card of a distilled student; None where there is none.
        gptq: The format of the codes of a GPTQ folder, as the codes themselves show it; None for
            other forms.
        reward: What a reward model learnt from and how often it is right; empty for one of somebody
            else, and None for a language model.
        measured: KL divergence of a quantized folder from its source and from a teacher; None if
            it was not measured.
        graphs: Operators, cost and slow kernels of each ONNX graph, by its file.
        manifest: The manifest of an ONNX folder without its checksums; None for others.
        looked_at: What was read and compared, and what was not looked at.
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
    reward: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    graphs: Mapping[str, Lint] = field(default_factory=dict)
    manifest: dict[str, Any] | None = None
    looked_at: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON values.

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
            "reward": self.reward,
            "measured": self.measured,
            "graphs": {name: lint.to_dict() for name, lint in self.graphs.items()},
            "manifest": self.manifest,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "looked_at": self.looked_at,
            "lineage": list(self.lineage),
            "fingerprint": self.fingerprint,
        }

    def panel(self) -> RenderableType:
        """The inspection as text and tables.

        Returns:
            Something that rich prints.
        """
        from rich.console import Group
        from rich.table import Table

        parts: list[RenderableType] = []
        if self.info is not None:
            parts.append(_facts(self.info, self.fingerprint))
        if self.reward is not None:
            parts.append(reward_facts(self.reward))
        if self.gptq is not None:
            parts.append(_gptq_facts(self.gptq))
        parts.extend(graph_facts(name, lint) for name, lint in self.graphs.items())
        if self.manifest is not None:
            parts.append(manifest_facts(self.manifest))
        if self.targets is not None:
            parts.append(_targets_facts(self.targets, self.fingerprint))
        parts.extend(
            show(figures)
            for figures, show in ((self.fidelity, _fidelity), (self.measured, fidelity_table))
            if figures is not None
        )
        if self.lineage:
            table = Table("step", "from", "settings and results", "date", title="how it was made")
            for entry in self.lineage:
                table.add_row(
                    plain(entry.get("step")),
                    plain(Path(str(entry.get("source") or "")).name),
                    plain(_words(entry)),
                    plain(str(entry.get("date", ""))[:16].replace("T", " ")),
                )
            parts.append(table)
        parts.extend(plain(f"! {problem}", "bold red") for problem in self.problems)
        slow = [str(finding) for lint in self.graphs.values() for finding in lint.findings]
        parts.extend(plain(f"- {note}", "yellow") for note in (*self.notes, *slow))
        parts.append(plain(self.looked_at, "dim"))
        if not self.problems:
            parts.append(plain("no problem was found in what was looked at", "green"))
        return Group(*parts)


def inspect_folder(path: str | Path) -> Inspection:
    """Inspect a folder without loading its weights.

    Graphs of an ONNX folder, whoever made it, are checked for operators that are slow on a CPU.
    Zero points, scales and some codes of a GPTQ folder are read, because they show their format.
    Every byte of an ONNX folder and of targets is compared with the checksums of the manifest.

    Args:
        path: A model folder, an ONNX folder, or targets.

    Returns:
        The inspection, which lists problems instead of raising them.

    Raises:
        FolderError: If there is no such folder.
    """
    folder = Path(path).expanduser()
    if is_remote(path) or is_targets(location_of(path)):
        return _inspect_targets(location_of(path))
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{path} is not a folder; give the folder of a model")
    if not folder.is_dir():
        folder = resolve_model(path)
    faults = problems(folder)
    info = None
    lineage: tuple[dict[str, Any], ...] = ()
    try:
        lineage = tuple(read_lineage(folder))
    except FolderError as error:
        faults.append(str(error))
    fidelity = measured = None
    try:
        if (folder / FIDELITY_FILE).is_file():
            fidelity = read_json(folder / FIDELITY_FILE)
        measured = read_fidelity(folder)
    except FolderError as error:
        faults.append(str(error))
    gptq = reward = None
    if not faults:
        info = describe(folder)
        try:
            reward = read_reward(folder) if info.form == "model" else None
        except FolderError as error:
            faults.append(str(error))
        gptq, wrong_codes = _examine_codes(folder, info.form)
        faults += wrong_codes
    graphs, remarks = _lint_graphs(folder)
    manifest = None
    if info is not None and info.form == "onnx":
        manifest = read_json(folder / MANIFEST_FILE)
        faults += _checksum_problems(folder, manifest.pop("files"))
        faults += _graph_problems(folder, info)
    notes, unreadable = ([], []) if info is None else _notes(folder, lineage)
    faults += unreadable
    return Inspection(
        path=folder,
        info=info,
        problems=tuple(faults),
        notes=(
            *notes,
            *(() if gptq is None else gptq.notes),
            *remarks,
        ),
        lineage=lineage,
        fingerprint=fingerprint(folder),
        fidelity=fidelity,
        gptq=gptq,
        reward=reward,
        measured=measured,
        graphs=graphs,
        manifest=manifest,
        looked_at=_NOTHING if info is None else _LOOKED_AT[info.form],
    )


def _checksum_problems(folder: Path, files: Mapping[str, Any]) -> list[str]:
    """Where the bytes of an ONNX folder are not those of its manifest."""
    faults = [
        f"{MANIFEST_FILE} has no checksum of {file.name}"
        for file in sorted(folder.glob("model.onnx*"))
        if file.name not in files
    ]
    with track("checking", total=sum(entry["bytes"] for entry in files.values()), unit="B") as bar:
        for name, entry in files.items():
            with (folder / name).open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            if digest != entry["sha256"]:
                faults.append(f"{name} is damaged: its checksum is not that of the manifest")
            bar.advance(entry["bytes"])
    return faults


def _graph_problems(folder: Path, info: FolderInfo) -> list[str]:
    """Where the inputs and outputs of a graph are not those that its folder promises."""
    from mistill.engine.onnx_session import graph_faults

    try:
        import onnx_ir

        graph = onnx_ir.load(folder / "model.onnx").graph
    except ModuleNotFoundError:
        return []
    except Exception as error:  # a file of another tool may be anything
        return [f"model.onnx is damaged: {one_line(error, 120)}"]
    if not any(node.op_type == "GroupQueryAttention" for node in graph):
        return []  # a portable graph, which this engine does not run
    types = {str(value.name): f"tensor({str(value.dtype).lower()})" for value in graph.inputs}
    optional = set(graph.initializers) & types.keys()
    outputs = {str(value.name): _sizes(value.shape) for value in graph.outputs}
    required = {name: kind for name, kind in types.items() if name not in optional}
    faults = graph_faults(required, optional, outputs, info.layers, info.vocabulary_size)
    return [f"model.onnx is not a graph of this folder: {fault}" for fault in faults[:4]]


def _sizes(shape: Any) -> list[int | None]:
    """The sizes of a shape, None for those that vary."""
    return [] if shape is None else [size if isinstance(size, int) else None for size in shape]


def _examine_codes(folder: Path, form: str) -> tuple[Diagnosis | None, list[str]]:
    """What the codes of a folder show of themselves, and what is wrong with them."""
    if form == "nf4":
        return None, nf4_problems(folder)
    if form != "gptq":
        return None, []
    try:
        diagnosis = examine(folder)
    except FolderError as error:
        return None, [str(error)]
    return diagnosis, list(diagnosis.contradictions)


def _lint_graphs(folder: Path) -> tuple[dict[str, Lint], list[str]]:
    """What is slow in each graph, and sentences about graphs that could not be read."""
    graphs: dict[str, Lint] = {}
    remarks = []
    for file in sorted((*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx"))):
        name = str(file.relative_to(folder))
        try:
            graphs[name] = lint_file(file)
        except MissingExtraError as error:
            return {}, [f"the ONNX graph was not checked: {error}"]
        except Exception as error:  # a file of another tool may be anything
            remarks.append(f"{name} cannot be read as a graph: {one_line(error, 120)}")
    return graphs, remarks


def _inspect_targets(location: Location) -> Inspection:
    faults = targets_problems(location)
    lineage: tuple[dict[str, Any], ...] = ()
    if location.exists(LINEAGE_FILE):
        try:
            entries = parse_json(location.read(LINEAGE_FILE), LINEAGE_FILE)
            lineage = tuple(checked_lineage(entries, LINEAGE_FILE))
        except FolderError as error:
            faults.append(str(error))
    manifest = location.read(MANIFEST_FILE) if location.exists(MANIFEST_FILE) else b""
    return Inspection(
        path=location.path,
        info=None,
        problems=tuple(faults),
        notes=(),
        lineage=lineage,
        fingerprint=hashlib.sha256(manifest).hexdigest(),
        targets=None if faults else describe_targets(location),
        looked_at=_NOTHING if faults else _LOOKED_AT["targets"],
    )


def _notes(folder: Path, lineage: tuple[dict[str, Any], ...]) -> tuple[list[str], list[str]]:
    """What is worth knowing of a model folder's text, and what of it cannot be read."""
    try:
        vocabulary = load_vocabulary(folder)
        ends = vocabulary.end_ids
        faults = _template_problems(vocabulary)
    except MistillError as error:
        return [], [str(error)]
    notes = contradictions(folder, read_json(folder / "config.json"))
    if not vocabulary.files_agree_on_bos:
        does = "begins" if vocabulary.adds_bos else "does not begin"
        notes.append(
            f"tokenizer_config.json and tokenizer.json contradict each other: text {does} with the "
            "beginning-of-sequence token here, as tokenizer_config.json says"
        )
    if not ends:
        notes.append("the tokenizer has no end-of-turn token, so that a chatbot would never stop")
    if vocabulary.chat_template is None:
        notes.append("it has no chat template, so that it can continue text but not chat")
    if not lineage:
        notes.append("it has no lineage, because mistill did not make it")
    return notes, faults


def _template_problems(vocabulary: Vocabulary) -> list[str]:
    if vocabulary.chat_template is None:
        return []
    try:
        text = vocabulary.render([{"role": "user", "content": "?"}], add_generation_prompt=True)
    except TextError:  # it may want other conversations
        return []
    return [] if text else ["its chat template writes nothing"]


def _facts(info: FolderInfo, name: str) -> RenderableType:
    quantization = info.quantization or {}
    rows = {
        "form": f"{_FORMS[info.form]}, {info.architecture}, {info.layers} layers of width "
        f"{info.hidden_size}",
        "parameters": f"{info.parameters / 1e6:,.1f} M",
        "weights": f"{info.weight_bytes / 1e6:,.1f} MB, {info.bits_per_weight:.2f} bits per weight",
        "all files": f"{info.size_bytes / 1e6:,.1f} MB",
        "vocabulary": f"{info.vocabulary_size:,} tokens",
        "context": f"{info.context_length:,} positions",
        "fingerprint": name[:16],
    }
    if quantization:
        keys = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")
        words = [f"{key} {quantization[key]}" for key in keys if key in quantization]
        rows["quantized as"] = ", ".join([str(quantization.get("quant_method")), *words])
    return facts_table(rows)


def _gptq_facts(diagnosis: Diagnosis) -> RenderableType:
    """The format of the codes, as they show it themselves."""
    widths = ", ".join(f"{bits} bits in {count} matrices" for bits, count in diagnosis.bits.items())
    kind = "symmetric" if diagnosis.symmetric else "asymmetric"
    order = {"plain": "in the order of the columns", "mixed": "in activation order (act-order)"}[
        diagnosis.order
    ]
    checkpoint_format = diagnosis.checkpoint_format or "checkpoint format unknown"
    index = "" if diagnosis.index else ", no g_idx"
    rows = {
        "codes": widths or "none",
        "zero points": f"{kind}, {checkpoint_format}: {diagnosis.evidence}",
        "groups": f"{order}{index}",
        "scales": ", ".join(f"{kind} in {count}" for kind, count in diagnosis.scale_types.items()),
    }
    return facts_table(rows)


def _targets_facts(info: TargetsInfo, name: str) -> RenderableType:
    settings, teacher = info.settings, info.teacher
    method = settings["method"]
    stored = f"the {settings['top_k']} most probable tokens"
    if method != "top_k":
        stored = f"{settings['draws']} {method} draws"
    distinct = f"{info.stored_tokens / info.positions:.2f} different tokens"
    nats = "" if info.mean_entropy is None else f", entropy {info.mean_entropy:.3f} nats"
    rows = {
        "form": f"teacher logits of {teacher['name']} ({teacher['form']}, {teacher['dtype']})",
        "text": f"{info.tokens:,} tokens in {info.pieces:,} pieces of at most "
        f"{settings['block_length']}, {info.positions:,} predicted positions",
        "per position": f"{stored} at temperature {settings['temperature']:g}",
        "on average": f"{distinct} per position{nats}",
        "all files": f"{info.size_bytes / 1e6:,.2f} MB, {info.bytes_per_position:.2f} bytes per "
        f"position, in {info.shards} {settings['codec']} shards",
        "vocabulary": f"{info.vocabulary_size:,} tokens",
        "fingerprint": name[:16],
    }
    return facts_table(rows)


def _fidelity(card: Mapping[str, Any]) -> RenderableType:
    """The fidelity card as a table: how far the student and its twins are from the teacher."""
    from rich.table import Table

    students = [("before training", {"held_out": card["before"]}), ("distilled", card["student"])]
    students += [
        (words, card[name])
        for name, words in (
            ("twin_of_equal_tokens", "from text alone, equal tokens"),
            ("twin_of_equal_time", "from text alone, equal time"),
        )
        if card.get(name)
    ]
    table = Table(title="how close it is to its teacher, on held-out text")
    table.add_column("student")
    for heading in ("tokens", *_CARD):
        table.add_column(heading, justify="right")
    for words, student in students:
        figures = student["held_out"]
        cells = [
            "-" if figures.get(name) is None else format(figures[name], style)
            for name, style in _CARD.values()
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
    """Settings and results of a step on one line."""
    shown_apart = ("step", "settings", "source", "source_fingerprint", "versions", "date")
    pairs = dict(entry.get("settings") or {})
    pairs |= {key: value for key, value in entry.items() if key not in shown_apart}
    phrases = []
    for key, value in pairs.items():
        if value is None or value == [] or isinstance(value, dict):
            continue
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        phrases.append(f"{key} {text if len(text) <= 60 else text[:57] + '...'}")
    return ", ".join(phrases)
