from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import benchmarks.measure.child
import export
from benchmarks.figures.latency import SETTLE_SECONDS, time_turn
from benchmarks.measure.child import Worker
from benchmarks.measure.children import Child, start_children
from mistill.errors import FolderError, MissingExtraError, MistillError

REPOSITORY = Path(benchmarks.measure.child.__file__).parents[2]
TURN: dict[str, Any] = {"prompt": [5, 6, 7, 8], "new_tokens": 4, "seconds": 10.0}


@pytest.fixture(scope="module")
def child(model: Path) -> Iterator[Child]:
    """One process that runs the two-layer model, open."""
    with start_children([model], threads=1) as (started,):
        started.ask("open")
        yield started


def test_a_child_writes_and_says_how_long_it_took(child: Child):
    began = time.perf_counter()
    answer = child.ask("turn", **TURN)
    whole = time.perf_counter() - began

    assert answer["prompt_tokens"] == 4
    assert len(answer["token_seconds"]) == 3
    assert min(answer["token_seconds"]) > 0
    assert answer["first_token_seconds"] + sum(answer["token_seconds"]) < whole


def test_a_turn_begins_when_the_engine_before_has_come_to_rest(
    model: Path, monkeypatch: pytest.MonkeyPatch
):
    worker = Worker(model, threads=1)
    worker.open()
    events = []

    def noted(*given: Any, **named: Any) -> Any:
        events.append("turn")
        return time_turn(*given, **named)

    monkeypatch.setattr("benchmarks.measure.child.time_turn", noted)
    monkeypatch.setattr(time, "sleep", events.append)
    worker.ask("turn", **TURN)
    # ONNX Runtime's threads spin for some 35 ms after the last step.
    assert events == [SETTLE_SECONDS, "turn"]
    assert SETTLE_SECONDS > 0.05


def test_transformers_own_loop_writes_as_many_tokens(child: Child):
    answer = child.ask("turn", **TURN, transformers=True)

    assert len(answer["token_seconds"]) == 3


def test_transformers_own_loop_stops_when_its_time_is_up(child: Child):
    slow = {**TURN, "new_tokens": 200, "seconds": 1e-9}

    answer = child.ask("turn", **slow, transformers=True)

    assert len(answer["token_seconds"]) == 7


def test_a_child_scores_what_the_same_model_scores_here(
    child: Child, model: Path, teacher: Path, tmp_path: Path
):
    passage: dict[str, Any] = {"ids": [9, 8, 7, 6, 5], "kept": [True, False, True, True]}
    here, judge = Worker(model, 1), Worker(teacher, 1)
    here.open()
    judge.open()
    stored = str(tmp_path / "logits.npy")
    reference = judge.score(**passage, write=stored)

    answer = child.ask("score", **passage, against=[stored])

    assert answer == here.score(**passage, against=[stored])
    assert len(answer["losses"]) == len(reference["losses"]) == 3
    whole = judge.model.logits(np.array([[9, 8, 7, 6, 5]]))[0, [0, 2, 3]]
    assert np.array_equal(np.load(stored), whole)


def test_a_child_runs_as_many_threads_as_it_is_told(child: Child):
    # The main thread, and none that computes beside it.
    with Path(f"/proc/{child._process.pid}/environ").open("rb") as environment:
        assert b"OMP_NUM_THREADS=1" in environment.read().split(b"\0")


def test_an_error_of_ours_crosses_the_pipe_as_itself(tmp_path: Path):
    with (
        pytest.raises(FolderError, match="there is no such folder"),
        start_children([tmp_path / "nothing"], threads=1),
    ):
        pass


def test_a_bug_crosses_the_pipe_with_its_traceback(child: Child):
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*KeyError: 'sing'"):
        child.ask("sing")


def test_a_killed_child_is_reported_as_killed(model: Path):
    with Child(model, threads=1) as doomed:
        os.kill(doomed._process.pid, signal.SIGKILL)

        with pytest.raises(MistillError, match=r"killed by SIGKILL; is there memory enough"):
            doomed.ask("open")


def test_children_end_when_the_body_fails(model: Path):
    started: list[Child] = []
    with pytest.raises(ZeroDivisionError), Child(model, threads=1) as one:
        started.append(one)
        raise ZeroDivisionError

    assert started[0]._process.poll() is not None


def test_a_folder_of_the_same_name_where_the_user_works_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    decoy = tmp_path / "mistill"
    decoy.mkdir()
    (decoy / "__init__.py").write_text("raise SystemExit('the wrong mistill')")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(FolderError), start_children([tmp_path], threads=1):
        pass


