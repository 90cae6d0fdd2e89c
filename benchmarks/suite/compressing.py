r"""``mistill compress`` beside llama.cpp's Q4_K_M: KL to the float model, and bytes.

    python -m benchmarks.suite.compressing SOURCE --texts TEXT ... --held-out TEXT ... \
        --llama-cpp-programs FOLDER

The chatbot is measured as it runs, in ONNX Runtime; Q4_K_M, made by ``llama-quantize``, by the
weights in its file, in PyTorch, without the rounding of activations that llama.cpp adds. Judge on
text of other kinds than the calibration's too. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import export
import mistill
from benchmarks.figures.machine import describe_machine
from benchmarks.suite.against_q4_k_m import tensor_bytes
from benchmarks.suite.healing import figures_of, held_out_blocks, predictions_of
from mistill.engine.onnx_model import OnnxModel
from mistill.folders.folder import describe
from mistill.measures.kl import Predictions, kl_sum
from mistill.sources.source import resolve_model
from mistill.text.blocks import TokenBlocks
from mistill.text.vocabulary import load_vocabulary


def main(words: Sequence[str] | None = None) -> None:
    """Compress, measure, and print a JSON document.

    Args:
        words: The command line; None for this process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--texts", nargs="+", required=True, help="texts to calibrate and tune on")
    parser.add_argument("--held-out", nargs="+", required=True, help="texts to measure on")
    parser.add_argument("--tuning-steps", nargs="+", type=int, default=[0, 20])
    parser.add_argument("--bits-per-weight", type=float, help="by default what Q4_K_M takes")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--block-length", type=int, default=512)
    parser.add_argument("--scored-tokens", type=int, default=4096, help="of each held-out text")
    parser.add_argument("--llama-cpp-programs", type=Path, help="the folder of llama-quantize")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(words)
    with TemporaryDirectory() as scratch:
        print(json.dumps(run(args, Path(scratch))))


def run(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Make the models and measure them.

    Args:
        args: The command line.
        scratch: An empty folder.

    Returns:
        The JSON document.
    """
    torch.set_num_threads(args.threads)
    source = resolve_model(args.source)
    vocabulary = load_vocabulary(source)
    held_out = held_out_blocks(args.held_out, vocabulary, args.scored_tokens, args.block_length)
    references = predictions_of(source, held_out)
    models = []
    if args.llama_cpp_programs is not None:
        exact, small = scratch / "float32.gguf", scratch / "q4_k_m.gguf"
        export.to_gguf(source, exact, dtype="float32")
        program = args.llama_cpp_programs / "llama-quantize"
        subprocess.run([program, exact, small, "Q4_K_M"], check=True, capture_output=True)
        figures = figures_of(references, predictions_of(resolve_model(small), held_out), held_out)
        models.append(
            {"name": "llama.cpp Q4_K_M", "bytes": tensor_bytes(small), "held_out": figures}
        )
    for steps in args.tuning_steps:
        models.append(_compressed(args, source, scratch / f"{steps}", steps, references, held_out))
        print(json.dumps(models[-1]), file=sys.stderr, flush=True)
    return {
        "source": Path(args.source).name,
        "machine": asdict(describe_machine(args.threads)),
        "texts": [Path(text).name for text in args.texts],
        "scored_tokens": {name: int(blocks.kept.sum()) for name, blocks in held_out.items()},
        "models": models,
    }


def _compressed(
    args: argparse.Namespace,
    source: Path,
    target: Path,
    steps: int,
    references: Mapping[str, Predictions],
    held_out: Mapping[str, TokenBlocks],
) -> dict[str, Any]:
    started = time.perf_counter()
    chatbot = mistill.compress(
        source,
        target,
        texts=args.texts,
        held_out=args.held_out,
        bits_per_weight=args.bits_per_weight,
        samples=args.samples,
        block_length=args.block_length,
        tuning_steps=steps,
    )
    seconds = time.perf_counter() - started
    model = OnnxModel(chatbot, threads=args.threads)
    figures = {
        name: {"kl": onnx_kl(model, references[name], blocks)} for name, blocks in held_out.items()
    }
    return {
        "name": f"mistill, tuned for {steps} steps" if steps else "mistill, not tuned",
        "bytes": describe(chatbot).weight_bytes,
        "seconds": seconds,
        "held_out": figures,
    }


def onnx_kl(model: OnnxModel, reference: Predictions, blocks: TokenBlocks) -> float:
    """Mean KL(reference || model) at the positions of a text that count, each document alone.

    Args:
        model: The model.
        reference: What the other one predicts there.
        blocks: The text.

    Returns:
        In nats.
    """
    total, count = 0.0, 0
    for block, start, end in _pieces(blocks):
        logits = model.logits(blocks.ids[block : block + 1, start:end])[0]
        part = torch.from_numpy(logits[blocks.kept[block, start:end]])
        total += float(kl_sum(reference.logits(slice(count, count + len(part))), part))
        count += len(part)
    return total / count


def _pieces(blocks: TokenBlocks) -> Iterator[tuple[int, int, int]]:
    """Where the documents of every block lie that have something to predict."""
    for block, documents in enumerate(blocks.documents):
        edges = np.flatnonzero(np.diff(documents)) + 1
        for start, end in zip([0, *edges], [*edges, len(documents)], strict=True):
            if blocks.kept[block, start:end].any():
                yield block, int(start), int(end)


if __name__ == "__main__":
    main()
