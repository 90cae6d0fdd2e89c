"""Encoding a weight in NF4: mistill's codec against bitsandbytes', which it equals bit for bit.

    python -m benchmarks.suite.nf4_codec

Both encode the same random weight, with double quantization, and take turns in processes of their
own. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.suite.turns import paired_ratio, serve, summary, take_turns

METHODS = ("mistill", "bitsandbytes")


def child(args: argparse.Namespace) -> None:
    """A child that encodes with one of the two.

    Args:
        args: The command line.
    """
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(args.size, args.size, generator=generator).mul_(0.02)
    if args.child == "mistill":
        from quantize.nf4.nf4_codec import encode_nf4

        def work() -> Mapping[str, Any]:
            return {"bytes": sum(t.nbytes for t in encode_nf4(W, True).values())}

    else:
        from bitsandbytes.functional import quantize_4bit

        def work() -> Mapping[str, Any]:
            codes, state = quantize_4bit(W, quant_type="nf4", compress_statistics=True)
            return {"bytes": codes.nbytes + sum(t.nbytes for t in state.as_dict(True).values())}

    serve(work)


def main() -> None:
    """Compare, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows, and columns")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        child(args)
        return
    shared = ["--size", str(args.size), "--threads", str(args.threads)]
    command = [sys.executable, "-m", "benchmarks.suite.nf4_codec", *shared, "--child"]
    samples = take_turns({name: [*command, name] for name in METHODS}, args.rounds)
    report = {
        "size": args.size,
        "threads": args.threads,
        "seconds": {name: summary(turns, "seconds") for name, turns in samples.items()},
        "bytes": {name: turns[0]["bytes"] for name, turns in samples.items()},
        "over_bitsandbytes": paired_ratio(samples["mistill"], samples["bitsandbytes"], "seconds"),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
