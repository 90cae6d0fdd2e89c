"""The lineage of a folder: ``lineage.json``, a list with one entry for each step that led to it.

Recipes use it to see which steps are done. Sources are identified by a fingerprint of their
content, and by their names; no path of the machine is recorded.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mistill.errors import FolderError
from mistill.folders.folder import MANIFEST_FILE, QUANTIZE_REPORT_FILE, QUANTIZE_TABLE_FILE
from mistill.folders.json_text import check, read_json_file
from mistill.folders.ownership import CARD_FILE
from mistill.folders.publishing import write_json
from mistill.folders.schemas import LineageStep
from mistill.settings import changed_settings, settings_dict

LINEAGE_FILE = "lineage.json"

# Records of how a folder was made, which are no part of its content.
_RECORDS = (
    LINEAGE_FILE,
    MANIFEST_FILE,
    "metrics.jsonl",
    "tuning_report.json",
    QUANTIZE_REPORT_FILE,
    QUANTIZE_TABLE_FILE,
    CARD_FILE,
)
_VERSIONED = (
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "trl",
    "onnxruntime",
    "onnx-ir",
    "numpy",
)
_SMALL_FILE = 1 << 20
_PROBES = 64
_PROBE_BYTES = 4096


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
    return checked_lineage(read_json_file(file), str(file))


def checked_lineage(value: Any, origin: str) -> list[dict[str, Any]]:
    """A parsed lineage, if it is one.

    Args:
        value: The parsed document.
        origin: Where it comes from, for the message.

    Returns:
        The same.

    Raises:
        FolderError: If it is not a list of steps.
    """
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise FolderError(f"{origin} should hold a list of steps, each a JSON object")
    check(value, list[LineageStep], origin)
    return value


def add_lineage(
    folder: Path, *, step: str, settings: object, source: Path | None, **facts: Any
) -> None:
    """Record in a new folder which step made it, from what, and with which settings.

    Args:
        folder: The folder being made.
        step: Name of the step, as in the command line.
        settings: An object of the step's settings class, or settings by name as JSON values.
        source: The folder that the step read, whose own lineage is carried on; None at the start.
        **facts: What else the step wants remembered, as JSON values.
    """
    steps = lineage_after(source, step=step, settings=settings, **facts)
    write_json(folder / LINEAGE_FILE, steps)


def lineage_after(
    source: Path | None, *, step: str, settings: object, **facts: Any
) -> list[dict[str, Any]]:
    """The lineage of what a step makes: that of its source, and an entry for the step.

    Args:
        source: The folder that the step read; None at the start.
        step: Name of the step, as in the command line.
        settings: An object of the step's settings class, or settings by name as JSON values.
        **facts: What else the step wants remembered, as JSON values.

    Returns:
        One entry per step. ``changed_settings`` names the settings that are not the defaults, so
        that a reader of the entry needs no settings class. Where the source was fetched from the
        Hub, ``hub`` is its id.
    """
    by_name = dict(settings) if isinstance(settings, Mapping) else settings_dict(settings)
    changed = list(by_name) if isinstance(settings, Mapping) else changed_settings(settings)
    hub_id = None if source is None else _hub_id(source)
    entry = {
        "step": step,
        "settings": without_paths(by_name),
        "changed_settings": changed,
        "source": hub_id.rpartition("/")[2] if hub_id else file_name(source),
        **({"hub": hub_id} if hub_id else {}),
        "source_fingerprint": None if source is None else fingerprint(source),
        "versions": installed_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **without_paths(facts),
    }
    return [*([] if source is None else read_lineage(source)), entry]


def _hub_id(folder: Path) -> str | None:
    """The id of a model of the Hub, from where its library keeps it; None for other folders."""
    parts = folder.absolute().parts[-3:]
    if len(parts) < 3 or parts[1] != "snapshots" or not parts[0].startswith("models--"):
        return None
    return "/".join(parts[0].split("--", 2)[1:])


def without_paths(value: Any) -> Any:
    """A record without the places of this machine, which are nobody's business who reads it.

    Args:
        value: A value of a record, or several.

    Returns:
        The same, with the file name in the place of every absolute path.
    """
    if isinstance(value, Mapping):
        return {str(name): without_paths(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    return file_name(value)


def file_name(value: Any) -> Any:
    """Replace an absolute path by its file name.

    Args:
        value: Any value of a record.

    Returns:
        The file name of an absolute path; any other value unchanged, other paths as text.
    """
    if isinstance(value, str | Path):
        return PureWindowsPath(value).name if is_place(str(value)) else str(value)
    return value


def is_place(text: str) -> bool:
    """Whether a text is the absolute path of a file or folder, on whichever system.

    Args:
        text: A value of a record.

    Returns:
        True for paths of several parts; what only begins with a slash, such as a command in a
        prompt, is none.
    """
    if "\n" in text or len(text) > 1000:
        return False
    kinds = (PurePosixPath(text), PureWindowsPath(text))
    return any(kind.is_absolute() and len(kind.parts) > 2 for kind in kinds)


def name_of_base(model: str | Path, folder: Path) -> str:
    """What an adapter calls the model that it is for.

    Args:
        model: The model as it was given: a folder, a Hub id, a file.
        folder: Where it lies.

    Returns:
        Its Hub id, or the name of its folder.
    """
    from_hub = "/" in str(model) and not Path(model).exists()
    return str(model) if from_hub else folder.name


def find_source(folder: Path, entry: Mapping[str, Any]) -> Path | None:
    """The folder that a step read, if it stands beside what the step made or where we work.

    Args:
        folder: What the step made.
        entry: The step's entry in the lineage, which holds no place but a name.

    Returns:
        The folder, whatever it holds now; None if there is none.
    """
    name = entry.get("source")
    if not name:
        return None
    beside = folder.absolute().parent
    places = [place for place in (beside / name, Path(name)) if place.is_dir()]
    same = (place for place in places if fingerprint(place) == entry.get("source_fingerprint"))
    return next(same, places[0] if places else None)


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
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("mistill", *_VERSIONED):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
