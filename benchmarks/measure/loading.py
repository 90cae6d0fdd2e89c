"""Loading time of a model, from disk and from the page cache.

Every loading has a new process. Before a cold one the kernel is asked to drop the files from its
page cache, which needs no more than the right to read them. Whether it did is checked, since it
does not where the file system is in memory or another process has the file mapped.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures.footprint import Load
from benchmarks.measure.children import start_children
from benchmarks.rivals.engines import Note
from mistill.engine.language_model import Provider

NOT_DROPPED = "the files could not be dropped from the page cache, so cold loading was not timed"

_STILL_THERE = 0.05
_CHUNK = 1 << 24


def time_load(
    opened: Path | Note,
    *,
    cold: bool,
    prompt: Sequence[int],
    threads: int,
    provider: Provider = "cpu",
) -> Load | None:
    """Load a model once, in a new process.

    Args:
        opened: The folder, or a rival's files with what runs them.
        cold: Whether its files are dropped from the page cache first; else they are read into it.
        prompt: The prompt that the model reads right after.
        threads: Threads that its engine computes with.
        provider: Execution provider, if it is an ONNX folder.

    Returns:
        The times; None if the files could not be dropped.
    """
    with start_children([opened], threads, provider) as (child,):
        folder = child.folder
        if cold:
            drop_from_page_cache(folder)
            if resident_share(folder) > _STILL_THERE:
                return None
        else:
            read_into_page_cache(folder)
        answer = child.ask("open")
        turn = child.ask("turn", prompt=list(prompt), new_tokens=2, seconds=0.0)
    return Load(
        cold=cold,
        seconds=answer["load_seconds"],
        first_token_seconds=turn["first_token_seconds"],
    )


def drop_from_page_cache(folder: Path) -> None:
    """Ask the kernel to drop the files of a folder from the page cache, where it has such a call.

    Args:
        folder: The folder, with its subfolders.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for file in _files(folder):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_page_cache(folder: Path) -> None:
    """Read the files of a folder into the page cache.

    Args:
        folder: The folder, with its subfolders.
    """
    for file in _files(folder):
        with file.open("rb") as opened:
            while opened.read(_CHUNK):
                pass


def resident_share(folder: Path) -> float:
    """Share of the files of a folder that is in the page cache.

    Args:
        folder: The folder, with its subfolders.

    Returns:
        Between 0 and 1, of all pages; 1 where it is not known.
    """
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no library of the program itself
        return 1.0
    if not hasattr(library, "mincore"):
        return 1.0
    library.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    resident_pages = pages = 0
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
        resident_pages += sum(byte & 1 for byte in answer)
        pages += count
    return resident_pages / max(pages, 1)


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]
