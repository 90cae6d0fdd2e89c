"""A whole model of Mistral 7B's size, rounded and stored as NF4: time, and memory at its most.

    python -m benchmarks.suite.big_model --layers 32 --folder /somewhere/with/room

The model has random weights and is written to disk first: 14.5 GB in bfloat16 with 32 layers; the
copies, 4 GB each, are deleted one after the other. Each way of quantizing runs in a process of its
own, whose peak is what the kernel says (VmHWM), Python and libraries included. The last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.suite.random_mistral import WIDTH, child_environment, make_folder

METHODS = ("rounding", "nf4")


def quantize_here(method: str, source: Path, target: Path) -> dict[str, Any]:
    """Quantize in this process.

    Args:
        method: One of ``METHODS``.
        source: The float folder.
        target: The folder to make.

    Returns:
        Seconds, and bytes of memory and disk.
    """
    import quantize
    from benchmarks.figures.footprint import own_memory

    begun = time.perf_counter()
    if method == "nf4":
        quantize.to_nf4(source, target)
    else:
        quantize.to_rounding(source, target)
    return {
        "seconds": round(time.perf_counter() - begun, 1),
        "peak_memory_bytes": own_memory().peak_bytes,
        "weight_bytes": sum(file.stat().st_size for file in target.glob("*.safetensors")),
    }


def measure(
    folder: Path, layers: int, width: int, methods: tuple[str, ...], threads: int
) -> dict[str, Any]:
    """Make the model and quantize it in every way, a process each.

    Args:
        folder: Where there is room.
        layers: Decoder layers.
        width: Hidden size.
        methods: Some of ``METHODS``.
        threads: Threads to compute with.

    Returns:
        What was found.
    """
    source = folder / "model"
    parameters = make_folder(source, layers, width)
    figures: dict[str, Any] = {
        "layers": layers,
        "width": width,
        "threads": threads,
        "parameters": parameters,
        "float_bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")),
    }
    for method in methods:
        target = folder / method
        command = [sys.executable, "-m", __spec__.name, "--child", method, str(source), str(target)]
        done = subprocess.run(
            command, env=child_environment(threads), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{method} ended with {done.returncode}: {done.stderr[-2000:]}")
        figures[method] = json.loads(done.stdout.splitlines()[-1])
        print(f"{method}: {figures[method]}", file=sys.stderr)
        shutil.rmtree(target)
    return figures


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=WIDTH, help="hidden size, a multiple of 512")
    parser.add_argument(
        "--folder", type=Path, help="where to write; a temporary folder if left out"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        method, source, target = options.child
        print(json.dumps(quantize_here(method, Path(source), Path(target))))
        return
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=options.folder) as folder:
        report = measure(
            Path(folder), options.layers, options.width, tuple(options.methods), options.threads
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
