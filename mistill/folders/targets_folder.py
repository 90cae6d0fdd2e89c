"""A description of a folder of targets from its manifest, and a check of its files.

``distill`` writes and reads the folder; the functions here need not know how a distribution is
encoded. ``manifest.json`` is written last: a folder without it is unfinished, and ``plan.json``
describes what it will hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mistill.errors import FolderError
from mistill.folders.folder import MANIFEST_FILE
from mistill.folders.json_text import check, parse_json
from mistill.folders.lineage import LINEAGE_FILE
from mistill.folders.location import Location
from mistill.folders.schemas import TargetsManifest
from mistill.progress import track

_ANY_FORMAT = "mistill targets"
FORMAT = f"{_ANY_FORMAT} 1"
PLAN_FILE = "plan.json"


@dataclass(frozen=True, kw_only=True)
class TargetsInfo:
    """A folder of targets.

    Attributes:
        teacher: The model that spoke: name, fingerprint, form and dtype.
        vocabulary_size: Tokens that the distributions are over, V.
        settings: Settings of the targets.
        pieces: Different pieces of text.
        tokens: Text tokens in them.
        positions: Kept positions, each with what the teacher says there.
        stored_tokens: Tokens that are stored of all distributions together.
        mean_entropy: Of the teacher over all positions, in nats; None if it was not stored.
        shards: Files that hold targets.
        size_bytes: Bytes of all files, manifest, plan and lineage too.
    """

    teacher: Mapping[str, str]
    vocabulary_size: int
    settings: Mapping[str, Any]
    pieces: int
    tokens: int
    positions: int
    stored_tokens: int
    mean_entropy: float | None
    shards: int
    size_bytes: int

    @property
    def bytes_per_position(self) -> float:
        """Bytes on disk for each kept position, everything counted."""
        return self.size_bytes / self.positions

    def to_dict(self) -> dict[str, Any]:
        """What is known, as JSON values.

        Returns:
            One entry per field, and the bytes of a position.
        """
        return {
            "teacher": dict(self.teacher),
            "vocabulary_size": self.vocabulary_size,
            "settings": dict(self.settings),
            "pieces": self.pieces,
            "tokens": self.tokens,
            "positions": self.positions,
            "stored_tokens": self.stored_tokens,
            "mean_entropy": self.mean_entropy,
            "shards": self.shards,
            "size_bytes": self.size_bytes,
            "bytes_per_position": round(self.bytes_per_position, 3),
        }


def is_targets(location: Location) -> bool:
    """Whether a folder holds targets, finished or not, of this version or another, or damaged.

    Args:
        location: Location of the folder.

    Returns:
        True if its plan or its manifest says so.
    """
    names = location.names()
    if "config.json" in names:  # a model; one for ONNX has a manifest too
        return False
    for name in (MANIFEST_FILE, PLAN_FILE):
        if name in names:
            try:
                format_name = str(read_document(location, name).get("format"))
            except FolderError:
                return any(other.startswith("shard-") for other in names)
            return format_name.startswith(_ANY_FORMAT)
    return False


def read_manifest(location: Location) -> dict[str, Any]:
    """Read the manifest of finished targets.

    Args:
        location: Location of the folder.

    Returns:
        The manifest.

    Raises:
        FolderError: If it is missing, unfinished, damaged, or no folder of targets.
    """
    names = location.names()
    if not names:
        raise FolderError(
            f"there are no targets in {location}; make them with distill.cache_targets"
        )
    if MANIFEST_FILE not in names:
        if PLAN_FILE in names:
            raise FolderError(
                f"the targets in {location} are unfinished; call "
                "distill.cache_targets again in the same way to resume"
            )
        raise FolderError(f"{location} is not a folder of targets: it has no {MANIFEST_FILE}")
    manifest = read_document(location, MANIFEST_FILE)
    if manifest.get("format") != FORMAT:
        raise FolderError(
            f"{location} is not a folder of targets that this version reads: its format is "
            f"{manifest.get('format')!r}, not {FORMAT!r}"
        )
    check(manifest, TargetsManifest, f"{MANIFEST_FILE} of {location}")
    return manifest


def describe_targets(location: Location) -> TargetsInfo:
    """Describe finished targets.

    Args:
        location: Location of the folder.

    Returns:
        The description.

    Raises:
        FolderError: If it is missing, unfinished or damaged.
    """
    manifest = read_manifest(location)
    files = [*manifest["files"], MANIFEST_FILE, PLAN_FILE, LINEAGE_FILE]
    sizes = [location.size(name) for name in files if location.exists(name)]
    return TargetsInfo(
        teacher=manifest["teacher"],
        vocabulary_size=manifest["vocabulary"]["size"],
        settings=manifest["settings"],
        pieces=manifest["pieces"],
        tokens=manifest["tokens"],
        positions=manifest["positions"],
        stored_tokens=manifest["stored_tokens"],
        mean_entropy=manifest["mean_entropy"],
        shards=len(manifest["files"]),
        size_bytes=sum(sizes),
    )


def targets_problems(location: Location) -> list[str]:
    """Everything that keeps targets from being used; reads every byte of them.

    Args:
        location: A folder of targets.

    Returns:
        One phrase for each problem; empty for sound targets.
    """
    try:
        manifest = read_manifest(location)
    except FolderError as error:
        return [str(error)]
    faults = []
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    with track("checking", total=total, unit="B") as bar:
        for name, entry in manifest["files"].items():
            problem = _file_problem(location, name, entry)
            if problem is not None:
                faults.append(problem)
            bar.advance(entry["bytes"])
    return faults


def _file_problem(location: Location, name: str, entry: Mapping[str, Any]) -> str | None:
    try:
        content = location.read(name)
    except FolderError:
        return f"{name} is missing"
    if len(content) != entry["bytes"]:
        return f"{name} has {len(content)} bytes, not the {entry['bytes']} of the manifest"
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        return f"{name} is damaged: its checksum is not that of the manifest"
    return None


def read_document(location: Location, name: str) -> dict[str, Any]:
    """A JSON object of a folder of targets, such as its plan; a FolderError says what is wrong."""
    value = parse_json(location.read(name), f"{name} of {location}")
    if not isinstance(value, dict):
        raise FolderError(f"{name} of {location} should hold a JSON object")
    return value
