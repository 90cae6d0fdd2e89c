"""Outputs that appear whole or not at all.

A folder is written beside its target under a hidden name and renamed when it is finished. Long work
keeps its state in a hidden folder beside its target, so that the same call resumes.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from mistill.errors import FolderError, SettingsError, TargetExistsError
from mistill.folders.locking import locked
from mistill.folders.model_card import add_card
from mistill.folders.ownership import why_not_ours
from mistill.folders.renaming import (
    FINISHED,
    move_into_place,
    remove,
    remove_finished_work,
    remove_leftovers,
    remove_work,
    sync_file,
    sync_folder,
)
from mistill.settings import refuse_object

_log = logging.getLogger(__name__)

# What libraries say when the system takes fewer bytes than they wrote: the system's own words,
# numpy's, and torch's.
_FULL_DISK = re.compile(
    "No space left|File too large|Disk quota exceeded|[0-9]+ requested and [0-9]+ written"
    "|unexpected pos [0-9]+ vs [0-9]+|basic_ios::clear: iostream error|PytorchStreamWriter failed"
)


def refuse_existing(
    target: str | Path, overwrite: bool = False, sources: Sequence[str | Path] = ()
) -> Path:
    """Refuse a target that exists, before any work is done for it.

    What may be replaced is a folder that mistill made and that nobody put anything into, and
    never a source, a folder that holds one, or a link.

    Args:
        target: Path of the output.
        overwrite: Whether an existing folder may be replaced.
        sources: What the output is made from: paths, or names that are none.

    Returns:
        The target as an absolute path.

    Raises:
        TargetExistsError: If the target exists and may not be replaced.
        FolderError: If its parent cannot be written to, or it is not mistill's to replace.
    """
    path = Path(target).expanduser().absolute()
    _refuse_link(path, target)
    remove_leftovers(path)
    remove_finished_work(path)
    if path.exists() and not overwrite:
        raise TargetExistsError(f"{target} exists already; choose another name, or overwrite it")
    if overwrite and path.is_file():
        raise FolderError(f"{target} is a file, not a folder that could be overwritten")
    _refuse_source(path, target, sources)
    if path.is_dir() and any(path.iterdir()):
        reason = why_not_ours(path)
        if reason is not None:
            raise FolderError(f"{target} {reason}; it is not replaced: choose another target")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise FolderError(f"{target} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise FolderError(f"{target} cannot be made: {parent} is not writable")
    return path


def _refuse_link(path: Path, target: str | Path) -> None:
    if path.is_symlink():
        raise FolderError(
            f"{target} is a link to {path.readlink()}, and links are not replaced; "
            "choose another target"
        )


def _refuse_source(path: Path, target: str | Path, sources: Sequence[str | Path]) -> None:
    """Refuse a target that is a source, or holds one."""
    place = path.resolve()
    for source in sources:
        refuse_object(source)
        origin = Path(source).expanduser().resolve()
        if origin == place:
            raise FolderError(f"the target {target} is its own source; choose another target")
        if place in origin.parents:
            raise FolderError(f"the target {target} holds its source {source}; choose another")


@contextmanager
def creating(target: str | Path, overwrite: bool = False, *, card: bool = True) -> Iterator[Path]:
    """Make a folder that appears whole or not at all.

    The body writes into a hidden folder beside the target, which is renamed when the body ends
    and removed when it fails. What a killed process left behind is removed by the next one.

    Args:
        target: Path of the folder.
        overwrite: Whether an existing folder is replaced; it stays until the new one is whole.
        card: Whether a model gets its model card.

    Yields:
        The hidden folder to write into.

    Raises:
        FolderError: If the disk is full.
    """
    path = refuse_existing(target, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        with _naming_a_full_disk(target):
            yield partial
            if card:
                add_card(partial, path.name)
            move_into_place(partial, path, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def creating_file(
    target: str | Path, overwrite: bool = False, sources: Sequence[str | Path] = ()
) -> Iterator[Path]:
    """Make a large file that appears whole or not at all.

    Args:
        target: Path of the file.
        overwrite: Whether an existing file is replaced; it stays until the new one is whole.
        sources: What the file is made from: paths, or names that are none.

    Yields:
        The hidden file beside it to write.

    Raises:
        TargetExistsError: If the target exists and may not be replaced.
        FolderError: If the target is a folder, or the disk is full.
    """
    path = Path(target).expanduser().absolute()
    if path.is_dir():
        raise FolderError(f"{target} is a folder; give the name of the file to make")
    _refuse_link(path, target)
    _refuse_source(path, target, sources)
    if not (overwrite and path.is_file()):
        refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        yield partial


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A hidden folder beside a target for what is made on the way to it.

    Args:
        target: The target, an absolute path.

    Yields:
        The empty folder, which goes at the end; one that a killed process left goes with the next
        step on the same target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    scratch = target.parent / f".{target.name}.{os.getpid()}.scratch"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _naming_a_full_disk(target: str | Path, then: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_full_disk(error):
            raise FolderError(
                f"there is no room to write {target}: free some space on its disk and run the same "
                f"command again{then}"
            ) from error
        raise


def is_full_disk(error: BaseException) -> bool:
    """Whether an error means that the disk is full, whichever library raised it.

    Args:
        error: The exception.

    Returns:
        True for a full disk, an exceeded quota or a file larger than is allowed.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return True
    return _FULL_DISK.search(str(error)) is not None


