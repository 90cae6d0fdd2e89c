"""What Windows or macOS lack, taken away here: the same is done in another way.

Each test says which call is missing there. Nothing of this stands for a run on those systems.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.figures import footprint
from benchmarks.measure import loading
from mistill import bounded
from mistill.chat import terminal_chat
from mistill.cli import outside
from mistill.cost_model import free_memory, processors
from mistill.engine import key_value_cache
from mistill.errors import FolderError, TextError
from mistill.folders import locking, publishing, renaming
from mistill.folders.location import is_remote
from mistill.judging import checks
from mistill.sources.source import resolve_model
from mistill.text.rows import check_texts

WINDOWS = SimpleNamespace(platform="win32")


@pytest.fixture
def on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, as far as folders are concerned: its way to lock, and no signal 0."""
    msvcrt = ModuleType("msvcrt")

    def locking_of(descriptor: int, mode: int, count: int) -> None:
        assert (mode, count) == (2, 1)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    vars(msvcrt).update(locking=locking_of, LK_NBLCK=2)

    def end_the_console(process: int, number: int) -> None:
        raise AssertionError(f"os.kill({process}, {number}) presses Ctrl-C on Windows")

    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    monkeypatch.setattr(renaming, "sys", WINDOWS)
    monkeypatch.setattr(locking, "sys", WINDOWS)
    monkeypatch.setattr(os, "kill", end_the_console)


