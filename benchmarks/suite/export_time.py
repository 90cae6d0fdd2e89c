"""Exporting a float folder with 4-bit matrices: mistill's against onnxruntime-genai's own builder.

    python -m benchmarks.suite.export_time MODEL --genai-python PATH

Each export is a process of its own, Python's start and imports included, and they take turns; the
peak of memory is what the kernel counts of that process. mistill is timed with its check of
48 positions against PyTorch and without it; the builder checks nothing. PATH is the Python of an
environment with onnxruntime-genai==0.18.0 and what its builder needs (torch, transformers, onnx,
onnx_ir, tqdm). Without it only mistill is timed. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.figures.machine import describe_machine
from benchmarks.suite.turns import paired_ratio, summary

_OURS = """
import sys, export
export.to_onnx(sys.argv[1], sys.argv[2], precision="int4", parity_positions=int(sys.argv[3]))
"""

# The kernel counts to a process's peak what its parent held when it was started, so that a small
# process starts it.
_LAUNCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(child.pid, 0)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak_mib": usage.ru_maxrss / 1024}))
os._exit(1 if status else 0)
"""


def commands(
    model: Path, target: Path, cache: Path, genai_python: str | None
) -> dict[str, list[str]]:
    """How each export is called.

    Args:
        model: A float folder.
        target: The folder to make.
        cache: Where the builder may keep what it wants.
        genai_python: Python with onnxruntime-genai; None leaves its builder out.

    Returns:
        Command lines by name.
    """
    ours = [sys.executable, "-c", _OURS, str(model), str(target)]
    ways = {"mistill": [*ours, "0"], "mistill, checked against PyTorch": [*ours, "48"]}
    if genai_python:
        builder = [genai_python, "-m", "onnxruntime_genai.models.builder"]
        places = ["-i", str(model), "-o", str(target), "-c", str(cache)]
        ways["genai's builder"] = [*builder, *places, "-p", "int4", "-e", "cpu"]
    return ways


def timed(command: Sequence[str], threads: int) -> dict[str, float]:
    """Run a process to its end.

    Args:
        command: Its command line.
        threads: Threads to compute with.

    Returns:
        Seconds, and its peak of memory in MiB.

    Raises:
        RuntimeError: If it failed.
    """
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(threads),
        "ORT_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with TemporaryDirectory() as nowhere:
        done = subprocess.run(
            [sys.executable, "-u", "-S", "-c", _LAUNCHER, *command],
            env=environment,
            cwd=nowhere,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def measure(model: Path, genai_python: str | None, threads: int, rounds: int) -> dict[str, Any]:
    """Let the exports take turns.

    Args:
        model: A float folder.
        genai_python: Python with onnxruntime-genai; None leaves its builder out.
        threads: Threads to compute with.
        rounds: Turns of each, after one that is not kept.

    Returns:
        What was found.
    """
    with TemporaryDirectory() as scratch:
        target = Path(scratch) / "out"
        calls = commands(model.resolve(), target, Path(scratch) / "cache", genai_python)
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
        sizes = {}
        for turn in range(1 + rounds):
            for name, command in calls.items():
                figures = timed(command, threads)
                sizes[name] = sum(file.stat().st_size for file in target.glob("model.onnx*"))
                shutil.rmtree(target)
                if turn:
                    samples[name].append(figures)
    report: dict[str, Any] = {
        "benchmark": "export_time",
        "model": model.name,
        "threads": threads,
        "machine": asdict(describe_machine(threads)),
        "methods": {
            name: {
                "seconds": summary(turns, "seconds"),
                "peak_mib": summary(turns, "peak_mib"),
                "bytes": sizes[name],
            }
            for name, turns in samples.items()
        },
    }
    if "genai's builder" in samples:
        theirs = samples["genai's builder"]
        report["time_over_genai"] = paired_ratio(samples["mistill"], theirs, "seconds")
        report["peak_over_genai"] = paired_ratio(samples["mistill"], theirs, "peak_mib")
    return report


def main() -> None:
    """Parse the command line and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--genai-python", help="Python that has onnxruntime-genai")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps(measure(args.model, args.genai_python, args.threads, args.rounds)))


if __name__ == "__main__":
    main()
