"""Folders: the only thing that steps hand to one another.

A folder appears whole or not at all: it is written beside its target under a hidden name and
renamed when it is finished. It carries ``lineage.json``, a list with one entry for each step that
led to it, so that a folder explains itself and a recipe knows what is done. What a folder holds
is read from its small files and from the headers of its weights, never by loading them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, Literal

from mistill.errors import FolderError, TargetExistsError
from mistill.gptq_format import read_quantization

Form = Literal["model", "gptq", "nf4", "onnx"]

LINEAGE_FILE = "lineage.json"
MANIFEST_FILE = "manifest.json"
FIDELITY_FILE = "fidelity.json"
AUTO_GPTQ_CONFIG = "quantize_config.json"

# What tells how a folder was made, with dates and durations, and not what it holds.
_RECORDS = (
    LINEAGE_FILE,
    MANIFEST_FILE,
    "metrics.jsonl",
    "quantize_report.json",
    "quantize_report.csv",
)
_VERSIONED = ("torch", "transformers", "bitsandbytes", "onnxruntime", "onnx-ir", "numpy")
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_FULL_DISK = ("No space left", "File too large", "Disk quota exceeded")
_SMALL_FILE = 1 << 20
_PROBES = 64
_PROBE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class FolderInfo:
    """What a folder holds, read without loading a weight.

    Attributes:
        path: The folder.
        form: ``model`` (float weights), ``gptq``, ``nf4`` or ``onnx``.
        architecture: ``model_type`` of config.json, such as ``mistral``.
        vocabulary_size: Rows of the embedding, V.
        layers: Decoder layers.
        hidden_size: Width of the residual stream, D.
        parameters: Weights of the dense model that the folder stands for; a shared table counts
            once.
        weight_bytes: Bytes of the files that hold weights.
        size_bytes: Bytes of all files.
        context_length: Most positions.
        quantization: ``quantization_config`` of config.json, or None.
    """

    path: Path
    form: Form
    architecture: str
    vocabulary_size: int
    layers: int
    hidden_size: int
    parameters: int
    weight_bytes: int
    size_bytes: int
    context_length: int
    quantization: dict[str, Any] | None

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight of the dense model, scales and tables counted."""
        return self.weight_bytes * 8 / self.parameters


# --- creating -----------------------------------------------------------------------------------