@contextmanager
def working(target: str | Path, key: Mapping[str, Any], *, anew: bool = False) -> Iterator[Path]:
    """Keep the state of long work in a hidden folder beside its target, so that it can resume.

    The folder outlives an interruption, and the same work resumes in it. ``key`` says what the
    result depends on; state of other work is not removed without being asked to. The folder goes
    when ``publish`` is called.

    Args:
        target: Path of the result.
        key: What the result depends on: settings and fingerprints of sources, as JSON values.
        anew: Whether state of other work is removed, and the work begins from the start.

    Yields:
        The hidden folder, empty or as the interrupted work left it.

    Raises:
        SettingsError: If state of other work is there and may not be removed.
        FolderError: If another process is at work on the same target, or the disk is full.
    """
    path = Path(target).expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.parent / f".{path.name}.working"
    work.mkdir(exist_ok=True)
    with _only_one(work, target):
        if path.exists() and not anew:
            # Another process made it after this one had looked.
            if not (work / "key.json").exists():
                shutil.rmtree(work)
            raise TargetExistsError(f"{target} was made by another process in the meantime")
        _claim(work, target, key, anew)
        with _naming_a_full_disk(target, "; it will resume"):
            yield work


def begun_on(target: str | Path) -> date:
    """The day on which interrupted work for a target was begun, or today.

    A chat template may write the date. Work that resumes on another day renders its text with the
    day on which it was begun, which its key names, so that the text is the same.

    Args:
        target: Path of the result.

    Returns:
        The day.
    """
    path = Path(target).expanduser().absolute()
    recorded = path.parent / f".{path.name}.working" / "key.json"
    key = _read_key(recorded) if recorded.is_file() else {}
    return day_of(key.get("date"))


def day_of(recorded: Any) -> date:
    """A day that was written down as ISO 8601 has it, or today.

    Args:
        recorded: Such as "2026-01-31"; anything else stands for today.

    Returns:
        The day.
    """
    try:
        return date.fromisoformat(recorded)
    except (TypeError, ValueError):
        return date.today()


def _claim(work: Path, target: str | Path, key: Mapping[str, Any], anew: bool) -> None:
    """Empty a working folder for new work; refuse where it holds state of other work."""
    recorded = work / "key.json"
    text = json.dumps(key, sort_keys=True, indent=1)
    if recorded.exists():
        if recorded.read_text("utf-8") == text:
            return
        changes = changes_between(_read_key(recorded), json.loads(text))
        if not anew:
            raise SettingsError(
                f"{target} was begun with other settings or inputs ({changes}); repeat the call "
                f"that began it to resume, give overwrite to begin anew, or remove {work}"
            )
        _log.warning("%s begins anew: %s", target, changes)
    for item in work.iterdir():
        if item.name != "lock":
            remove(item)
    write_atomically(recorded, text)


def _read_key(file: Path) -> dict[str, Any]:
    try:
        key = json.loads(file.read_text("utf-8"))
    except (UnicodeDecodeError, ValueError):
        key = None
    return key if isinstance(key, dict) else {}


def changes_between(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between the keys of two runs, in words.

    Args:
        old: The key of the run that was begun; fingerprints, and settings in mappings.
        new: The key of this one.

    Returns:
        Old and new values of settings, and names of inputs, with commas between them.
    """
    words = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            words += [
                f"{option} is {after.get(option)!r} and was {before.get(option)!r}"
                for option in sorted(before.keys() | after.keys())
                if before.get(option) != after.get(option)
            ]
        elif before != after:
            words.append(f"{name} has changed")
    return ", ".join(words) or "its notes are damaged"


def publish(work: Path, target: str | Path, overwrite: bool = False) -> Path:
    """Turn the folder ``result`` inside a working folder into the target; a model gets its card.

    Args:
        work: A folder from ``working`` that holds a finished folder ``result``.
        target: Path of the result.
        overwrite: Whether an existing folder is replaced.

    Returns:
        The target.
    """
    path = refuse_existing(target, overwrite)
    add_card(work / "result", path.name)
    (work / FINISHED).touch()
    move_into_place(work / "result", path, overwrite)
    remove_work(work)
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write a small file that appears whole or not at all.

    Args:
        path: The file; replaced if it exists.
        text: Content of the file.

    Raises:
        FolderError: If the disk is full.
    """
    with replacing(path) as partial:
        partial.write_text(text, "utf-8", newline="\n")


def write_json(path: Path, value: Any, *, indent: int = 2, ascii_only: bool = True) -> None:
    """Write a JSON file that appears whole or not at all.

    Args:
        path: The file; replaced if it exists.
        value: What JSON can hold.
        indent: Spaces before what lies one level deeper.
        ascii_only: Whether other characters are written as escapes.

    Raises:
        FolderError: If the disk is full.
    """
    write_atomically(path, json.dumps(value, indent=indent, ensure_ascii=ascii_only) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file that appears whole or not at all, in the place of one that may be there.

    Args:
        path: The file; replaced if it exists.

    Yields:
        The hidden file beside it to write; it is removed if the body fails, and one that a killed
        process left is removed too.

    Raises:
        FolderError: If the disk is full.
    """
    remove_leftovers(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with _naming_a_full_disk(path):
            yield partial
            sync_file(partial)
            partial.replace(path)
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _only_one(work: Path, target: str | Path) -> Iterator[None]:
    with locked(
        work / "lock", f"another process is making {target}; wait for it or choose another target"
    ):
        yield
