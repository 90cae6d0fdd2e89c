"""Outputs that appear whole or not at all.

A folder is written beside its target under a hidden name and renamed when it is finished. Long work
keeps its state in a hidden folder beside its target, so that the same call resumes.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from mistill.errors import FolderError, SettingsError, TargetExistsError
from mistill.folders.ownership import why_not_ours

_log = logging.getLogger(__name__)

_FULL_DISK = ("No space left", "File too large", "Disk quota exceeded")


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
        origin = Path(source).expanduser().resolve()
        if origin == place:
            raise FolderError(f"the target {target} is its own source; choose another target")
        if place in origin.parents:
            raise FolderError(f"the target {target} holds its source {source}; choose another")


@contextmanager
def creating(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Make a folder that appears whole or not at all.

    The body writes into a hidden folder beside the target, which is renamed when the body ends
    and removed when it fails. What a killed process left behind is removed by the next one.

    Args:
        target: Path of the folder.
        overwrite: Whether an existing folder is replaced; it stays until the new one is whole.

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
            _move_into_place(partial, path, overwrite)
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
    remove_leftovers(path)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        with _naming_a_full_disk(target):
            yield partial
            with partial.open("rb") as opened:
                os.fsync(opened.fileno())
            partial.replace(path)
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


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
    return any(phrase in str(error) for phrase in _FULL_DISK)


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
            _remove(item)
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
    """Turn the folder ``result`` inside a working folder into the target.

    Args:
        work: A folder from ``working`` that holds a finished folder ``result``.
        target: Path of the result.
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
        text: Content of the file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove partial outputs of killed processes beside a target; restore what one had replaced.

    Args:
        path: The target, a file or a folder.
    """
    for leftover in path.parent.glob(f".{path.name}.*"):
        owner, _, suffix = leftover.name.removeprefix(f".{path.name}.").partition(".")
        if suffix not in ("partial", "replaced") or not owner.isdigit() or _alive(int(owner)):
            continue
        if suffix == "replaced" and not path.exists():
            leftover.rename(path)
        else:
            _remove(leftover)


def _move_into_place(partial: Path, path: Path, overwrite: bool) -> None:
    sync_tree(partial)
    aside = path.parent / f".{path.name}.{os.getpid()}.replaced"
    if overwrite and path.exists():
        path.rename(aside)
    try:
        partial.rename(path)
    except OSError as error:
        if aside.exists():
            aside.rename(path)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise TargetExistsError(
                f"{path} was made by another process in the meantime; choose another name"
            ) from error
        raise
    sync_folder(path.parent)
    if aside.exists():
        _remove(aside)


def rename_synced(partial: Path, path: Path) -> None:
    """Rename a finished folder, so that a power cut leaves it whole or not at all.

    Args:
        partial: The folder, with all its files.
        path: Its name from now on, in the same folder; nothing is there.
    """
    sync_tree(partial)
    partial.rename(path)
    sync_folder(path.parent)


def sync_tree(folder: Path) -> None:
    """Wait until the files of a folder, and their names, are on the disk.

    Args:
        folder: The folder; those below it too.
    """
    for item in (folder, *folder.rglob("*")):
        if item.is_dir():
            sync_folder(item)
        elif item.is_file():
            with item.open("rb") as opened:
                os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can say so.

    Args:
        folder: The folder; files in it are synced by themselves.
    """
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(item: Path) -> None:
    if item.is_dir() and not item.is_symlink():
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
