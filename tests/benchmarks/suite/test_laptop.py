"""Programs are ended at a limit of memory or time, and what they said until then is kept."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite import engine_tables, laptop
from benchmarks.suite.memory_limit import Ended, find_way, held_bytes, run_limited

ROOT = Path(__file__).parents[3]
SIZE = "1.2 B"
HOLD = "import sys, time; kept = b'x' * int(sys.argv[1]); print('held', flush=True); time.sleep(60)"

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")


def hold(size: int) -> list[str]:
    return [sys.executable, "-c", HOLD, str(size)]


@needs_proc
def test_a_program_above_the_limit_is_ended_and_what_it_said_is_kept() -> None:
    ended = run_limited(hold(200_000_000), "watching", 100_000_000, 60)
    assert ended.ending == "memory"
    assert ended.peak_bytes > 100_000_000
    assert not ended.errors


@needs_proc
def test_the_same_program_within_the_limit_goes_on_until_its_time_is_over() -> None:
    ended = run_limited(hold(1_000), "watching", 100_000_000, 2)
    assert (ended.ending, ended.lines) == ("time", ["held\n"])
    assert 0 < ended.peak_bytes < 100_000_000


@needs_proc
def test_without_a_limit_a_program_may_hold_what_it_likes() -> None:
    words = [sys.executable, "-c", "kept = b'x' * 200_000_000; print(len(kept))"]
    ended = run_limited(words, "none", 100_000_000, 60)
    assert (ended.ending, ended.lines) == ("finished", ["200000000\n"])


@needs_proc
@pytest.mark.parametrize(("ready", "ending"), [(None, "finished"), ("ready", "memory")])
def test_mapped_files_count_once_a_program_is_ready(
    ready: str | None, ending: str, tmp_path: Path
) -> None:
    file = tmp_path / "large"
    file.write_bytes(bytes(150_000_000))
    program = (
        "import mmap, sys, time; file = open(sys.argv[1], 'rb'); print('ready', flush=True); "
        "mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); "
        "print(sum(mapped[place] for place in range(0, len(mapped), 4096)), flush=True); "
        "time.sleep(1)"
    )
    words = [sys.executable, "-c", program, str(file)]
    ended = run_limited(words, "watching", 100_000_000, 60, ready=ready)
    assert ended.ending == ending
    assert ended.lines[0] == "ready\n"


def test_a_program_that_fails_by_itself_is_told_from_one_that_was_ended() -> None:
    ended = run_limited([sys.executable, "-c", "raise OSError('odd')"], "watching", 10**9, 60)
    assert ended.ending == "failed"
    assert ended.errors.endswith("OSError: odd\n")


@needs_proc
def test_memory_of_a_process_that_has_gone_is_none() -> None:
    kept = held_bytes(os.getpid())
    assert 1_000_000 < kept < held_bytes(os.getpid(), mapped=True)
    assert held_bytes(2**22 + 1) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="a program of the shell stands for systemd-run")
@pytest.mark.parametrize(
    ("says", "way"),
    [("echo 8000", "systemd"), ("echo max", "watching"), ("exit 1", "watching")],
)
def test_a_scope_counts_only_where_the_limit_holds_in_it(
    says: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "systemd-run"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert find_way(8000) == way
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert find_way(8000) == "watching"


@pytest.mark.parametrize(
    ("way", "limited", "dropped"),
    [("systemd", True, 1), ("systemd", False, 0), ("watching", True, 0)],
)
def test_pages_that_others_have_read_are_dropped_before_a_control_group_counts(
    way: Any, limited: bool, dropped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    ways: list[str] = []

    def run(words: Any, way: str, *_: Any, **__: Any) -> Ended:
        ways.append(way)
        return Ended(lines=[event(event="loaded", seconds=1.0)])

    monkeypatch.setattr(laptop, "drop_from_page_cache", folders.append)
    monkeypatch.setattr(laptop, "run_limited", run)
    (tmp_path / "model.onnx.data").write_bytes(bytes(7))
    row = laptop.Row("onnx", 2, 512, limited)
    found = laptop.measure_row(row, tmp_path, way, 8000, 60, 3)
    assert folders == [tmp_path] * dropped
    assert ways == [way if limited else "none"]
    assert (found["weight_bytes"], found["load_seconds"]) == (7, 1.0)


def event(**values: Any) -> str:
    return json.dumps(values) + "\n"


def test_figures_are_those_of_whole_replies_after_the_first() -> None:
    lines = ["noise\n", event(event="loaded", seconds=4.0)]
    for reply, start in ((0, 9.0), (1, 1.0), (2, 2.0)):
        lines += [event(event="token", reply=reply, seconds=start + token) for token in range(3)]
    lines.append(event(event="memory", bytes=500))
    found = laptop.figures(Ended(lines=lines[:-2] + lines[-1:], peak_bytes=400), 3)
    assert found == {
        "ending": "finished",
        "load_seconds": 4.0,
        "first_token_seconds": [1.0, 2.0],
        "reply_seconds": [3.0],
        "unfinished": None,
        "peak_memory_bytes": 500,
    }


def test_of_a_reply_that_was_ended_it_is_said_how_far_it_came() -> None:
    lines = [event(event="token", reply=0, seconds=second) for second in (20.0, 40.0)]
    found = laptop.figures(Ended(ending="time", lines=lines), 3)
    assert (found["first_token_seconds"], found["unfinished"]) == ([20.0], [2, 40.0])
    assert found["reply_seconds"] == []
    nothing = laptop.figures(Ended(ending="memory"), 3)
    assert (nothing["load_seconds"], nothing["unfinished"]) == (None, None)


def row(**changed: Any) -> dict[str, Any]:
    return {
        "form": "onnx",
        "limited": True,
        "parameters": 1_220_000_000,
        "weight_bytes": 740_000_000,
        "ending": "finished",
        "load_seconds": 1.25,
        "first_token_seconds": [0.4, 0.3, 0.5],
        "reply_seconds": [2.0, 2.1, 2.2],
        "unfinished": None,
        "peak_memory_bytes": 950_000_000,
        **changed,
    }


def test_the_table_says_who_fits_and_who_answers_in_time() -> None:
    silent: dict[str, Any] = {"load_seconds": None, "first_token_seconds": [], "reply_seconds": []}
    rows = {
        "16-bit": row(form="16-bit", ending="memory", **silent),
        "16-bit-unlimited": row(form="16-bit", limited=False),
        "nf4": row(form="nf4", ending="time", reply_seconds=[], unfinished=[7, 95.5]),
        "1.2b": row(),
    }
    found = {
        "limit_bytes": 8_000_000_000,
        "new_tokens": 60,
        "prompt_tokens": 60,
        "replies": 3,
        "threads": 2,
        "limited_by": "watching",
        "rows": rows,
    }
    lines = engine_tables.laptop(found)
    seconds = ("1.25", "0.400", "2.10")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:6]]
    assert cells == [
        [f"{SIZE}, transformers, 16 bits", "0.74", "no", "", "", "", ""],
        [f"{SIZE}, transformers, 16 bits, no limit of memory", "0.74", "", "0.9", *seconds],
        [f"{SIZE}, transformers, NF4", "0.74", "yes", "0.9", *seconds[:2], "7 tokens in 95.5"],
        [f"{SIZE}, mistill, 4-bit ONNX", "0.74", "yes", "0.9", *seconds],
    ]
    assert "fits in 8 GB" in lines[0]
    assert lines[-1].endswith("and mapped weights too while it writes.")


@pytest.mark.slow
@needs_proc
def test_every_kind_of_row_answers_in_a_rehearsal() -> None:
    command = [sys.executable, "-m", "benchmarks.suite.laptop", "--quick", "--replies", "1"]
    names = ["16-bit", "16-bit-unlimited", "nf4", "1.2b"]
    done = subprocess.run(
        [*command, "--rows", *names], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found["rows"]) == names
    for one in found["rows"].values():
        assert one["ending"] == "finished"
        assert 0 < one["first_token_seconds"][0] < one["reply_seconds"][0]
        assert one["weight_bytes"] > 10_000_000
    sizes = {name: one["weight_bytes"] for name, one in found["rows"].items()}
    assert sizes["16-bit"] == sizes["16-bit-unlimited"] > sizes["nf4"] > sizes["1.2b"]
    assert found["limited_by"] in ("systemd", "watching")
