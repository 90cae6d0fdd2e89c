"""What quantizing a model costs: KL to the float model, perplexity, bytes, time and memory.

    python -m benchmarks.suite.quantized_kl MODEL --texts CALIBRATION --held-out TEXT

Each way of quantizing runs in a process of its own, once for every seed of its calibration text;
time and peak memory are those of the whole process, with everything that it loads. Then all of
them predict the same held-out tokens. With ``--gptqmodel-python`` that library quantizes too, on
the same blocks of text. With ``--keep`` the models stay, with what each took and gave beside it,
and another run with the same text goes on from there. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.figures.machine import describe_machine
from mistill.folders.folder import read_json
from mistill.measures.kl import Predictions, compare, predict
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary


@dataclass(frozen=True)
class Way:
    """A way of quantizing.

    Attributes:
        call: A function of ``quantize``.
        options: What it is given beside source, target and text.
        calibrated: Whether it reads text, and so has a seed.
    """

    call: str
    options: dict[str, Any]
    calibrated: bool = True


WAYS = {
    "rounding-64": Way("to_rounding", {"bits": 4, "group_size": 64}, calibrated=False),
    "rounding-row": Way("to_rounding", {"bits": 4, "group_size": -1}, calibrated=False),
    "rounding-8bit": Way("to_rounding", {"bits": 8, "group_size": 64}, calibrated=False),
    "gptq-64": Way("to_gptq", {"bits": 4, "group_size": 64}),
    "gptq-64-asymmetric": Way("to_gptq", {"bits": 4, "group_size": 64, "symmetric": False}),
    "gptq-row": Way("to_gptq", {"bits": 4, "group_size": -1}),
    "gptq-8bit": Way("to_gptq", {"bits": 8, "group_size": 64}),
    "gptaq-64": Way("to_gptq", {"bits": 4, "group_size": 64, "method": "gptaq"}),
    "gptaq-row": Way("to_gptq", {"bits": 4, "group_size": -1, "method": "gptaq"}),
    "gptq-8bit-asymmetric": Way("to_gptq", {"bits": 8, "group_size": 64, "symmetric": False}),
    "gptaq-8bit": Way("to_gptq", {"bits": 8, "group_size": 64, "method": "gptaq"}),
    "gptqmodel-64": Way("to_gptq", {"bits": 4, "group_size": 64, "backend": "gptqmodel"}),
    "nf4": Way("to_nf4", {}, calibrated=False),
}

# Models whose predictions are held at once: a gigabyte for a small model and 64k tokens.
_AT_ONCE = 4

# What a record says of its conditions.
_KEYS = ("asked", "measured_on")

_CHILD = """
import json, sys, quantize
call, source, target, texts, options = json.loads(sys.argv[1])
extra = {} if texts is None else {"texts": texts}
getattr(quantize, call)(source, target, **extra, **options)
"""


def main() -> None:
    """Quantize, measure, and print a JSON document."""
    args = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(run(args, args.keep or Path(scratch))))


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line.

    Args:
        words: The words; None for this process's own.

    Returns:
        What they say.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--texts", required=True, help="text to calibrate on")
    parser.add_argument("--held-out", required=True, help="text to measure on")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=65_536, help="held-out tokens, at most")
    parser.add_argument("--samples", type=int, default=16, help="calibration blocks")
    parser.add_argument("--block-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gptqmodel-python", help="Python that has gptqmodel")
    parser.add_argument("--keep", type=Path, help="folder to leave the quantized models in")
    return parser.parse_args(words)


def run(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Make and measure.

    Args:
        args: The command line.
        home: Where the quantized models lie.

    Returns:
        The JSON document.
    """
    import torch

    torch.set_num_threads(args.threads)
    home.mkdir(parents=True, exist_ok=True)
    ways = [name for name in args.ways if name != "gptqmodel-64" or args.gptqmodel_python]
    by_way: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    # Seeds outside, ways inside: whatever else the machine does falls on all alike.
    for seed in args.seeds:
        for name in ways:
            if WAYS[name].calibrated or not by_way[name]:
                by_way[name].append(_remembered(args, name, seed, home))
                _print_run(f"{name}-{by_way[name][-1]['seed']}", by_way[name][-1])
    blocks = held_out_blocks(args)
    text = {"held_out": Path(args.held_out).name, "tokens": int(blocks.kept.sum())}
    runs = {f"{name}-{run['seed']}": run for name in ways for run in by_way[name]}
    missing = [name for name, run in runs.items() if run.get("measured_on") != text]
    if missing:
        reference = predictions(Path(args.model), blocks)
        for start in range(0, len(missing), _AT_ONCE):
            folders = [home / name for name in missing[start : start + _AT_ONCE]]
            for name, figures in measured(folders, reference, blocks).items():
                runs[name] |= figures | {"measured_on": text}
                _record(home, name, runs[name])
                _print_run(name, runs[name])
    return {
        "model": Path(args.model).name,
        "machine": asdict(describe_machine(args.threads)),
        "calibration_tokens": args.samples * args.block_length,
        "held_out_tokens": int(blocks.kept.sum()),
        "threads": args.threads,
        "float_perplexity": by_way[ways[0]][0]["float_perplexity"],
        "ways": {name: summary(runs) for name, runs in by_way.items()},
        "recovered": recovered(by_way),
        "over_gptqmodel": over_gptqmodel(by_way),
    }


