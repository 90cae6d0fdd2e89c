"""KL of onnxruntime's own 4-bit GPTQ and k-quant against mistill's GPTQ, at equal bits and groups.

    python -m benchmarks.suite.onnxruntime_quantizers MODEL --texts CALIBRATION --held-out TEXT

onnxruntime's quantizers work on a float32 graph, which mistill exports; the codes that they leave
in it are turned back into floats and put in the place of the model's matrices in PyTorch, so that
all are measured alike and nothing but the codes counts. Embedding and head stay float everywhere.
The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistill.measures.kl import compare, predict
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary

# The matrices that the graph holds side by side.
_PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_THEIRS = ("gptq", "k_quant")


def main() -> None:
    """Quantize, measure, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--texts", required=True, help="text to calibrate on")
    parser.add_argument("--held-out", required=True, help="text to measure on")
    parser.add_argument("--tokens", type=int, default=16_384, help="held-out tokens")
    parser.add_argument("--samples", type=int, default=4, help="calibration blocks")
    parser.add_argument("--block-length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--theirs", nargs="+", choices=_THEIRS, default=_THEIRS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        report = run(args, Path(scratch))
    # onnxruntime's bars end without a new line.
    print("\n" + json.dumps(report))


def run(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Quantize by all, and measure all.

    Args:
        args: The command line.
        scratch: An empty folder.

    Returns:
        The JSON document.
    """
    import export
    import quantize
    from quantize.calibration_text import draw_blocks
    from quantize.settings import GptqSettings

    draw = {"samples": args.samples, "block_length": args.block_length, "seed": args.seed}
    calibration = draw_blocks(args.texts, Path(args.model), GptqSettings(**draw))
    graph = export.to_onnx(args.model, scratch / "graph", precision="float32")
    documents = read_documents(args.held_out, load_vocabulary(args.model))
    blocks = pack(documents, args.block_length)
    count = min(len(blocks), -(-args.tokens // args.block_length))
    blocks = blocks[np.linspace(0, len(blocks) - 1, count).astype(np.int64)]
    reference = predict(load_pytorch(args.model), blocks)
    ways: dict[str, dict[str, Any]] = {}

    def measure(name: str, made: Callable[[], Any]) -> None:
        started = time.perf_counter()
        try:
            model = made()
        except ValueError as error:
            # onnxruntime's GPTQ cannot pack the zeros of an odd number of groups.
            ways[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            return
        seconds = time.perf_counter() - started
        one = compare({"": reference}, {"": predict(model, blocks)}, blocks)[""][""]
        ways[name] = {
            "kl": one.kl,
            "kl_standard_error": one.kl_standard_error,
            "perplexity": one.perplexity,
            "seconds": seconds,
        }
        print(f"{name}: KL {one.kl:.5f}, {seconds:.0f} s", file=sys.stderr, flush=True)

    def ours(call: str, **options: Any) -> Callable[[], Any]:
        target = scratch / f"ours-{len(ways)}"
        texts = {} if call == "to_rounding" else {"texts": args.texts, **draw}
        make = getattr(quantize, call)
        options |= {"bits": 4, "group_size": args.group_size, **texts}
        return lambda: load_pytorch(make(args.model, target, **options))

    for symmetric, kind in ((True, "symmetric"), (False, "asymmetric")):
        measure(f"rounding, {kind}", ours("to_rounding", symmetric=symmetric))
        measure(f"mistill gptq, {kind}", ours("to_gptq", symmetric=symmetric))
        measure(f"mistill gptaq, {kind}", ours("to_gptq", symmetric=symmetric, method="gptaq"))
        if "gptq" in args.theirs:
            measure(
                f"onnxruntime gptq, {kind}",
                partial(theirs, args, graph, "gptq", symmetric, calibration),
            )
    if "k_quant" in args.theirs:
        measure("onnxruntime k-quant", partial(theirs, args, graph, "k_quant", False, calibration))

    def ratio(name: str, other: str) -> dict[str, float]:
        """Ours over theirs, unless it was not asked for or failed."""
        there = ways.get(other, {}).get("kl")
        return {} if there is None else {name.removeprefix("mistill "): ways[name]["kl"] / there}

    return {
        "model": args.model,
        "held_out_tokens": int(blocks.kept.sum()),
        "calibration_tokens": calibration.tokens,
        "group_size": args.group_size,
        "ways": ways,
        "over_onnxruntime_gptq": {
            name: value
            for method in ("gptq", "gptaq")
            for kind in ("symmetric", "asymmetric")
            for name, value in ratio(
                f"mistill {method}, {kind}", f"onnxruntime gptq, {kind}"
            ).items()
        },
        "over_onnxruntime_k_quant": {
            name.removesuffix(", asymmetric"): value
            for method in ("gptq", "gptaq")
            for name, value in ratio(f"mistill {method}, asymmetric", "onnxruntime k-quant").items()
        },
    }


def theirs(
    args: argparse.Namespace,
    graph: Path,
    algorithm: str,
    symmetric: bool,
    calibration: TokenBlocks,
) -> Any:
    """The model with the codes of onnxruntime's quantizer.

    Args:
        args: The command line.
        graph: A float32 ONNX folder of the model.
        algorithm: "gptq" or "k_quant".
        symmetric: Whether the zero is the middle code.
        calibration: Text to calibrate on.

    Returns:
        The model in PyTorch.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        GPTQWeightOnlyQuantConfig,
        KQuantWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    loaded = onnx.load(graph / "model.onnx")
    for tensor in loaded.graph.initializer:
        if tensor.name == "first_logit":
            # The last layer, too, is to see every position.
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(1, np.int64), tensor.name))

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = _feeds(loaded, calibration)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return self.feeds.pop() if self.feeds else None

    config: Any = KQuantWeightOnlyQuantConfig()
    if algorithm == "gptq":
        config = GPTQWeightOnlyQuantConfig(calibration_data_reader=Reader())
    quantizer = MatMulNBitsQuantizer(
        loaded,
        bits=4,
        block_size=args.group_size,
        is_symmetric=symmetric,
        nodes_to_exclude=["logits"],
        algo_config=config,
    )
    quantizer.process()
    model = load_pytorch(args.model)
    replaced = 0
    with torch.no_grad():
        for output, weight in _weights(quantizer.model, args.group_size):
            _, layer, kind = output.split(".")
            start = 0
            for name in _PARTS[kind]:
                module: Any = model.get_submodule(f"model.layers.{layer}.{name}")
                stop = start + module.out_features
                module.weight.copy_(weight[start:stop])
                start = stop
                replaced += 1
    if replaced != 7 * model.config.num_hidden_layers:
        raise SystemExit(f"onnxruntime quantized {replaced} matrices, not all")
    return model


