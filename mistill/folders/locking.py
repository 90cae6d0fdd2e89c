"""Files and folders that one process has to itself, until it ends, however it ends."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mistill.errors import FolderError

_TEMPORARY = "mistill-"


@contextmanager
def held_alone(file: Path) -> Iterator[None]:
    """Keep other processes that ask for the same file from it while the body runs.

    Args:
        file: The file, which may be replaced meanwhile and need not exist.

    Yields:
        Nothing.

    Raises:
        FolderError: If another process holds it.
    """
    lock = file.with_name(f".{file.name}.lock")
    with locked(lock, f"another process has {file} open; wait for it or choose another file"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def locked(lock: Path, refusal: str) -> Iterator[None]:
    """Hold a lock that the system drops when this process ends, however it ends.

    Args:
        lock: The file to lock; it is made if need be, and stays.
        refusal: What to say if another process holds it.

    Yields:
        Nothing.

    Raises:
        FolderError: If another process holds it, or its folder cannot be written.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    try:
        opened = lock.open("w")
    except OSError as error:
        raise FolderError(f"{lock.parent} cannot be written: {error.strerror}") from error
    with opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderError(refusal) from error
        # The one that held it before may have removed the file after this one opened it.
        if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(opened.fileno())):
            raise FolderError(refusal)
        yield


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for files that are needed for a while, in the system's place for such.

    Yields:
        The empty folder, which goes at the end; those that killed processes left go now.
    """
    for lock in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*/lock"):
        with suppress(OSError, FolderError):
            if _is_mine(lock.parent) and _is_mine(lock):
                with locked(lock, "it is in use"):
                    shutil.rmtree(lock.parent)
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY) as name:
        content = Path(name) / "content"
        content.mkdir()
        with locked(Path(name) / "lock", "it is in use"):
            yield content


def _is_mine(item: Path) -> bool:
    """Whether a file or folder in a place that all users share is this user's, and no link."""
    return not item.is_symlink() and (sys.platform == "win32" or item.stat().st_uid == os.getuid())