def refuse_existing(target: str | Path, overwrite: bool = False) -> Path:
    """Refuse a target that exists, before any work is done for it.

    Args:
        target: Where an output shall appear.
        overwrite: Whether an existing folder may be replaced.

    Returns:
        The target as an absolute path.

    Raises:
        TargetExistsError: If the target exists and may not be replaced.
        FolderError: If its parent cannot be written to.
    """
    path = Path(target).expanduser().absolute()
    if path.exists() and not overwrite:
        raise TargetExistsError(f"{target} exists already; choose another name or overwrite it")
    if overwrite and path.is_file():
        raise FolderError(f"{target} is a file, not a folder that could be overwritten")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise FolderError(f"{target} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise FolderError(f"{target} cannot be made: {parent} is not writable")
    return path


@contextmanager
def creating(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Make a folder that appears whole or not at all.

    The body writes into a hidden folder beside the target, which is renamed when the body ends
    and removed when it fails. What a killed process left behind is removed by the next one.

    Args:
        target: Where the folder shall appear.
        overwrite: Whether an existing folder is replaced; it stays until the new one is whole.

    Yields:
        The hidden folder to write into.

    Raises:
        FolderError: If the disk is full.
    """
    path = refuse_existing(target, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        yield partial
        _move_into_place(partial, path, overwrite)
    except Exception as error:
        if is_full_disk(error):
            raise FolderError(
                f"no room to write {target}: free some space on its disk and run this again"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that the disk is full, in any library's words.

    Args:
        error: What was raised.

    Returns:
        True for a full disk, an exceeded quota or a file larger than is allowed.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return True
    return any(phrase in str(error) for phrase in _FULL_DISK)


@contextmanager
def working(target: str | Path, key: Mapping[str, Any]) -> Iterator[Path]:
    """Keep the state of long work in a hidden folder beside its target, so that it can resume.

    The folder outlives an interruption. It is reused when the work is the same, which ``key``
    decides, and emptied when it is not. It goes when ``publish`` is called.

    Args:
        target: Where the result shall appear.
        key: What the state depends on: settings and fingerprints of sources, JSON values.

    Yields:
        The hidden folder, empty or as the interrupted work left it.

    Raises:
        FolderError: If another process is at work on the same target, or the disk is full.
    """
    path = Path(target).expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.parent / f".{path.name}.working"
    work.mkdir(exist_ok=True)
    with _only_one(work, target):
        recorded = work / "key.json"
        text = json.dumps(key, sort_keys=True, indent=1)
        if not recorded.exists() or recorded.read_text("utf-8") != text:
            for item in work.iterdir():
                if item.name != "lock":
                    _remove(item)
            write_atomically(recorded, text)
        try:
            yield work
        except Exception as error:
            if is_full_disk(error):
                raise FolderError(
                    f"no room to write {target}: free some space on its disk and run this again; "
                    "it will resume"
                ) from error
            raise


def publish(work: Path, target: str | Path, overwrite: bool = False) -> Path:
    """Turn the folder ``result`` inside a working folder into the target.

    Args:
        work: A folder from ``working`` that holds a finished folder ``result``.
        target: Where the result shall appear.
        overwrite: Whether an existing folder is replaced.

    Returns:
        The target.
    """
    path = refuse_existing(target, overwrite)
    _move_into_place(work / "result", path, overwrite)
    shutil.rmtree(work, ignore_errors=True)
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write a small file that appears whole or not at all.

    Args:
        path: The file; replaced if it exists.
        text: Its content.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _move_into_place(partial: Path, path: Path, overwrite: bool) -> None:
    for file in partial.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    aside = path.parent / f".{path.name}.{os.getpid()}.replaced"
    if overwrite and path.exists():
        path.rename(aside)
    try:
        partial.rename(path)
    except OSError as error:
        if aside.exists():
            aside.rename(path)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise TargetExistsError(f"{path} appeared while it was being made") from error
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left beside a target; put back what one had set aside."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        owner, _, kind = leftover.name.removeprefix(f".{path.name}.").partition(".")
        if kind not in ("partial", "replaced") or not owner.isdigit() or _alive(int(owner)):
            continue
        if kind == "replaced" and not path.exists():
            leftover.rename(path)
        else:
            _remove(leftover)


def _remove(item: Path) -> None:
    if item.is_dir():
        shutil.rmtree(item)
    else:
        item.unlink()


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _only_one(work: Path, target: str | Path) -> Iterator[None]:
    """Hold a lock that the system drops when this process ends, however it ends."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderError(
                f"another process is making {target}; wait for it or choose another target"
            ) from error
        yield


# --- describing ---------------------------------------------------------------------------------


def open_folder(path: str | Path) -> FolderInfo:
    """Describe a folder, or say all that is missing from it.

    Args:
        path: A folder of any form.

    Returns:
        What it holds.

    Raises:
        FolderError: If it is missing or broken; the message lists everything that is wrong.
    """
    wrong = problems(path)
    if wrong:
        raise FolderError(f"{path} is not a usable model folder: {'; '.join(wrong)}")
    return describe(path)


def problems(path: str | Path) -> list[str]:
    """Everything that keeps a folder from being used, in words.

    Args:
        path: A folder of any form.

    Returns:
        One phrase for each problem; empty for a sound folder.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        return ["there is no such folder"]
    if not folder.is_dir():
        return ["it is a file, not a folder"]
    found = _config_problems(folder)
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        found.append("tokenizer.json is missing")
    if (folder / "model.onnx").is_file():
        return found + _onnx_problems(folder)
    return found + _weight_problems(folder)


def describe(path: str | Path) -> FolderInfo:
    """Describe a sound folder without loading its weights.

    Args:
        path: A folder without problems.

    Returns:
        What it holds.
    """
    folder = Path(path).expanduser().absolute()
    config = read_config(folder)
    quantization = config.get("quantization_config")
    form = form_of(folder, config)
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    if form == "onnx":
        weights = [file for file in sizes if file.name.startswith("model.onnx")]
        parameters = int(read_json(folder / MANIFEST_FILE)["parameters"])
    else:
        weights = weight_files(folder)
        parameters = _dense_parameters(folder, config)
    return FolderInfo(
        path=folder,
        form=form,
        architecture=str(config["model_type"]),
        vocabulary_size=int(config["vocab_size"]),
        layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        parameters=parameters,
        weight_bytes=sum(sizes[file] for file in weights),
        size_bytes=sum(sizes.values()),
        context_length=context_length(folder, config),
        quantization=quantization,
    )


def form_of(folder: Path, config: Mapping[str, Any]) -> Form:
    """The form of a folder.

    Args:
        folder: The folder.
        config: Its config.json.

    Returns:
        ``onnx`` where a graph is, else what ``quantization_config`` says, else ``model``.

    Raises:
        FolderError: If the weights are quantized in a way that mistill does not read.
    """
    if (folder / "model.onnx").is_file():
        return "onnx"
    quantization = config.get("quantization_config")
    if quantization is None:
        return "model"
    if not isinstance(quantization, Mapping):
        raise FolderError(f"quantization_config in {folder} should be an object")
    method = quantization.get("quant_method")
    if method == "gptq":
        return "gptq"
    if method == "bitsandbytes" and quantization.get("bnb_4bit_quant_type") == "nf4":
        return "nf4"
    raise FolderError(
        f"{folder} is quantized as {method!r}; mistill reads float, GPTQ and NF4 folders"
    )


def context_length(folder: Path, config: Mapping[str, Any]) -> int:
    """Most positions that a model can hold.

    Args:
        folder: The folder; an ONNX folder may hold fewer than its config says.
        config: Its config.json.

    Returns:
        Positions.
    """
    genai = folder / "genai_config.json"
    if (folder / "model.onnx").is_file() and genai.is_file():
        return int(read_json(genai)["model"]["context_length"])
    return int(config["max_position_embeddings"])


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json, and what AutoGPTQ may have put beside it.

    Args:
        folder: A folder of any form.

    Returns:
        The config; ``quantization_config`` is that of quantize_config.json where config.json has
        none.

    Raises:
        FolderError: If a file is missing or is not a JSON object.
    """
    config = read_json(folder / "config.json")
    if "quantization_config" not in config and (folder / AUTO_GPTQ_CONFIG).is_file():
        said = read_json(folder / AUTO_GPTQ_CONFIG)
        config["quantization_config"] = {"quant_method": "gptq", **said}
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order.

    Args:
        folder: A model folder.

    Returns:
        One file, or the shards that the index names; of a folder by AutoGPTQ those under the name
        that it gives them, such as ``gptq_model-4bit-128g.safetensors``.
    """
    for base in ("model", *_auto_gptq_names(folder)):
        index = folder / f"{base}.safetensors.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            return [folder / name for name in names]
        if (folder / f"{base}.safetensors").is_file():
            return [folder / f"{base}.safetensors"]
    return [folder / "model.safetensors"]


def _auto_gptq_names(folder: Path) -> list[str]:
    """The names that AutoGPTQ may have given to the weights of a folder, without their ending."""
    if not (folder / AUTO_GPTQ_CONFIG).is_file():
        return []
    said = read_json(folder / AUTO_GPTQ_CONFIG)
    default = f"gptq_model-{said.get('bits')}bit-{said.get('group_size')}g"
    names = [said.get("model_file_base_name"), default]
    return [name for name in names if isinstance(name, str) and Path(name).name == name]


def data_start(file: Path) -> int:
    """Where the tensors of a safetensors file begin.

    Args:
        file: A file that ``safetensors_header`` reads.

    Returns:
        Bytes from the start of the file.
    """
    with file.open("rb") as opened:
        return 8 + int(struct.unpack("<Q", opened.read(8))[0])


def safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """Names, types and shapes of the tensors in a safetensors file.

    Args:
        file: The file.

    Returns:
        Tensor name to its ``dtype``, ``shape`` and ``data_offsets``.

    Raises:
        FolderError: If the file is cut short or is not a safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        header = _read_header(opened, size)
    if header is None:
        raise FolderError(f"{file} is not a safetensors file, or its start is damaged")
    tensors, start = header
    tensors.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if size < start + end:
        raise FolderError(f"{file} is cut short: {size} of {start + end} bytes")
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        file: The file.

    Returns:
        The object.

    Raises:
        FolderError: If the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise FolderError(f"{file} is missing") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FolderError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FolderError(f"{file} should hold a JSON object, not a {type(value).__name__}")
    return value


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a model besides its weights and config: tokenizer, template, settings.

    Args:
        source: A model folder.
        target: The folder being made.
    """
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _config_problems(folder: Path) -> list[str]:
    try:
        config = read_config(folder)
    except FolderError as error:
        return [str(error).replace(f"{folder}{os.sep}", "")]
    wanted = (
        "model_type",
        "vocab_size",
        "num_hidden_layers",
        "hidden_size",
        "max_position_embeddings",
    )
    missing = [name for name in wanted if name not in config]
    found = [f"config.json lacks {', '.join(missing)}"] if missing else []
    found += [
        f"{name} in config.json should be a whole number, not {config[name]!r}"
        for name in wanted[1:]
        if name in config and type(config[name]) is not int
    ]
    try:
        form_of(folder, config)
    except FolderError as error:
        found.append(str(error))
    return found


def _onnx_problems(folder: Path) -> list[str]:
    found = [
        f"{name} is missing"
        for name in ("genai_config.json", MANIFEST_FILE)
        if not (folder / name).is_file()
    ]
    if (folder / MANIFEST_FILE).is_file():
        try:
            files = read_json(folder / MANIFEST_FILE).get("files", {})
        except FolderError as error:
            return [*found, str(error)]
        for name, entry in files.items():
            file = folder / name
            if not file.is_file():
                found.append(f"{name} is missing")
            elif file.stat().st_size != entry["bytes"]:
                found.append(
                    f"{name} has {file.stat().st_size} bytes, not the {entry['bytes']} of the "
                    "manifest"
                )
    return found


def _weight_problems(folder: Path) -> list[str]:
    try:
        files = weight_files(folder)
    except (FolderError, KeyError):
        return ["model.safetensors.index.json is damaged"]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        if pickled:
            return [f"its weights are pickled ({pickled[0]}); mistill reads safetensors only"]
        return [f"{name} is missing" for name in missing]
    found = []
    for file in files:
        try:
            safetensors_header(file)
        except FolderError as error:
            found.append(str(error).replace(f"{folder}{os.sep}", ""))
    return found


def _read_header(opened: BinaryIO, size: int) -> tuple[dict[str, dict[str, Any]], int] | None:
    prefix = opened.read(8)
    if len(prefix) < 8:
        return None
    (length,) = struct.unpack("<Q", prefix)
    if length > size - 8:
        return None
    try:
        header = json.loads(opened.read(length))
    except ValueError:
        return None
    return (header, 8 + length) if isinstance(header, dict) else None


def _dense_parameters(folder: Path, config: Mapping[str, Any]) -> int:
    """Count the weights that a folder stands for, whatever form they are packed in."""
    tensors: dict[str, dict[str, Any]] = {}
    for file in weight_files(folder):
        tensors.update(safetensors_header(file))
    layout = None
    total = 0
    for name, entry in tensors.items():
        count = math.prod(entry["shape"])
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            if f"{module}.g_idx" in tensors:
                inputs = tensors[f"{module}.g_idx"]["shape"][0]
            else:
                layout = layout or read_quantization(config)
                form = None if layout is None else layout.format_of(module)
                inputs = entry["shape"][0] * 32 // (form.bits if form else 32)
            total += inputs * entry["shape"][1]
        elif f"{name}.quant_state.bitsandbytes__nf4" in tensors:
            total += count * 2
        elif name.endswith((".weight", ".bias")):
            total += count
    return total


# --- lineage ------------------------------------------------------------------------------------


def read_lineage(folder: str | Path) -> list[dict[str, Any]]:
    """The steps that led to a folder, first step first.

    Args:
        folder: A folder of any form.

    Returns:
        One entry per step; empty for a folder that mistill did not make.

    Raises:
        FolderError: If the record is damaged.
    """
    file = Path(folder) / LINEAGE_FILE
    if not file.is_file():
        return []
    try:
        value = json.loads(file.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FolderError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, list):
        raise FolderError(f"{file} should hold a list of steps")
    return value


def add_lineage(
    folder: Path, *, step: str, settings: Mapping[str, Any], source: Path | None, **facts: Any
) -> None:
    """Record in a new folder which step made it, from what, and with which settings.

    Args:
        folder: The folder being made.
        step: Name of the step, as in the command line.
        settings: The step's settings, as JSON values.
        source: The folder that the step read, whose own lineage is carried on; None at the start.
        **facts: What else the step wants remembered, as JSON values.
    """
    steps = lineage_after(source, step=step, settings=settings, **facts)
    write_atomically(folder / LINEAGE_FILE, json.dumps(steps, indent=2) + "\n")


def lineage_after(
    source: Path | None, *, step: str, settings: Mapping[str, Any], **facts: Any
) -> list[dict[str, Any]]:
    """The lineage of what a step makes: that of its source, and an entry for the step.

    Args:
        source: The folder that the step read; None at the start.
        step: Name of the step, as in the command line.
        settings: The step's settings, as JSON values.
        **facts: What else the step wants remembered, as JSON values.

    Returns:
        One entry per step.
    """
    entry = {
        "step": step,
        "settings": dict(settings),
        "source": None if source is None else str(source),
        "source_fingerprint": None if source is None else fingerprint(source),
        "versions": installed_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
    }
    return [*([] if source is None else read_lineage(source)), entry]


def fingerprint(path: str | Path) -> str:
    """A short name for the content of a file or folder, found in milliseconds.

    SHA-256 over the names and sizes of all files, the whole of those up to 1 MiB, and 64 evenly
    spaced pages of larger ones: enough to tell two trained models apart, not to detect a
    forger. The manifest of an ONNX folder holds full checksums. Records of how a folder was made
    do not count: they hold dates and durations.

    Args:
        path: A file or a folder.

    Returns:
        64 hexadecimal digits.
    """
    root = Path(path)
    files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
    digest = hashlib.sha256()
    for file in files:
        if file.name in _RECORDS:
            continue
        size = file.stat().st_size
        name = file.relative_to(root).as_posix() if root.is_dir() else "file"
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as opened:
            if size <= _SMALL_FILE:
                digest.update(opened.read())
                continue
            for probe in range(_PROBES):
                opened.seek(probe * (size - _PROBE_BYTES) // (_PROBES - 1))
                digest.update(opened.read(_PROBE_BYTES))
    return digest.hexdigest()


def installed_versions() -> dict[str, str]:
    """Versions of mistill and of the libraries that decide what a step produces.

    Returns:
        Library name to version, for those installed.
    """
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("mistill", *_VERSIONED):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