@pytest.fixture(scope="module")
def standalone(model: Path) -> dict[str, Any]:
    """A child run by hand, in which a library prints: its answers, and the kernel's count.

    Its parent is small, since a child inherits the peak of a large one.
    """
    child = (
        "import runpy, sys, mistill.engine.opening as m; was = m.open_model;"
        "m.open_model = lambda *a, **k: (print('hello'), was(*a, **k))[1];"
        f"sys.argv = ['child', {str(model)!r}, '--threads', '1'];"
        "runpy.run_module('benchmarks.measure.child', run_name='__main__')"
    )
    requests = [{"do": "prepare"}, {"do": "open"}, {"do": "turn", **TURN}, {"do": "memory"}]
    parent = textwrap.dedent(
        f"""
        import json, resource, subprocess, sys
        ran = subprocess.run(
            [sys.executable, "-c", {child!r}],
            input={chr(10).join(map(json.dumps, requests))!r}, capture_output=True, text=True,
        )
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(json.dumps({{"stdout": ran.stdout, "stderr": ran.stderr, "peak_bytes": peak}}))
        """
    )
    ran = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_peak_memory_is_what_the_kernel_tells_the_parent(standalone: dict[str, Any]):
    ours = json.loads(standalone["stdout"].splitlines()[-1])["peak_bytes"]

    # The interpreter still has to end after it has answered.
    assert ours == pytest.approx(standalone["peak_bytes"], rel=0.03)
    assert ours > 100e6, "PyTorch alone is larger"


def test_what_libraries_print_does_not_disturb_the_answers(standalone: dict[str, Any]):
    answers = [json.loads(line) for line in standalone["stdout"].splitlines()]

    assert [min(answer) for answer in answers] == [
        "form",
        "load_seconds",
        "decode_joules",
        "peak_bytes",
    ]
    assert "hello" in standalone["stderr"]


def test_a_chatbots_process_holds_no_pytorch(
    model: Path, tmp_path: Path, standalone: dict[str, Any]
):
    chatbot = export.to_onnx(model, tmp_path / "chatbot", parity_positions=0)
    with start_children([chatbot], threads=1) as (child,):
        child.ask("open")
        child.ask("turn", **TURN)
        maps = Path(f"/proc/{child._process.pid}/maps").read_text()
        memory = child.ask("memory")

    assert "libtorch" not in maps
    assert "onnxruntime" in maps
    assert memory["peak_bytes"] < standalone["peak_bytes"] / 2


HOLDING = """
import json
from dataclasses import astuple
from benchmarks.figures.footprint import own_memory
found = [astuple(own_memory())]
held = bytearray(b"1") * 40_000_000
found.append(astuple(own_memory()))
del held
found.append(astuple(own_memory()))
print(json.dumps(found))
"""


def test_the_peak_remembers_what_was_held_and_given_back():
    # A process of its own: in this one, anything may be given back in between.
    ran = subprocess.run(
        [sys.executable, "-c", HOLDING], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    (_, before), (peak, holding), (last_peak, after) = json.loads(ran.stdout)

    assert holding - before >= 39e6
    assert peak >= holding
    assert after < holding - 39e6
    # The kernel adds up what its processors counted only now and then.
    assert last_peak >= peak - 2e6


@pytest.mark.skipif(not Path("/usr/bin/time").is_file(), reason="GNU time is not installed")
def test_peak_memory_is_what_time_says_of_the_same_child(model: Path, tmp_path: Path):
    chatbot = export.to_onnx(model, tmp_path / "chatbot", parity_positions=0)
    requests = [{"do": "prepare"}, {"do": "open"}, {"do": "turn", **TURN}, {"do": "memory"}]

    ran = subprocess.run(
        [
            *("/usr/bin/time", "-v", sys.executable, "-m", "benchmarks.measure.child"),
            *(str(chatbot), "--threads", "1"),
        ],
        input="\n".join(map(json.dumps, requests)),
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )

    words = next(line for line in ran.stderr.splitlines() if "Maximum resident set size" in line)
    ours = json.loads(ran.stdout.splitlines()[-1])
    assert ours["peak_bytes"] == pytest.approx(int(words.split()[-1]) * 1024, rel=0.03)
    assert ours["resident_bytes"] <= ours["peak_bytes"]


def test_the_provider_is_for_onnx_folders_and_others_run_on_the_processor(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    chatbot = export.to_onnx(model, tmp_path / "chatbot", parity_positions=0)
    with pytest.raises(MissingExtraError, match="has no CUDAExecutionProvider here"):
        Worker(chatbot, threads=1, provider="cuda").open()
    assert Worker(model, threads=1, provider="cuda").open()["vocabulary_size"] == 384
    with (
        pytest.raises(MistillError, match="has no DmlExecutionProvider here"),
        start_children([chatbot], 1, "directml") as (child,),
    ):
        child.ask("open")