def _feeds(graph: Any, blocks: TokenBlocks) -> list[dict[str, NDArray[Any]]]:
    """What the graph is given for each block: its tokens and an empty cache."""
    feeds = []
    for ids in blocks.ids:
        feed: dict[str, NDArray[Any]] = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, len(ids)), np.int64),
        }
        for entry in graph.graph.input:
            if entry.name.startswith("past_key_values"):
                dims = entry.type.tensor_type.shape.dim
                feed[entry.name] = np.zeros((1, dims[1].dim_value, 0, dims[3].dim_value), "f4")
        feeds.append(feed)
    return feeds


def _weights(quantized: Any, group_size: int) -> Iterator[tuple[str, Tensor]]:
    """The float weights (N, K) that the codes of a graph stand for, by the name of the output."""
    from onnx import numpy_helper

    model = getattr(quantized, "model", quantized)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        # GPTQ quantizes the head even where it is told not to; here the head stays float.
        if node.op_type != "MatMulNBits" or node.output[0] == "logits":
            continue
        attributes = {one.name: one.i for one in node.attribute}
        size = attributes["block_size"]
        if size != group_size:
            raise SystemExit(f"{node.name} has blocks of {size}")
        packed, scales, *zeros = (
            numpy_helper.to_array(stored[name]) for name in node.input[1:4] if name
        )
        outputs, columns = attributes["N"], attributes["K"]
        codes = _nibbles(packed.reshape(outputs, -1)).reshape(outputs, -1, size)
        groups = codes.shape[1]
        zero = np.full((outputs, groups), 8.0, np.float32)
        if zeros:
            zero = _nibbles(zeros[0].reshape(outputs, -1))[:, :groups].astype(np.float32)
        weight = (codes - zero[..., None]) * scales.reshape(outputs, groups)[..., None]
        yield node.output[0], torch.from_numpy(weight.reshape(outputs, -1)[:, :columns].copy())


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Codes of 4 bits, the low half of each byte first."""
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(len(packed), -1).astype(np.float32)


if __name__ == "__main__":
    main()
