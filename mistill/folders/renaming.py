"""Renames that leave one of two things at every moment, and what killed processes leave behind."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import sys
from pathlib import Path

from mistill.errors import FolderError, TargetExistsError

FINISHED = "finished"
"""File in the folder of long work whose result has been given its name."""

# Of Linux's renameat2: relative to the current folder, and both names are exchanged.
_HERE, _EXCHANGE = -100, 2


def remove_leftovers(path: Path) -> None:
    """Remove partial outputs of killed processes beside a target; restore what one had replaced.

    Args:
        path: The target, a file or a folder.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        owner, _, suffix = leftover.name.removeprefix(f".{path.name}.").partition(".")
        if (
            suffix not in ("partial", "replaced", "scratch")
            or not owner.isdigit()
            or _alive(int(owner))
            or (suffix == "scratch" and int(owner) == os.getpid())
        ):
            continue
        if suffix == "replaced" and not path.exists():
            leftover.rename(path)
        else:
            remove(leftover)


def remove_finished_work(path: Path) -> None:
    """Remove the working folder of a step that was killed after its result had its name.

    Args:
        path: The target.
    """
    work = path.parent / f".{path.name}.working"
    if path.exists() and (work / FINISHED).exists() and not (work / "result").exists():
        shutil.rmtree(work, ignore_errors=True)


def remove_work(work: Path) -> None:
    """Remove the folder of long work that is finished.

    Args:
        work: The folder.
    """
    # Under this name the next step on the same target removes what a kill leaves of it.
    name = work.name.removesuffix(".working")
    aside = work.with_name(f"{name}.{os.getpid()}.partial")
    work.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def move_into_place(partial: Path, path: Path, overwrite: bool) -> None:
    """Give a finished folder its name; what had the name before is there until then.

    Args:
        partial: The finished folder, on the same disk.
        path: The name.
        overwrite: Whether a folder of that name is replaced.

    Raises:
        TargetExistsError: If another process made one in the meantime.
        FolderError: If what has the name cannot be moved.
    """
    sync_tree(partial)
    if overwrite and path.exists() and _exchange(partial, path):
        sync_folder(path.parent)
        remove(partial)
        return
    aside = path.parent / f".{path.name}.{os.getpid()}.replaced"
    if overwrite and path.exists():
        try:
            path.rename(aside)
        except PermissionError as error:
            # Windows moves no folder of which a program has a file open.
            raise FolderError(
                f"{path} cannot be replaced: a program has one of its files open, or it is "
                "protected; end that program, or choose another target"
            ) from error
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
        remove(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step, where the system can."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library without it
        return False
    names = (os.fsencode(one), os.fsencode(other))
    return bool(rename(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0)


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
            sync_file(item)


def sync_file(file: Path) -> None:
    """Wait until the content of a file is on the disk.

    Args:
        file: The file, closed by now.
    """
    # Windows syncs only what may be written.
    with file.open("r+b" if sys.platform == "win32" else "rb") as opened:
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


def remove(item: Path) -> None:
    """Remove a file, a link or a folder with all that is in it.

    Args:
        item: Its path.
    """
    if item.is_dir() and not item.is_symlink():
        shutil.rmtree(item)
    else:
        item.unlink()


def link_or_copy(item: Path, place: Path) -> None:
    """Let a file or folder be found in another place too, without a copy where the system allows.

    Args:
        item: The file or folder.
        place: Where it is to be found; nothing is there.
    """
    try:
        place.symlink_to(item)
    except (OSError, NotImplementedError):
        # Windows lets only developers and administrators make symbolic links.
        if item.is_dir():
            shutil.copytree(item, place)
            return
        try:
            place.hardlink_to(item)
        except (OSError, NotImplementedError):  # another disk, or a file system without them
            shutil.copy2(item, place)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    if sys.platform == "win32":  # where os.kill ends a process, or a whole console with Ctrl-C
        return _alive_on_windows(process)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# Of Windows: the right to ask about a process, what refuses it, and what one says that runs.
_MAY_ASK, _REFUSED, _STILL_RUNS = 0x1000, 5, 259


def _alive_on_windows(process: int) -> bool:
    kernel = getattr(ctypes, "WinDLL")("kernel32", use_last_error=True)  # noqa: B009
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = kernel.OpenProcess(_MAY_ASK, False, process)
    if not handle:
        return bool(getattr(ctypes, "get_last_error")() == _REFUSED)  # noqa: B009
    code = ctypes.c_ulong()
    try:
        answered = kernel.GetExitCodeProcess(ctypes.c_void_p(handle), ctypes.byref(code))
    finally:
        kernel.CloseHandle(ctypes.c_void_p(handle))
    return not answered or code.value == _STILL_RUNS
