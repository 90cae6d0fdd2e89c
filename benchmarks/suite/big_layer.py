"""A layer of Mistral 7B's shapes through GPTQ: time, and memory at its most.

    python -m benchmarks.suite.big_layer --tokens 4096

``quantize.to_gptq`` runs on a model of one layer with random weights, in a process of its own,
whose peak is what the kernel says (VmHWM). Layers are quantized one after another, so that the peak
of one is that of all; the time of 32 is 32 times that of the steps that each layer takes, which
says so: it has not been measured. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.suite.random_mistral import WIDTH, child_environment, make_folder, random_text

ALL_LAYERS = 32
_BLOCK = 512
# Times more text than is drawn from it, so that the drawn blocks are full.
_TEXT = 4


def quantize_here(source: Path, target: Path, text: Path, tokens: int, **options: Any) -> Any:
    """Quantize in this process.

    Args:
        source: The float folder.
        target: The folder to make.
        text: What to calibrate on.
        tokens: How much of it.
        **options: Fields of ``GptqSettings``.

    Returns:
        Seconds, and bytes of memory.
    """
    import quantize
    from benchmarks.figures.footprint import own_memory
    from mistill.folders.folder import read_json

    block = min(_BLOCK, tokens)
    begun = time.perf_counter()
    quantize.to_gptq(
        source, target, texts=text, samples=tokens // block, block_length=block, **options
    )
    seconds = time.perf_counter() - begun
    report = read_json(target / "quantize_report.json")
    modules = {module["name"]: module["seconds"] for module in report["modules"]}
    return {
        "seconds": round(seconds, 1),
        "seconds_of_layers": report["seconds"],
        "seconds_of_matrices": modules,
        "calibration_tokens": report["calibration"]["tokens"],
        "peak_memory_bytes": own_memory().peak_bytes,
    }


def measure(layers: int, width: int, tokens: int, threads: int, settings: str) -> dict[str, Any]:
    """Make the model and quantize it in another process.

    Args:
        layers: Decoder layers.
        width: Hidden size.
        tokens: Calibration tokens.
        threads: Threads to compute with.
        settings: Fields of ``GptqSettings`` as JSON.

    Returns:
        What was found.
    """
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_folder(folder / "model", layers, width)
        text = folder / "text.txt"
        text.write_text(random_text(_TEXT * tokens), "utf-8")
        paths = [folder / "model", folder / "small", text]
        command = [sys.executable, "-m", __spec__.name, "--tokens", str(tokens)]
        command += ["--settings", settings, "--child", *map(str, paths)]
        done = subprocess.run(
            command, env=child_environment(threads), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"GPTQ ended with {done.returncode}: {done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    return {
        "layers": layers,
        "width": width,
        "threads": threads,
        "settings": json.loads(settings),
        **figures,
        "estimated_seconds_of_32_layers": round(figures["seconds_of_layers"] / layers * ALL_LAYERS),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=WIDTH, help="hidden size, a multiple of 512")
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--settings", default="{}", help="fields of GptqSettings, as JSON")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        source, target, text = map(Path, options.child)
        more = json.loads(options.settings)
        report = quantize_here(source, target, text, options.tokens, **more)
    else:
        report = measure(
            options.layers, options.width, options.tokens, options.threads, options.settings
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
