"""Is a perplexity that mistill quotes the one that others measure of the same weights and text?

    python -m benchmarks.suite.quoted_perplexity MODEL --text FILE --llama-cpp-programs FOLDER

As llama.cpp quotes it, on a float32 GGUF file of the folder by its own ``llama-perplexity``; as
papers on GPTQ do, by transformers' own loss on every window. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.figures.conventions import CONVENTIONS, QuotedPerplexity
from benchmarks.figures.machine import describe_machine
from benchmarks.measure.child import Worker
from benchmarks.measure.quoting import QuotedText, cut_texts, quote
from mistill.text.vocabulary import load_vocabulary

GOAL = 0.005


def by_llama_cpp(
    model: Path, text: Path, programs: Path, chunks: int, threads: int
) -> dict[str, float]:
    """What llama-perplexity says of the weights of a folder.

    Args:
        model: A float folder.
        text: A text file.
        programs: The folder of llama.cpp's programs.
        chunks: Windows to read.
        threads: Threads to compute with.

    Returns:
        Perplexity, and the standard error that it gives.

    Raises:
        SystemExit: If it names none.
    """
    import export

    with TemporaryDirectory() as folder:
        file = export.to_gguf(model, Path(folder) / "model.gguf", dtype="float32")
        length = str(CONVENTIONS["llama.cpp"].context_length)
        done = subprocess.run(
            [
                *(str(programs / "llama-perplexity"), "-m", str(file), "-f", str(text)),
                *("-c", length, "-b", length, "-t", str(threads), "--chunks", str(chunks)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    estimate = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", done.stdout)
    if estimate is None:
        raise SystemExit(f"llama-perplexity named no perplexity:\n{done.stdout[-2000:]}")
    return {"perplexity": float(estimate[1]), "standard_error": float(estimate[2])}


def by_transformers(model: Path, text: QuotedText) -> float:
    """Perplexity by transformers' own loss.

    Args:
        model: A float folder.
        text: The text in windows.

    Returns:
        The perplexity.
    """
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    losses = []
    for window in text.windows:
        ids = torch.from_numpy(window.ids)[None]
        with torch.inference_mode():
            losses.append(float(network(ids, labels=ids).loss))
    return math.exp(sum(losses) / len(losses))


def measure(
    model: Path, text: Path, programs: Path | None, chunks: int, threads: int
) -> dict[str, Any]:
    """Measure by ours and by others.

    Args:
        model: A float folder.
        text: A text file.
        programs: The folder of llama.cpp's programs; None leaves it out.
        chunks: Windows of 512 tokens to read; as many tokens for the longer ones.
        threads: Threads to compute with.

    Returns:
        What was found.
    """
    torch.set_num_threads(threads)
    length = CONVENTIONS["llama.cpp"].context_length
    cut = cut_texts(text, load_vocabulary(model), tuple(CONVENTIONS), chunks * length)
    worker = Worker(model, threads)
    worker.open()
    report: dict[str, Any] = {}
    for one in cut:
        ours = quote(worker, one)
        theirs: dict[str, Any] | None = None
        if one.convention == "gptq":
            theirs = {"by": "transformers", "perplexity": by_transformers(model, one)}
        elif programs is not None:
            figures = by_llama_cpp(model, text, programs, chunks, threads)
            theirs = {"by": "llama-perplexity", **figures}
        report[one.convention] = _compared(ours, theirs)
    return {
        "model": model.name,
        "text": text.name,
        "threads": threads,
        "goal": GOAL,
        "machine": asdict(describe_machine(threads)),
        "conventions": report,
    }


def _compared(ours: QuotedPerplexity, theirs: dict[str, Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "perplexity": ours.value,
        "standard_error": ours.standard_error,
        "bits_per_byte": ours.bits_per_byte,
        "tokens": sum(ours.window_tokens),
        "text_fingerprint": ours.text_fingerprint,
    }
    if theirs is not None:
        difference = ours.value / theirs["perplexity"] - 1
        row |= {"theirs": theirs, "difference": difference, "met": abs(difference) <= GOAL}
    return row


def main() -> None:
    """Parse the command line and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--llama-cpp-programs", type=Path, help="the folder of llama-perplexity")
    parser.add_argument("--chunks", type=int, default=32, help="windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    found = measure(args.model, args.text, args.llama_cpp_programs, args.chunks, args.threads)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
