"""The rivals of one comparison: found before anything large is loaded, then given their files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures.rival import Rival
from benchmarks.rivals.engines import NOTE_FILE, Choice, choices, read_note
from benchmarks.rivals.environment import Environment, find_environment
from benchmarks.rivals.making import make_rival
from mistill.errors import SettingsError
from mistill.folders.folder import FolderInfo

# Files that hold weights: GGUF, ONNX graphs, CTranslate2 and OpenVINO.
_WEIGHTS = (".gguf", ".onnx", ".data", ".onnx_data", ".bin")


@dataclass(frozen=True, kw_only=True)
class InstalledRival:
    """A rival that was asked for, and where it is installed.

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
        folder: What a child process opens.
        rival: What the report says of it.
        weight_bytes: Bytes of the files that hold weights.
        folder_bytes: Bytes of all files.
    """

    folder: Path
    rival: Rival
    weight_bytes: int
    folder_bytes: int


def find_rivals(
    words: Iterable[str], named: Mapping[str, str | Path]
) -> tuple[InstalledRival, ...]:
    """Find the rivals that were asked for.

    Args:
        words: Each ``ENGINE`` or ``ENGINE:VARIANT``.
        named: Where they are installed, by name.

    Returns:
        The rivals, in order; each environment is asked once.
    """
    wanted = choices(words)
    found = {
        choice.engine.name: find_environment(choice.engine, named)
        for choice in {choice.engine.name: choice for choice in wanted}.values()
    }
    return tuple(
        InstalledRival(choice=choice, environment=found[choice.engine.name]) for choice in wanted
    )


def check_source(source: FolderInfo | None) -> FolderInfo:
    """Refuse weights that no rival's file can be made of.

    Args:
        source: The folder whose weights the rivals shall get; None where none was found.

    Returns:
        The same.

    Raises:
        SettingsError: If it is not a float, GPTQ or NF4 folder.
    """
    if source is None or source.form == "onnx":
        raise SettingsError(
            "a rival's file is made of a float, GPTQ or NF4 folder, and "
            f"{'none is compared' if source is None else f'{source.path} is an ONNX folder'}; "
            "name the folder whose weights the rivals get with --rival-source"
        )
    return source


def make_files(
    contestant: InstalledRival, source: FolderInfo, name: str, scratch: Path
) -> RivalFiles:
    """Make a rival's files.

    Args:
        contestant: The rival.
        source: The folder whose weights it gets.
        name: What that folder is called in the report.
        scratch: Where to make them.

    Returns:
        The rival with its files.
    """
    folder = make_rival(contestant.choice, contestant.environment, source, name, scratch)
    note = read_note(folder)
    assert note is not None, "make_rival leaves a note"
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != NOTE_FILE]
    return RivalFiles(
        folder=folder,
        rival=Rival(
            engine=note.engine,
            variant=note.variant,
            version=contestant.environment.version,
            system=contestant.environment.system,
            settings=note.settings,
            made=note.made,
            source=name,
        ),
        weight_bytes=sum(file.stat().st_size for file in files if file.suffix in _WEIGHTS),
        folder_bytes=sum(file.stat().st_size for file in files),
    )
