"""Files and folders that one process has to itself, until it ends, however it ends."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

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
        with _locked_on_windows(lock, refusal):
            yield
        return
    with _opened(lock) as opened:
        import fcntl

        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderError(refusal) from error
        # The one that held it before may have removed the file after this one opened it.
        if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(opened.fileno())):
            raise FolderError(refusal)
        yield


@contextmanager
def _locked_on_windows(lock: Path, refusal: str) -> Iterator[None]:
    """Hold a lock where an open file keeps its folder from being renamed and removed.

    So the file that is locked is another one, in the user's folder for temporary files; its name
    is made of the lock's.
    """
    import msvcrt

    with _opened(lock):
        pass
    name = hashlib.sha256(os.path.normcase(lock.resolve()).encode()).hexdigest()[:32]
    with _opened(Path(tempfile.gettempdir()) / f"{_TEMPORARY}{name}.lock") as opened:
        try:
            getattr(msvcrt, "locking")(opened.fileno(), getattr(msvcrt, "LK_NBLCK"), 1)  # noqa: B009
        except OSError as error:
            raise FolderError(refusal) from error
        yield


def _opened(file: Path) -> IO[str]:
    try:
        return file.open("a")  # what another process has locked, Windows lets nobody empty
    except OSError as error:
        raise FolderError(f"{file.parent} cannot be written: {error.strerror}") from error


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
