r"""KL at equal bytes: llama.cpp's Q4_K_M against a mix of 4 and 8 bits chosen by mistill.

    python -m benchmarks.suite.against_q4_k_m MODEL --texts CALIBRATION --held-out TEXT \
        --llama-cpp FOLDER_OF_ITS_PROGRAMS

llama.cpp quantizes a float32 GGUF file of the model, and its own ``llama-perplexity`` measures KL
to that file, with its own logits, on the second half of every 512 tokens. mistill gets as many
bytes as the tensors of that file have, and is measured on the very same tokens against the float
model in PyTorch. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mistill.measures.kl import compare, predict
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import TokenBlocks

# What llama-perplexity writes before its logits: this, then three whole numbers and the tokens.
_MAGIC = b"_logits_"


def main() -> None:
    """Compare, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--texts", required=True, help="text to calibrate on")
    parser.add_argument("--held-out", required=True, help="a plain text file to measure on")
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=128, help="runs of 512 tokens")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=32, help="calibration blocks")
    parser.add_argument("--method", default="gptaq", choices=["gptq", "gptaq"])
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(run(args, Path(scratch))))


def run(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Quantize by both, and measure both.

    Args:
        args: The command line.
        scratch: An empty folder.

    Returns:
        The JSON document.
    """
    import torch

    import export
    import quantize

    torch.set_num_threads(args.threads)
    exact, small = scratch / "float32.gguf", scratch / "q4_k_m.gguf"
    export.to_gguf(args.model, exact, dtype="float32")
    _call(args.llama_cpp / "llama-quantize", str(exact), str(small), "Q4_K_M")
    theirs, blocks = measure_llama_cpp(args, exact, small, scratch / "logits")
    budget = tensor_bytes(small)
    reference = predict(load_pytorch(args.model), blocks)
    ours = []
    for seed in args.seeds:
        mixed = quantize.to_mixed(
            args.model,
            scratch / f"mixed-{seed}",
            texts=args.texts,
            size_mb=budget / 1e6,
            method=args.method,
            symmetric=args.symmetric,
            samples=args.samples,
            seed=seed,
        )
        predicted = {"": predict(load_pytorch(mixed), blocks)}
        fidelity = compare({"": reference}, predicted, blocks)[""][""]
        ours.append(
            {
                "seed": seed,
                "kl": fidelity.kl,
                "kl_standard_error": fidelity.kl_standard_error,
                "perplexity": fidelity.perplexity,
                "bytes": sum(file.stat().st_size for file in mixed.glob("*.safetensors")),
            }
        )
        print(f"mixed (seed {seed}): KL {fidelity.kl:.5f}", file=sys.stderr, flush=True)
    return {
        "model": args.model,
        "tokens": int(blocks.kept.sum()),
        "float_perplexity": fidelity.reference_perplexity,
        "q4_k_m": {**theirs, "bytes": budget, "file_bytes": small.stat().st_size},
        "mistill": ours,
        "kl_over_q4_k_m": [run["kl"] / theirs["kl"] for run in ours],
    }


def measure_llama_cpp(
    args: argparse.Namespace, exact: Path, small: Path, logits: Path
) -> tuple[dict[str, float], TokenBlocks]:
    """KL of one GGUF file to another by llama.cpp itself, and the tokens it was measured on.

    Args:
        args: The command line.
        exact: The float file.
        small: The quantized one.
        logits: Where llama.cpp may leave the logits of the float file.

    Returns:
        Its figures; and its tokens, with the positions kept that it counts.
    """
    program = args.llama_cpp / "llama-perplexity"
    common = ["-c", "512", "-b", "512", "-t", str(args.threads), "--kl-divergence-base"]
    text = ["-f", args.held_out, "--chunks", str(args.chunks)]
    _call(program, "-m", str(exact), *text, *common, str(logits))
    output = _call(program, "-m", str(small), *common, str(logits), "--kl-divergence")
    figures = {}
    for name, words in (("kl", "Mean    KLD"), ("perplexity", "Mean PPL\\(Q\\)  ")):
        match = re.search(rf"{words}\s*:\s*([\d.]+)\s*±\s*([\d.]+)", output)
        if match is None:
            raise SystemExit(f"llama-perplexity named no {name}:\n{output[-3000:]}")
        figures[name] = float(match[1])
        figures[f"{name}_standard_error"] = float(match[2])
    return figures, counted_tokens(logits)


def counted_tokens(logits: Path) -> TokenBlocks:
    """The tokens at the head of a file of llama-perplexity.

    Args:
        logits: The file.

    Returns:
        A block for each of its chunks; its second half is to be predicted.
    """
    with logits.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise SystemExit(f"{logits} does not begin as llama-perplexity's files do")
        length, _, chunks = np.frombuffer(file.read(12), "<i4").tolist()
        ids = np.frombuffer(file.read(4 * length * chunks), "<i4").reshape(chunks, length)
    mask = np.zeros(ids.shape, bool)
    mask[:, length // 2 + 1 :] = True
    documents = np.broadcast_to(np.arange(chunks, dtype=np.int32)[:, None], ids.shape)
    return TokenBlocks(ids.astype(np.int64), mask, np.ascontiguousarray(documents))


def tensor_bytes(file: Path) -> int:
    """Bytes of the tensors of a GGUF file, without tokenizer and names.

    Args:
        file: The file.

    Returns:
        Their sum.
    """
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)


def _call(program: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(program), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{program.name} failed:\n{done.stdout[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
