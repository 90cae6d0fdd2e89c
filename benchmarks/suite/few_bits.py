"""What few bits cost, by method, codes and calibration text: what collapses, and what mends it.

    python -m benchmarks.suite.few_bits MODEL --texts CHATS PLAIN ... --held-out TEXT ...

Every way quantizes the layers of a model in the same bits and groups; embedding and head stay
float. A way that reads one text is calibrated on the first of ``--texts``, the others on as many
blocks of each. Judge on other text of the same kinds and on a kind that nobody was calibrated on.
The last line is one JSON document.
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
from mistill.folders.folder import describe
from mistill.sources.source import resolve_model
from mistill.text.vocabulary import load_vocabulary

WAYS: dict[str, dict[str, Any]] = {
    "gptq, symmetric, one text": {"method": "gptq", "symmetric": True, "one": True},
    "gptq, symmetric": {"method": "gptq", "symmetric": True},
    "gptq, asymmetric": {"method": "gptq", "symmetric": False},
    "gptaq, asymmetric": {"method": "gptaq", "symmetric": False},
    "gptaq, asymmetric, damped": {"method": "gptaq", "symmetric": False, "damp_percent": 0.1},
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Quantize in every way, and measure.

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
    rows = []
    for way in args.ways:
        options = dict(WAYS[way])
        texts = args.texts[:1] if options.pop("one", False) else args.texts
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            quantized = quantize.to_gptq(
                model,
                Path(folder) / "quantized",
                texts=texts,
                bits=args.bits,
                group_size=args.group_size,
                samples=args.samples,
                block_length=args.block_length,
                seed=args.seed,
                **options,
            )
            seconds = time.process_time() - started
            size = describe(quantized).weight_bytes
            figures = figures_of(references, predictions_of(quantized, held_out), held_out)
        rows.append(
            {
                "way": way,
                "texts": [Path(text).name for text in texts],
                "processor_seconds": seconds,
                "bytes": size,
                "held_out": figures,
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {
        "model": Path(args.model).name,
        "bits": args.bits,
        "group_size": args.group_size,
        "samples": args.samples,
        "block_length": args.block_length,
        "seed": args.seed,
        "threads": args.threads,
        "scored_tokens": {name: int(blocks.kept.sum()) for name, blocks in held_out.items()},
        "ways": rows,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Quantize, measure, and print a JSON document.

    Args:
        words: The command line; None for this process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--texts", nargs="+", required=True, help="text to calibrate on")
    parser.add_argument("--held-out", nargs="+", required=True, help="text to measure on")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=48, help="calibration blocks")
    parser.add_argument("--scored-tokens", type=int, default=4096, help="of each held-out text")
    parser.add_argument("--block-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(run(parser.parse_args(words))))


if __name__ == "__main__":
    main()
