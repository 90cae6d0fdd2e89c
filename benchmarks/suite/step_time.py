"""What a step of one token takes where a source's codes are harder to multiply.

    python -m benchmarks.suite.step_time MODEL WORK --rounds 9

Of one float model, four sources are made: plain groups of 128, the same with its columns mixed as
activation order mixes them, one scale for a row, and NF4. Values are those of plain rounding,
since speed does not depend on them. Each is exported, and their steps take turns, each in a
process of its own. What a step spends outside of ONNX Runtime's run is told as well: binding, the
choice of a token, and Python. The last line is one JSON document, with each time relative to the
plain one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import export
import quantize
from benchmarks.figures.machine import describe_machine
from benchmarks.suite.turns import paired_ratio, serve, summary, take_turns
from mistill.engine.onnx_model import OnnxModel
from mistill.folders.folder import read_json, weight_files

PLAIN = "plain"
GOAL = 1.15
"""Most that a step may take, relative to the plain model."""


def mix_columns(source: Path, target: Path) -> Path:
    """Give the columns of a GPTQ folder the groups that activation order would give them.

    Layers that read the same input have the same order, as they have from the same activations.

    Args:
        source: A GPTQ folder with plain groups.
        target: The folder to make.

    Returns:
        The target.
    """
    shutil.copytree(source, target)
    for file in weight_files(target):
        tensors = dict(load_file(file))
        for name in [name for name in tensors if name.endswith(".g_idx")]:
            module = name.removesuffix(".g_idx")
            parent, _, last = module.rpartition(".")
            shared = parent if last[0] in "qkvgu" else module
            groups = tensors[name]
            order = np.random.default_rng(sum(shared.encode())).permutation(len(groups))
            tensors[name] = groups[order]
        save_file(tensors, file, metadata={"format": "pt"})
    config = read_json(target / "config.json")
    config["quantization_config"]["desc_act"] = True
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target


def prepare(model: Path, work: Path, group_size: int) -> dict[str, Path]:
    """Make the sources and export them; what is there already is kept.

    Args:
        model: A float folder.
        work: Where folders go.
        group_size: Columns of a plain group.

    Returns:
        ONNX folders by what their source is.
    """
    work.mkdir(parents=True, exist_ok=True)
    plain, chatbots = work / PLAIN, {}
    makers = {
        PLAIN: lambda to: quantize.to_rounding(model, to, group_size=group_size),
        "act-order": lambda to: mix_columns(plain, to),
        "per-channel": lambda to: quantize.to_rounding(model, to, group_size=-1),
        "nf4": lambda to: quantize.to_nf4(model, to),
    }
    for name, make in makers.items():
        if not (work / name).exists():
            make(work / name)
        chatbots[name] = work / f"{name}-onnx"
        if not chatbots[name].exists():
            export.to_onnx(work / name, chatbots[name], parity_positions=0)
    return chatbots


class TimedSession:
    """A session that knows how long its last run took."""

    def __init__(self, session: Any) -> None:
        """Wrap a session.

        Args:
            session: An ``onnxruntime.InferenceSession``.
        """
        self._session = session
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        """Run, and time it.

        Args:
            binding: The inputs and outputs.
        """
        started = time.perf_counter()
        self._session.run_with_iobinding(binding)
        self.seconds = time.perf_counter() - started


def child(folder: Path, threads: int, depth: int, steps: int) -> None:
    """Write some tokens after a prompt at every turn.

    Args:
        folder: An ONNX folder.
        threads: Threads to compute with.
        depth: Tokens of the prompt.
        steps: Tokens to write.
    """
    model = OnnxModel(folder, threads=threads)
    session = model.session = TimedSession(model.session)
    prompt = (np.arange(depth) % (model.vocabulary_size - 10) + 5).tolist()

    def work() -> dict[str, float]:
        stream = model.stream(list(prompt))
        next(stream)
        samples, around = [], []
        for _ in range(steps):
            started = time.perf_counter()
            next(stream)
            samples.append(time.perf_counter() - started)
            around.append(samples[-1] - session.seconds)
        return {
            "step_ms": 1e3 * float(np.median(samples)),
            "around_us": 1e6 * float(np.median(around)),
        }

    serve(work)


def measure(
    chatbots: dict[str, Path], threads: int, depth: int, steps: int, rounds: int
) -> dict[str, Any]:
    """Let the models take turns.

    Args:
        chatbots: ONNX folders by name, the plain one among them.
        threads: Threads to compute with.
        depth: Tokens of the prompt.
        steps: Tokens that are written in a turn.
        rounds: Turns of each.

    Returns:
        What was found.
    """
    commands = {
        name: [
            sys.executable,
            "-m",
            "benchmarks.suite.step_time",
            str(folder),
            "-",
            "--child",
            f"--threads={threads}",
            f"--depth={depth}",
            f"--steps={steps}",
        ]
        for name, folder in chatbots.items()
    }
    samples = take_turns(commands, rounds)
    ratios = {
        name: paired_ratio(samples[name], samples[PLAIN], "step_ms")
        for name in chatbots
        if name != PLAIN
    }
    manifests = {name: read_json(folder / "manifest.json") for name, folder in chatbots.items()}
    return {
        "benchmark": "step_time",
        "threads": threads,
        "depth": depth,
        "steps": steps,
        "rounds": rounds,
        "step_ms": {name: summary(samples[name], "step_ms") for name in chatbots},
        "around_us": {name: summary(samples[name], "around_us") for name in chatbots},
        "packed_bytes_per_token": {
            name: manifest["packed_bytes_per_token"] for name, manifest in manifests.items()
        },
        "to_plain": ratios,
        "goal": GOAL,
        "met": all(ratio["median"] <= GOAL for ratio in ratios.values()),
        "machine": asdict(describe_machine(threads)),
        "samples": samples,
    }


def main() -> None:
    """Parse the command line and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--child", action="store_true")
    args = parser.parse_args()
    if args.child:
        child(args.model, args.threads, args.depth, args.steps)
        return
    chatbots = prepare(args.model, args.work, args.group_size)
    print(json.dumps(measure(chatbots, args.threads, args.depth, args.steps, args.rounds)))


if __name__ == "__main__":
    main()