def _remembered(args: argparse.Namespace, name: str, seed: int, home: Path) -> dict[str, Any]:
    """What an earlier run left in this folder, or a new one."""
    request = {
        "model": _from_anywhere(args.model),
        "texts": _from_anywhere(args.texts) if WAYS[name].calibrated else None,
        "samples": args.samples,
        "block_length": args.block_length,
        "way": asdict(WAYS[name]),
    }
    file = home / f"{name}-{seed}.json"
    if file.exists() and (home / f"{name}-{seed}").is_dir():
        earlier: dict[str, Any] = read_json(file)
        if earlier["asked"] == request:
            return earlier
    run = quantize(args, name, seed, home) | {"asked": request}
    _record(home, f"{name}-{seed}", run)
    return run


def _record(home: Path, name: str, run: dict[str, Any]) -> None:
    (home / f"{name}.json").write_text(json.dumps(run), "utf-8")


def measured(
    folders: Sequence[Path], reference: Predictions, blocks: TokenBlocks
) -> dict[str, dict[str, Any]]:
    """What some quantized models are worth.

    Args:
        folders: The models.
        reference: What the float model says about the held-out text.
        blocks: The text.

    Returns:
        By the folder's name: KL, perplexities, agreement and bytes.
    """
    predicted = {folder.name: predictions(folder, blocks) for folder in folders}
    fidelity = compare({"": reference}, predicted, blocks)
    return {
        folder.name: {
            "kl": fidelity[folder.name][""].kl,
            "kl_standard_error": fidelity[folder.name][""].kl_standard_error,
            "kl_p99": fidelity[folder.name][""].kl_p99,
            "agreement": fidelity[folder.name][""].agreement,
            "perplexity": fidelity[folder.name][""].perplexity,
            "float_perplexity": fidelity[folder.name][""].reference_perplexity,
            "weight_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        }
        for folder in folders
    }


def quantize(args: argparse.Namespace, name: str, seed: int, home: Path) -> dict[str, Any]:
    """Quantize in a child, and say what that took.

    Args:
        args: The command line.
        name: Which way.
        seed: Of its calibration text.
        home: Where to put it.

    Returns:
        Seconds and peak memory in MiB.
    """
    way, target = WAYS[name], home / f"{name}-{seed}"
    options = dict(way.options)
    if way.calibrated:
        options |= {"samples": args.samples, "block_length": args.block_length, "seed": seed}
    texts = _from_anywhere(args.texts) if way.calibrated else None
    python = args.gptqmodel_python if "backend" in options else sys.executable
    places = [_from_anywhere(args.model), str(target.resolve())]
    work = json.dumps([way.call, *places, texts, options | {"overwrite": True}])
    return {"seed": seed, **_in_a_child(python, work, home, args.threads)}


def _in_a_child(python: str, work: str, home: Path, threads: int) -> dict[str, float]:
    """Seconds and peak memory of a process that does the work."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": str(threads),
    }
    started = time.perf_counter()
    child = subprocess.Popen(
        [python, "-c", _CHILD, work],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=home,
    )
    assert child.stderr is not None
    with child.stderr as said:
        complaint = said.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{work} failed:\n{complaint[-2000:]}")
    return {"seconds": time.perf_counter() - started, "peak_mib": usage.ru_maxrss / 1024}


def _from_anywhere(source: str) -> str:
    """A file or folder for a child that works elsewhere; names of other kinds as they are."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def held_out_blocks(args: argparse.Namespace) -> TokenBlocks:
    """Blocks to measure on, spread evenly over the text.

    Args:
        args: The command line.

    Returns:
        The blocks.
    """
    blocks = pack(read_documents(args.held_out, load_vocabulary(args.model)), args.block_length)
    count = min(len(blocks), max(1, args.tokens // args.block_length + 1))
    return blocks[np.linspace(0, len(blocks) - 1, count).astype(np.int64)]


def predictions(folder: Path, blocks: TokenBlocks) -> Predictions:
    """What a model says about the held-out text.

    Args:
        folder: The model.
        blocks: The text.

    Returns:
        Its hidden states and head.
    """
    return predict(load_pytorch(folder), blocks)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds.

    Args:
        runs: One entry per seed.

    Returns:
        Means, least and greatest, and the runs themselves.
    """
    figures = ("kl", "perplexity", "agreement", "seconds", "peak_mib")
    means = {figure: mean(run[figure] for run in runs) for figure in figures}
    values = [run["kl"] for run in runs]
    return {
        **means,
        "kl_least": min(values),
        "kl_greatest": max(values),
        "weight_bytes": runs[0]["weight_bytes"],
        "runs": [
            {name: run[name] for name in run if name not in ("asked", "measured_on")}
            for run in runs
        ],
    }


def recovered(by_way: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """How much of what rounding loses each way does not, per seed.

    Args:
        by_way: The runs of each way.

    Returns:
        (rounding - way) / rounding for every way with the same bits and groups.
    """
    shares = {}
    for name, runs in by_way.items():
        rounding = by_way.get(f"rounding-{name.split('-')[1]}") if "-" in name else None
        if rounding and not name.startswith("rounding"):
            base = rounding[0]["kl"]
            shares[name] = [1 - run["kl"] / base for run in runs]
    return shares


def over_gptqmodel(by_way: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    """Our figures over gptqmodel's, seed by seed, at the same bits and groups.

    Args:
        by_way: The runs of each way.

    Returns:
        Ratios of KL, seconds and peak memory.
    """
    theirs = by_way.get("gptqmodel-64", [])
    return {
        name: {
            figure: [
                run[figure] / rival[figure] for run, rival in zip(by_way[name], theirs, strict=True)
            ]
            for figure in ("kl", "seconds", "peak_mib")
        }
        for name in ("gptq-64", "gptaq-64")
        if theirs and name in by_way
    }


def _print_run(name: str, run: dict[str, Any]) -> None:
    words = ", ".join(
        f"{figure} {run[figure]:.5g}" for figure in ("kl", "seconds", "peak_mib") if figure in run
    )
    print(f"{name}: {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
