"""What does each way of quantizing cost, and what does it buy?

    python examples/compare_tradeoffs.py MODEL TEXTS HELD_OUT OUT

MODEL is a float model folder; TEXTS calibrate, HELD_OUT judges; OUT is a folder for what is made.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

import benchmarks
import export
import quantize


def quantize_in_all_ways(model: Path, texts: str, out: Path) -> list[Path]:
    """Plain rounding, GPTQ at 4 and 8 bits, NF4, and the ONNX folder of one of them."""
    small = quantize.to_gptq(model, out / "gptq4", texts=texts, bits=4, group_size=32)
    return [
        quantize.to_rounding(model, out / "rounding4", bits=4, group_size=32),
        small,
        quantize.to_gptq(model, out / "gptq8", texts=texts, bits=8, group_size=32),
        quantize.to_nf4(model, out / "nf4"),
        export.to_onnx(small, out / "chatbot"),
    ]


def main() -> None:
    """Make the copies, compare them, and save the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts")
    parser.add_argument("held_out")
    parser.add_argument("out", type=Path)
    parser.add_argument("--scored-tokens", type=int, default=4000)
    arguments = parser.parse_args()
    copies = quantize_in_all_ways(arguments.model, arguments.texts, arguments.out)
    report = benchmarks.compare(
        [arguments.model, *copies],
        texts=arguments.held_out,
        scored_tokens=arguments.scored_tokens,
    )
    Console().print(report.table())
    print(report.save(arguments.out / "report") / "report.html")


if __name__ == "__main__":
    main()
