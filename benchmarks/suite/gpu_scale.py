"""Mistral 7B's real shapes on one GPU: what distilling from it costs, live and from targets.

    python -m benchmarks.suite.gpu_scale
    python -m benchmarks.suite.gpu_scale --rivals-python PATH      # and the loss heads beside TRL's

Weights are random: speed and memory do not depend on them, and nothing else is claimed. Measured
are, for a student of about 0.8 billion parameters and a teacher in bfloat16, in four bits, or on
disk: tokens a second of a whole optimizer step, its peak memory, and the most blocks that fit in
a micro-batch; and for the loss heads alone, time and workspace. ``--device cpu --tiny`` runs the
same program where there is no GPU, to see that it runs. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.settings import TrainSettings
from distill.teacher.teacher import LiveTeacher
from distill.training.step import DistillationStep, accumulate_gradients
from mistill.loss.batches import Batch
from mistill.loss.targets import SampledTargets, TeacherTargets
from mistill.text.blocks import TokenBlocks
from mistill.training.optimizers import make_optimizer
from mistill.training.processes import precision_of_its_own

LARGE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4_096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SMALL = LARGE | {
    "hidden_size": 2_048,
    "intermediate_size": 5_632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
TINY = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HEADS = ("ours", "full logits", "trl", "liger")


def make_model(sizes: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    """A Mistral of these sizes with random weights, made where it is used."""
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(**sizes, sliding_window=None, tie_word_embeddings=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def in_four_bits(model: Any, device: str) -> Any:
    """The same model with bitsandbytes' NF4 in the place of its linear layers, but the head."""
    from bitsandbytes import nn as bnb

    quantized: Any = bnb
    for module in list(model.get_decoder().modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                linear = quantized.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                )
                linear.weight = quantized.Params4bit(
                    child.weight.data.cpu(), requires_grad=False, quant_type="nf4"
                )
                setattr(module, name, linear.to(device))
    return model


class FromDisk:
    """Targets as they come from disk: twelve tokens of each distribution."""

    def __init__(self, vocabulary_size: int) -> None:
        self.vocabulary_size = vocabulary_size

    def targets(self, blocks: TokenBlocks, batch: Batch) -> TeacherTargets:
        """Twelve tokens for every kept position."""
        kept = int(blocks.kept.sum())
        device = batch.ids.device
        ids = torch.randint(self.vocabulary_size, (kept, 12), device=device)
        weights = torch.full((kept, 12), 1 / 12, device=device)
        return SampledTargets(ids, weights, torch.ones(kept, device=device), self.vocabulary_size)

    def expect(self, blocks: TokenBlocks) -> None:
        """Nothing: it is made when it is asked for."""


def random_blocks(count: int, length: int, vocabulary_size: int) -> TokenBlocks:
    """Text that nobody wrote."""
    generator = np.random.default_rng(0)
    return TokenBlocks(
        ids=generator.integers(3, vocabulary_size, (count, length)),
        mask=np.ones((count, length), bool),
        documents=np.arange(count, dtype=np.int32)[:, None].repeat(length, axis=1),
    )


def measured(work: Callable[[], object], device: str, rounds: int) -> dict[str, float]:
    """Seconds of a call, and the memory that it needs beside what is there."""
    is_gpu = device.startswith("cuda")
    work()
    seconds = []
    if is_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        if is_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    figures = {"seconds": median(seconds), "lowest": min(seconds), "highest": max(seconds)}
    if is_gpu:
        peak = torch.cuda.max_memory_allocated()
        figures |= {"peak_gib": peak / 2**30, "workspace_mib": (peak - before) / 2**20}
    return figures


@precision_of_its_own()
def training(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Whole optimizer steps with one kind of teacher, in micro-batches of growing size."""
    from accelerate import Accelerator

    teacher_sizes, student_sizes = (TINY, TINY) if args.tiny else (LARGE, SMALL)
    is_gpu = args.device.startswith("cuda")
    accelerator = Accelerator(cpu=not is_gpu, mixed_precision="bf16" if is_gpu else "no")
    vocabulary_size = teacher_sizes["vocab_size"]
    teacher: Any = FromDisk(vocabulary_size)
    if kind != "targets":
        model = make_model(teacher_sizes, torch.bfloat16 if is_gpu else torch.float32, args.device)
        teacher = LiveTeacher(in_four_bits(model, args.device) if kind == "nf4" else model)
    student = make_model(student_sizes, torch.float32, args.device).requires_grad_(True).train()
    settings = TrainSettings(batch_size=1, gradient_checkpointing=True)
    student.activation_checkpointing_enable({"use_reentrant": False})
    module, optimizer = accelerator.prepare(
        DistillationStep(student, settings),
        make_optimizer(
            student,
            name=settings.optimizer,
            learning_rate=settings.peak_learning_rate,
            weight_decay=settings.weight_decay,
        ),
    )

    def step(text: TokenBlocks) -> None:
        chosen = TrainSettings(batch_size=len(text), micro_batch_size=len(text))
        accumulate_gradients(module, teacher, text, chosen, accelerator)
        optimizer.step()
        optimizer.zero_grad()

    report: dict[str, Any] = {}
    blocks = 1
    while blocks <= args.most_blocks:
        text = random_blocks(blocks, args.block_length, vocabulary_size)
        try:
            figures = measured(partial(step, text), args.device, args.rounds)
        except torch.OutOfMemoryError:
            break
        figures["tokens_per_second"] = text.tokens / figures["seconds"]
        report[f"{blocks} blocks"] = figures
        report["largest_micro_batch"] = blocks
        blocks *= 2
    accelerator.free_memory()
    return report


def head(args: argparse.Namespace) -> dict[str, Any]:
    """One loss head on the GPU, in the Python that has it."""
    from benchmarks.suite.loss_head import LOSSES

    V, T, D, wide = (500, 64, 32, 48) if args.tiny else (32_000, 8_192, 1_024, 4_096)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, device=args.device, dtype=dtype) / math.sqrt(math.sqrt(size[-1]))

    hidden, weight = numbers(T, D).requires_grad_(), numbers(V, D).requires_grad_()
    p_hidden, p_weight = numbers(T, wide), numbers(V, wide)
    mask = torch.ones(T, dtype=torch.bool, device=args.device)

    def work() -> None:
        LOSSES[args.head](hidden, weight, p_hidden, p_weight, mask).backward()
        hidden.grad = weight.grad = None

    return measured(work, args.device, args.rounds)


def main() -> int:
    """Measure, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block-length", type=int, default=1_024)
    parser.add_argument("--most-blocks", type=int, default=64)
    parser.add_argument("--rivals-python", help="Python that has trl and liger-kernel")
    parser.add_argument("--head", choices=HEADS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no CUDA device; try --device cpu --tiny", file=sys.stderr)
        return 2
    if args.head:
        print(json.dumps(head(args)))
        return 0
    report: dict[str, Any] = {"device": args.device, "loss_heads": {}}
    if args.device.startswith("cuda"):
        report["device"] = torch.cuda.get_device_name()
    for method in HEADS:
        python = sys.executable if method in ("ours", "full logits") else args.rivals_python
        if python:
            command = [python, "-m", "benchmarks.suite.gpu_scale", "--head", method]
            command += ["--device", args.device, "--rounds", str(args.rounds)]
            done = subprocess.run(
                [*command, *(["--tiny"] if args.tiny else [])],
                check=True, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            report["loss_heads"][method] = json.loads(done.stdout.splitlines()[-1])
    report["training"] = {}
    for kind in ("bfloat16", "nf4", "targets"):
        report["training"][kind] = training(args, kind)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
