"""Methods that are compared take turns, each in a process of its own.

A parent starts one child per method; a child makes its tensors, says so, and then does its work
once for every line that it is sent. All children are there from the start and only one works at
a time, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.figures.footprint import own_memory
from benchmarks.figures.latency import SETTLE_SECONDS
from mistill.training.memory import give_back

_MIB = 2**20


def serve(work: Callable[[], Mapping[str, Any]]) -> None:
    """In a child: do the work once for every line on standard input.

    Args:
        work: Returns figures of one turn; time and peak memory are added to them.
    """
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        time.sleep(SETTLE_SECONDS)
        before = _reset_peak()
        started = time.perf_counter()
        figures = dict(work())
        figures["seconds"] = time.perf_counter() - started
        figures["peak_mib"] = (peak_bytes() - before) / _MIB
        print(json.dumps(figures), flush=True)


def _reset_peak() -> int:
    """Forget the highest resident memory so far, and say what is resident now, in bytes.

    What the last turn freed and the allocator kept is given back first: it would hide as much of
    what this turn allocates.
    """
    give_back()
    Path("/proc/self/clear_refs").write_text("5")
    return own_memory().resident_bytes


def peak_bytes() -> int:
    """The highest resident memory of this process in this turn, in bytes."""
    memory = own_memory()
    return max(memory.peak_bytes, memory.resident_bytes)


def take_turns(
    commands: Mapping[str, Sequence[str]], rounds: int, warm_up: int = 1
) -> dict[str, list[dict[str, Any]]]:
    """In the parent: start all children and let them work in turn.

    Args:
        commands: The command line of each child by the name of its method.
        rounds: Turns of each that are recorded.
        warm_up: Turns of each before.

    Returns:
        The figures of each turn by method.
    """
    children: dict[str, subprocess.Popen[str]] = {}
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    try:
        for name, command in commands.items():
            children[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        for name, child in children.items():
            _read(name, child)
        for turn in range(warm_up + rounds):
            for name, child in children.items():
                assert child.stdin is not None
                child.stdin.write("go\n")
                child.stdin.flush()
                figures = _read(name, child)
                if turn >= warm_up:
                    samples[name].append(figures)
    finally:
        for child in children.values():
            child.kill()
            with child:
                pass  # closes its pipes and waits for it
    return samples


def _read(name: str, child: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of JSON that a child prints; libraries may print others before it."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise RuntimeError(f"{name} ended with {child.wait()} before its turn was over")


def summary(samples: Sequence[Mapping[str, Any]], figure: str) -> dict[str, float]:
    """Median and spread of one figure.

    Args:
        samples: Figures of each turn.
        figure: Name of the figure.

    Returns:
        Median, lowest and highest.
    """
    return spread_of([float(sample[figure]) for sample in samples])


def paired_ratio(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], figure: str
) -> dict[str, float]:
    """Ratio of one figure, turn by turn, so that what slowed both counts for neither.

    Args:
        ours: Figures of each turn.
        theirs: Of the same turns.
        figure: Name of the figure.

    Returns:
        Median, lowest and highest of ours / theirs.
    """
    ratios = [
        float(a[figure]) / float(b[figure]) if b[figure] else float("nan")
        for a, b in zip(ours, theirs, strict=True)
    ]
    return spread_of(ratios)


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of some figures."""
    return {"median": median(values), "lowest": min(values), "highest": max(values)}
