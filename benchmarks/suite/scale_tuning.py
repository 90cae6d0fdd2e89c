"""How much of what few bits cost the tuning of scales and norms takes off again.

    python -m benchmarks.suite.scale_tuning MODEL --texts CHATS PLAIN ... --tuning-texts CHATS ...
        --held-out TEXT ...

A model is quantized by GPTQ, calibrated on ``--texts``, and its scales and norms are tuned on
``--tuning-texts``, which should be other text. Judge on text that neither has seen, and on a kind
of text that neither holds. Seeds decide what is drawn and in which order it is read. The last line
is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import quantize
from benchmarks.suite.healing import figures_of, held_out_blocks, predictions_of
from mistill.errors import TrainingError
from mistill.sources.source import resolve_model
from mistill.text.vocabulary import load_vocabulary

# Groups of columns that share a scale, by bits.
GROUPS = {2: 32, 3: 32, 4: 64, 8: 64}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Quantize, tune, and measure both, for all bits and seeds.

    Args:
        args: The command line.

    Returns:
        The JSON document.
    """
    torch.set_num_threads(args.threads)
    model = resolve_model(args.model)
    held_out = held_out_blocks(
        args.held_out, load_vocabulary(model), args.scored_tokens, args.block_length
    )
    references = predictions_of(model, held_out)
    runs = []
    for bits in args.bits:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as scratch:
                folders = _folders(args, model, Path(scratch), bits, seed)
                found = {
                    name: figures_of(references, predictions_of(folder, held_out), held_out)
                    for name, folder, _ in folders
                }
            seconds = {name: spent for name, _, spent in folders}
            runs.append({"bits": bits, "seed": seed, "held_out": found, "seconds": seconds})
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    return {
        "model": Path(args.model).name,
        "groups": {str(bits): GROUPS[bits] for bits in args.bits},
        "texts": [Path(text).name for text in args.texts],
        "tuning_texts": [Path(text).name for text in args.tuning_texts],
        "tuning_tokens": args.steps * args.batch_size * args.block_length,
        "learning_rate": args.learning_rate,
        "threads": args.threads,
        "scored_tokens": {name: int(blocks.kept.sum()) for name, blocks in held_out.items()},
        "runs": runs,
    }


def _folders(
    args: argparse.Namespace, model: Path, scratch: Path, bits: int, seed: int
) -> list[tuple[str, Path, float]]:
    """What was quantized and what was tuned, with the seconds of processor time for each."""
    started = time.process_time()
    rounded = quantize.to_gptq(
        model,
        scratch / "quantized",
        texts=args.texts,
        bits=bits,
        group_size=GROUPS[bits],
        samples=args.samples,
        block_length=args.block_length,
        seed=seed,
    )
    folders = [("quantized", rounded, time.process_time() - started)]
    started = time.process_time()
    try:
        tuned = quantize.tune(
            rounded,
            scratch / "tuned",
            teacher=model,
            texts=args.tuning_texts,
            steps=args.steps,
            batch_size=args.batch_size,
            block_length=args.block_length,
            learning_rate=args.learning_rate,
            seed=seed,
        )
    except TrainingError as error:
        print(error, file=sys.stderr, flush=True)
        tuned = rounded
    return [*folders, ("tuned", tuned, time.process_time() - started)]


def main(words: Sequence[str] | None = None) -> None:
    """Quantize, tune, measure, and print a JSON document.

    Args:
        words: The command line; None for this process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--texts", nargs="+", required=True, help="text to calibrate on")
    parser.add_argument("--tuning-texts", nargs="+", required=True, help="other text to tune on")
    parser.add_argument("--held-out", nargs="+", required=True, help="text to measure on")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3], choices=GROUPS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=24, help="calibration blocks")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--scored-tokens", type=int, default=4096, help="of each held-out text")
    parser.add_argument("--block-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(run(parser.parse_args(words))))


if __name__ == "__main__":
    main()
