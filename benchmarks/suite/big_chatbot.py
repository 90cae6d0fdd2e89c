"""A chatbot of Mistral 7B's size: what its export takes, and how it runs.

    python -m benchmarks.suite.big_chatbot --layers 32 --folder /somewhere/with/room

The model has random weights, is written to disk in bfloat16 (14.5 GB with 32 layers), rounded to 4
bits in groups of 64, deleted, and exported. Export and chatbot are processes of their own, whose
peaks are what the kernel says (VmHWM), Python and libraries included. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.figures.machine import describe_machine
from benchmarks.suite.random_mistral import WIDTH, child_environment, make_folder

_GROUP_SIZE = 64


def export_here(source: Path, target: Path) -> dict[str, Any]:
    """Export in this process.

    Args:
        source: The 4-bit folder.
        target: The folder to make.

    Returns:
        Seconds, and bytes of memory and disk.
    """
    import export
    from benchmarks.figures.footprint import own_memory

    begun = time.perf_counter()
    export.to_onnx(source, target, parity_positions=0)
    return {
        "seconds": time.perf_counter() - begun,
        "peak_memory_bytes": own_memory().peak_bytes,
        "weight_bytes": sum(file.stat().st_size for file in target.glob("model.onnx*")),
    }


def run_here(chatbot: Path, threads: int, prompt: int, new_tokens: int) -> dict[str, Any]:
    """Open the chatbot in this process, read a prompt and write.

    Args:
        chatbot: An ONNX folder.
        threads: Threads to compute with.
        prompt: Tokens to read.
        new_tokens: Tokens to write after the first.

    Returns:
        Seconds of each, and bytes of memory.
    """
    from benchmarks.figures.footprint import own_memory
    from mistill.engine.onnx_model import OnnxModel

    begun = time.perf_counter()
    model = OnnxModel(chatbot, threads=threads)
    opened = time.perf_counter()
    stream = model.stream((np.arange(prompt) % (model.vocabulary_size - 10) + 5).tolist())
    next(stream)
    read = time.perf_counter()
    steps = []
    for _ in range(new_tokens):
        before = time.perf_counter()
        next(stream)
        steps.append(time.perf_counter() - before)
    return {
        "load_seconds": opened - begun,
        "first_token_seconds": read - opened,
        "prompt_tokens": prompt,
        "token_seconds": steps,
        "peak_memory_bytes": own_memory().peak_bytes,
        "resident_memory_bytes": own_memory().resident_bytes,
    }


def measure(
    folder: Path, layers: int, width: int, threads: int, prompt: int, new_tokens: int
) -> dict[str, Any]:
    """Make the model, and export and run it, a process each.

    Args:
        folder: Where there is room.
        layers: Decoder layers.
        width: Hidden size.
        threads: Threads to compute with.
        prompt: Tokens to read.
        new_tokens: Tokens to write.

    Returns:
        What was found.
    """
    import quantize
    from benchmarks.measure.recording import step_bytes
    from mistill.folders.folder import open_folder

    source, small, chatbot = folder / "model", folder / "small", folder / "chatbot"
    parameters = make_folder(source, layers, width)
    quantize.to_rounding(source, small, group_size=_GROUP_SIZE)
    shutil.rmtree(source)

    def child(*words: object) -> dict[str, Any]:
        command = [sys.executable, "-m", __spec__.name, "--child", *map(str, words)]
        done = subprocess.run(
            command, env=child_environment(threads), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{words[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        print(f"{words[0]}: {done.stdout.splitlines()[-1][:300]}", file=sys.stderr, flush=True)
        return figures

    exported = child("export", small, chatbot)
    shutil.rmtree(small)
    running = child("run", chatbot, threads, prompt, new_tokens)
    cost = step_bytes(open_folder(chatbot), threads)
    assert cost is not None  # our own export wrote the manifest
    rate = 1 / float(np.median(running["token_seconds"]))
    return {
        "benchmark": "big_chatbot",
        "layers": layers,
        "width": width,
        "threads": threads,
        "parameters": parameters,
        "export": exported,
        "run": running,
        "decode_tokens_per_second": rate,
        "prompt_tokens_per_second": prompt / running["first_token_seconds"],
        "step_bytes": asdict(cost),
        "roofline_share": rate / cost.ceiling(prompt + new_tokens / 2),
        "machine": asdict(describe_machine(threads)),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=WIDTH, help="hidden size, a multiple of 512")
    parser.add_argument(
        "--folder", type=Path, help="where to write; a temporary folder if left out"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, *words = args.child
        if what == "export":
            print(json.dumps(export_here(Path(words[0]), Path(words[1]))))
        else:
            numbers = [int(word) for word in words[1:]]
            print(json.dumps(run_here(Path(words[0]), *numbers)))
        return
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=args.folder) as folder:
        report = measure(
            Path(folder), args.layers, args.width, args.threads, args.prompt, args.new_tokens
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
