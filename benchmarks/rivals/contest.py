"""The rivals of one comparison: where they are installed, and the files that they run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures.rival import Rival
from benchmarks.rivals.engines import Choice, Note, choices
from benchmarks.rivals.environment import Environment, find_environment
from benchmarks.rivals.making import make_rival
from mistill.errors import SettingsError
from mistill.folders.folder import FolderInfo

# Files that hold weights: GGUF, ONNX graphs, CTranslate2 and OpenVINO.
_WEIGHTS = (".gguf", ".onnx", ".data", ".onnx_data", ".bin")


@dataclass(frozen=True, kw_only=True)
class InstalledRival:
    """A requested rival, and where it is installed.

    Attributes:
        choice: The rival.
        environment: Where it is installed.
    """

    choice: Choice
    environment: Environment


@dataclass(frozen=True, kw_only=True)
class RivalFiles:
    """A rival with its files.

    Attributes:
        note: The files, and what runs them.
        rival: The rival as the report records it.
        weight_bytes: Bytes of the files that hold weights.
        folder_bytes: Bytes of all files.
    """

    note: Note
    rival: Rival
    weight_bytes: int
    folder_bytes: int


def find_rivals(
    requests: Iterable[str], named: Mapping[str, str | Path]
) -> tuple[InstalledRival, ...]:
    """Find where the requested rivals are installed.

    Args:
        requests: Each ``ENGINE`` or ``ENGINE:VARIANT``.
        named: Paths of their installations that the user named, by name.

    Returns:
        The rivals, in order.
    """
    requested = choices(requests)
    environments = {
        choice.engine.name: find_environment(choice.engine, named)
        for choice in {choice.engine.name: choice for choice in requested}.values()
    }
    return tuple(
        InstalledRival(choice=choice, environment=environments[choice.engine.name])
        for choice in requested
    )


def check_source(source: FolderInfo | None) -> FolderInfo:
    """Refuse weights that no rival's file can be made from.

    Args:
        source: The folder whose weights the rivals get; None where there is none.

    Returns:
        The folder.

    Raises:
        SettingsError: If it is not a float, GPTQ or NF4 folder.
    """
    if source is None or source.form == "onnx":
        raise SettingsError(
            "a rival's file is made from a float, GPTQ or NF4 folder, and "
            f"{'none is compared' if source is None else f'{source.path} is an ONNX folder'}; "
            "name the folder whose weights the rivals get with --rival-source"
        )
    return source


def make_files(rival: InstalledRival, source: FolderInfo, name: str, scratch: Path) -> RivalFiles:
    """Make a rival's files.

    Args:
        rival: The rival.
        source: The folder whose weights it gets.
        name: Name of that folder in the report.
        scratch: Where to make them.

    Returns:
        The rival with its files.
    """
    note = make_rival(rival.choice, rival.environment, source, name, scratch)
    files = [file for file in Path(note.folder).rglob("*") if file.is_file()]
    return RivalFiles(
        note=note,
        rival=Rival(
            engine=note.engine,
            variant=note.variant,
            version=rival.environment.version,
            system=rival.environment.system,
            settings=note.settings,
            made=note.made,
            source=name,
        ),
        weight_bytes=sum(file.stat().st_size for file in files if file.suffix in _WEIGHTS),
        folder_bytes=sum(file.stat().st_size for file in files),
    )
