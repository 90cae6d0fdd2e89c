"""A whole step of supervised tuning: mistill over float and over 4-bit weights, and TRL's trainer.

    python -m benchmarks.suite.tuning_step MODEL

All train adapters of rank 16 on all seven matrices, in float32, on the same blocks with the same
labels and the same optimizer. TRL's turn is its ``training_step`` and the optimizer's step, without
the rest of its loop. Peak memory is that of the process in its turn: weights, adapters, gradients,
moments, activations and logits. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite.turns import paired_ratio, peak_bytes, serve, summary, take_turns
from mistill.folders.folder import open_folder
from mistill.loss.batches import make_batch
from mistill.pytorch.loading import load_pytorch
from mistill.sources.source import resolve_model
from mistill.text.blocks import TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary
from mistill.training.adapters import MATRICES

METHODS = ("lora", "qlora", "trl_lora", "trl_qlora")

_RANK = 16


def blocks_of(args: argparse.Namespace) -> TokenBlocks:
    """The blocks of two steps."""
    documents = read_documents(args.texts, load_vocabulary(resolve_model(args.model)))
    blocks = pack(documents, args.block_length)
    return blocks[: 2 * args.blocks]


def ours(args: argparse.Namespace, base: Any) -> None:
    """A child that trains with mistill."""
    from mistill.pytorch.products import fast_products
    from mistill.pytorch.spread import load_spread
    from mistill.training.adapters import add_adapters
    from mistill.training.lean import remember_less
    from mistill.training.memory import give_back, unmap_when_freed
    from mistill.training.optimizers import make_optimizer
    from mistill.training.processes import accelerating
    from tune.settings import SupervisedSettings
    from tune.supervision.step import SupervisedStep, accumulate_gradients
    from tune.supervision.trainer import adapter_plan

    blocks = blocks_of(args)
    settings = SupervisedSettings(
        batch_size=args.blocks, lora_rank=_RANK, base=base, block_length=args.block_length
    )
    info = open_folder(resolve_model(args.model))
    unmap_when_freed()
    if base == "nf4":
        model = load_spread(info, torch.float32, {"": "cpu"}, nf4=True)
    else:
        model = load_pytorch(info.path)
    torch.manual_seed(0)
    model.requires_grad_(False)
    add_adapters(model, _RANK, adapter_plan(settings))
    remember_less(model)
    model.train()
    halves = [blocks[: args.blocks], blocks[args.blocks :]]
    with tempfile.TemporaryDirectory() as folder, accelerating(settings, Path(folder)) as one:
        module, optimizer = one.prepare(
            SupervisedStep(model, settings),
            make_optimizer(model, name="adamw", learning_rate=2e-4, weight_decay=0.0),
        )
        give_back()

        @fast_products()  # as the training loop does
        def work() -> Mapping[str, Any]:
            now = halves.pop(0)
            halves.append(now)
            started, used = time.perf_counter(), time.process_time()
            sums = accumulate_gradients(module, now, settings, one, 0)
            one.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return _figures(sums.loss, now.tokens, started, used)

        serve(work)


def trl(args: argparse.Namespace, base: str) -> None:
    """A child that trains with TRL."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    blocks = blocks_of(args)
    folder = resolve_model(args.model)
    options: dict[str, Any] = {}
    if base == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
                max_length=None,
                per_device_train_batch_size=args.blocks,
            ),
            train_dataset=Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}]),
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
            peft_config=LoraConfig(
                r=_RANK, lora_alpha=2 * _RANK, lora_dropout=0.0, target_modules=list(MATRICES)
            ),
        )
    adapted = trainer.model
    assert adapted is not None
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    adapted.train()
    halves: list[tuple[dict[str, Any], int]] = []
    for part in (blocks[: args.blocks], blocks[args.blocks :]):
        batch = make_batch(part, torch.device("cpu"))
        labels = torch.full_like(batch.ids, -100)
        labels[:, 1:][batch.kept[:, :-1]] = batch.next_ids
        rows = {"input_ids": batch.ids, "labels": labels, "position_ids": batch.positions}
        halves.append((rows, part.tokens))

    def work() -> Mapping[str, Any]:
        rows, tokens = halves.pop(0)
        halves.append((rows, tokens))
        kept = (rows["labels"] != -100).sum()
        started, used = time.perf_counter(), time.process_time()
        loss = trainer.training_step(adapted, dict(rows), num_items_in_batch=kept)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return _figures(float(loss), tokens, started, used)

    serve(work)


def _figures(loss: float, tokens: int, started: float, used: float) -> dict[str, Any]:
    seconds = time.perf_counter() - started
    return {
        "loss": loss,
        "tokens_per_second": tokens / seconds,
        "processor_seconds": time.process_time() - used,
        "process_peak_mib": peak_bytes() / 2**20,
    }


def main() -> None:
    """Compare, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--texts", default="@demo-train")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=1, help="blocks of a step")
    parser.add_argument("--block-length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child is None:
        print(json.dumps(compare(args)))
        return
    base = "nf4" if args.child.endswith("qlora") else "float"
    (trl if args.child.startswith("trl") else ours)(args, base)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Let all train in turn.

    Args:
        args: The command line.

    Returns:
        The JSON document.
    """
    rest = [
        args.model,
        *("--texts", args.texts, "--blocks", str(args.blocks)),
        *("--block-length", str(args.block_length), "--threads", str(args.threads)),
    ]
    child = [sys.executable, "-m", "benchmarks.suite.tuning_step", *rest, "--child"]
    samples = take_turns({method: [*child, method] for method in args.methods}, args.rounds)
    figures = ("tokens_per_second", "seconds", "processor_seconds", "process_peak_mib", "peak_mib")
    report: dict[str, Any] = {
        "model": args.model,
        "tokens_in_a_step": args.blocks * args.block_length,
        "threads": args.threads,
        "methods": {
            method: {
                **{figure: summary(turns, figure) for figure in figures},
                "losses": [turn["loss"] for turn in turns],
            }
            for method, turns in samples.items()
        },
    }
    if "trl_lora" in samples:
        theirs = samples["trl_lora"]
        for method in args.methods:
            if method != "trl_lora":
                report[f"{method}_over_trl_lora"] = {
                    figure: paired_ratio(samples[method], theirs, figure)
                    for figure in ("seconds", "processor_seconds", "process_peak_mib")
                }
    return report


if __name__ == "__main__":
    main()
