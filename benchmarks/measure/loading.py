"""How long a model takes to be opened: from a disk that has to be read, and from memory.

Every loading has a process of its own, which has opened nothing before. To make the files of a
folder cold, the kernel is asked to drop them from its page cache, which needs no rights but those
to read them; whether it did is looked up, since it does not where a file system lives in memory or
another process has the file mapped.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures.footprint import Load
from benchmarks.measure.children import start_children

STAYED = "the files could not be dropped from the page cache, so no load is a cold one"

_STILL_THERE = 0.05
_CHUNK = 1 << 24


def time_load(folder: Path, *, cold: bool, prompt: Sequence[int], threads: int) -> Load | None:
    """Load a model once, in a process of its own.

    Args:
        folder: The folder.
        cold: Whether its files are dropped from the page cache first; else they are read into it.
        prompt: What the model reads right after.
        threads: Threads that its engine computes with.

    Returns:
        The times; None if the files were to be dropped and stayed.
    """
    with start_children([folder], threads) as (child,):
        if cold:
            drop(folder)
            if resident_share(folder) > _STILL_THERE:
                return None
        else:
            read(folder)
        opened = child.ask("open")
        turn = child.ask("turn", prompt=list(prompt), new_tokens=2, seconds=0.0)
    return Load(
        cold=cold,
        seconds=opened["load_seconds"],
        first_token_seconds=turn["first_token_seconds"],
    )


def drop(folder: Path) -> None:
    """Ask the kernel to forget the files of a folder; not every system can be asked.

    Args:
        folder: The folder; of what lies below it too.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for file in _files(folder):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> None:
    """Read the files of a folder, so that the kernel holds them.

    Args:
        folder: The folder; of what lies below it too.
    """
    for file in _files(folder):
        with file.open("rb") as opened:
            while opened.read(_CHUNK):
                pass


def resident_share(folder: Path) -> float:
    """How much of the files of a folder the kernel holds in memory.

    Args:
        folder: The folder; of what lies below it too.

    Returns:
        Between 0 and 1, of all pages; 1 where the system does not say.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mincore"):
        return 1.0
    library.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    held = pages = 0
    for file in _files(folder):
        size = file.stat().st_size
        if not size:
            continue
        count = -(-size // mmap.PAGESIZE)
        answer = (ctypes.c_ubyte * count)()
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as m:
            view = ctypes.c_char.from_buffer(m)
            failed = library.mincore(ctypes.addressof(view), size, ctypes.addressof(answer))
            del view  # a mapping that is looked at cannot be closed
        if failed:
            return 1.0
        held += sum(byte & 1 for byte in answer)
        pages += count
    return held / max(pages, 1)


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]