def kernel_in_which(running: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Windows' kernel32, to which processes are running, ended or another user's."""
    closed: list[int] = []

    def open_process(right: int, inherited: bool, process: int) -> int | None:
        assert right == 0x1000
        return process if running.get(process) in ("runs", "ended") else None

    def exit_code(handle: Any, code: Any) -> int:
        code._obj.value = 259 if running[handle.value] == "runs" else 0
        return 1

    kernel = SimpleNamespace(
        OpenProcess=Function(open_process),
        GetExitCodeProcess=exit_code,
        CloseHandle=lambda handle: closed.append(handle.value),
    )
    monkeypatch.setattr(ctypes, "WinDLL", lambda name, use_last_error: kernel, raising=False)
    refused = 5 if "another's" in running.values() else 87
    monkeypatch.setattr(ctypes, "get_last_error", lambda: refused, raising=False)
    return closed


class Function:
    """A function of a library, whose result type can be set."""

    restype: Any = None

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


@pytest.mark.parametrize(
    ("state", "stays"), [("runs", True), ("ended", False), ("another's", True), ("none", False)]
)
def test_windows_is_asked_whether_a_process_runs_by_its_handle(
    state: str, stays: bool, tmp_path: Path, on_windows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = kernel_in_which({4711: state}, monkeypatch)
    partial = tmp_path / ".model.4711.partial"
    partial.mkdir()
    renaming.remove_leftovers(tmp_path / "model")
    assert partial.exists() == stays
    assert closed == ([4711] if state in ("runs", "ended") else [])


def test_a_folder_is_made_replaced_and_resumed_on_windows(
    tmp_path: Path, on_windows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_in_which({}, monkeypatch)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    synced: list[bool] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        # Windows syncs only what may be written.
        synced.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    target = tmp_path / "place" / "model"
    for content in ("[]\n", "[{}]\n"):
        with publishing.creating(target, overwrite="{" in content) as folder:
            publishing.write_atomically(folder / "lineage.json", content)
        assert (target / "lineage.json").read_text() == content
    assert synced
    assert all(synced)
    other = tmp_path / "place" / "other"
    with publishing.working(other, {"seed": 0}) as work:
        (work / "result").mkdir()
        # Windows moves no folder of which a file is open.
        open_files = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
        assert not [file for file in open_files if file.is_relative_to(target.parent)]
        with (
            pytest.raises(FolderError, match="another process is making"),
            publishing.working(other, {"seed": 0}),
        ):
            pass
        publishing.publish(work, other)
    assert sorted(item.name for item in target.parent.iterdir()) == ["model", "other"]
    with locking.temporary_folder() as scratch:
        (scratch / "a").touch()
    assert not scratch.exists()


def test_a_folder_that_a_program_has_open_is_not_replaced_and_stays(
    tmp_path: Path, on_windows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_in_which({}, monkeypatch)
    target = tmp_path / "model"
    with publishing.creating(target) as folder:
        publishing.write_atomically(folder / "lineage.json", "[]\n")
    rename = Path.rename

    def refused(self: Path, to: Path) -> Path:
        if self == target:
            raise PermissionError(13, "Access is denied")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refused)
    with (
        pytest.raises(FolderError, match="cannot be replaced: a program has one of its files open"),
        publishing.creating(target, overwrite=True) as folder,
    ):
        publishing.write_atomically(folder / "lineage.json", "[1]\n")
    assert (target / "lineage.json").read_text() == "[]\n"
    assert list(tmp_path.iterdir()) == [target]


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(1314, "A required privilege is not held by the client")


def test_without_symbolic_links_files_are_linked_hard_or_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("a")
    (tmp_path / "file").write_text("b")
    renaming.link_or_copy(tmp_path / "file", tmp_path / "one")
    assert (tmp_path / "one").is_symlink()
    monkeypatch.setattr(Path, "symlink_to", refuse)
    renaming.link_or_copy(tmp_path / "file", tmp_path / "two")
    renaming.link_or_copy(tmp_path / "folder", tmp_path / "copied")
    assert (tmp_path / "two").samefile(tmp_path / "file")
    assert not (tmp_path / "two").is_symlink()
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    renaming.link_or_copy(tmp_path / "file", tmp_path / "three")
    assert (tmp_path / "three").read_text() == "b"
    assert not (tmp_path / "three").samefile(tmp_path / "file")
    assert (tmp_path / "copied" / "a").read_text() == "a"


def test_limits_that_macos_refuses_leave_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    limited: list[int] = []

    def setrlimit(number: int, bounds: Any) -> None:
        # macOS has RLIMIT_AS, and refuses to set it.
        if number == resource.RLIMIT_AS:
            raise ValueError("current limit exceeds maximum limit")
        limited.append(number)

    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    # Elsewhere code whose memory is not bounded does not run.
    with pytest.raises(ValueError, match="current limit"):
        checks._limit()
    monkeypatch.setattr(checks, "sys", SimpleNamespace(platform="darwin"))
    checks._limit()
    assert limited == [resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE]
    limited.clear()
    bounded._limit_memory()
    assert limited == [resource.RLIMIT_CORE]


def test_memory_of_a_process_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(footprint, "Path", lambda _: tmp_path / "nothing")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert footprint.own_memory().peak_bytes >= used * 1024
    monkeypatch.setattr(footprint, "sys", SimpleNamespace(platform="darwin"))
    assert used <= footprint.own_memory().peak_bytes < used * 512  # macOS counts bytes

    def fill(process: Any, counters: Any, size: int) -> int:
        assert (process.value, size) == (77, ctypes.sizeof(counters._obj))
        counters._obj.peak, counters._obj.resident = 3_000_000_000, 2_000_000
        return 1

    kernel = SimpleNamespace(GetCurrentProcess=Function(lambda: 77))
    libraries = SimpleNamespace(kernel32=kernel, psapi=SimpleNamespace(GetProcessMemoryInfo=fill))
    monkeypatch.setattr(ctypes, "windll", libraries, raising=False)
    monkeypatch.setattr(footprint, "sys", WINDOWS)
    assert footprint.own_memory() == footprint.Memory(
        peak_bytes=3_000_000_000, resident_bytes=2_000_000
    )


def test_memory_of_a_machine_that_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert free_memory.physical_memory() == pages
    assert free_memory.free_memory(tmp_path) == pages // 2
    monkeypatch.delattr(os, "sysconf")
    assert free_memory.physical_memory() == 0
    assert free_memory.free_memory(tmp_path) == free_memory.UNKNOWN

    def fill(status: Any) -> int:
        status._obj.physical, status._obj.free = 8 << 30, 3 << 30
        return 1

    libraries = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=fill))
    monkeypatch.setattr(ctypes, "windll", libraries, raising=False)
    monkeypatch.setattr(free_memory, "sys", WINDOWS)
    assert free_memory.physical_memory() == 8 << 30
    assert free_memory.free_memory(tmp_path) == 3 << 30


def test_without_the_library_of_the_program_cold_loads_are_not_claimed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none(name: object) -> None:
        raise TypeError("expected str, bytes or os.PathLike object, not NoneType")

    (tmp_path / "file").write_text("a")
    monkeypatch.setattr(ctypes, "CDLL", none)
    assert loading.resident_share(tmp_path) == 1.0
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    loading.drop_from_page_cache(tmp_path)


def test_the_product_imports_without_the_modules_of_posix() -> None:
    program = """
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline", "posix_ipc"):
    sys.modules[name] = None
import mistill, mistill.cli.app, mistill.chat.bot, mistill.chat.terminal_chat
import mistill.engine.onnx_model, mistill.recipe, mistill.bounded, mistill.serve.running
import tune, distill, quantize, export, benchmarks
print(len(mistill.__all__) > 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "True\n", done.stderr


def sleep_for(seconds: float) -> float:
    """What a worker process is asked to do."""
    time.sleep(seconds)
    return seconds


def test_a_worker_that_cannot_be_waited_for_is_ended_by_a_timer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = SimpleNamespace(platform="win32", executable=sys.executable, path=sys.path)
    monkeypatch.setattr(bounded, "sys", here)
    monkeypatch.setattr(bounded, "SECONDS", 2.0)

    def none(*_: Any) -> None:
        raise OSError("an operation was attempted on something that is not a socket")

    monkeypatch.setattr("select.select", none)
    name = f"{__name__}:sleep_for"
    try:
        assert bounded.call_bounded(name, 0.0) == 0.0
        with pytest.raises(bounded.OutOfBoundsError, match="takes more than 2 seconds"):
            bounded.call_bounded(name, 60.0)
    finally:
        bounded._WORKERS.pop(name).stop()


def test_pages_of_the_cache_need_no_flags_of_posix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_value_cache, "sys", WINDOWS)
    monkeypatch.delattr(mmap, "MAP_PRIVATE")
    array = key_value_cache.pages((2, 3, 5), np.float16)
    assert array.shape == (2, 3, 5)
    assert array.dtype == np.float16
    assert not array.any()
    array[1, 2] = 4
    assert array.sum() == 20


def test_threads_are_counted_where_no_process_is_held_to_some(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert processors.usable_threads(tmp_path) == 6
    with processors.held_to_first_processor():
        pass


def test_a_prompt_from_a_pipe_is_read_to_its_end_on_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"What is a mistral?\n")
    os.close(writing)
    monkeypatch.setattr(terminal_chat, "os", SimpleNamespace(name="nt"))
    with os.fdopen(reading, encoding="utf-8") as stream:
        assert terminal_chat._read_pipe(stream) == ("What is a mistral?\n", False)


def test_signals_that_are_missing_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGHUP")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(outside.SignalledError), outside.ending_on_signals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("name", [r"C:\models\teacher", "C:/models/teacher", "D:teacher"])
def test_a_path_with_a_drive_is_no_address_and_no_name_on_the_hub(name: str) -> None:
    assert not is_remote(name)
    with pytest.raises(FolderError, match="there is no folder or file"):
        resolve_model(name)
    with pytest.raises(TextError, match="there is no file"):
        check_texts(name)
