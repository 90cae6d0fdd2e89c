"""QLoRA on layers of Mistral 7B's shapes: what a layer adds to the time and memory of a step.

    python -m benchmarks.suite.big_tuning_layer --tokens 2048

Models of one and of two layers with random weights are held in NF4 with double quantization, and
take one step each through adapters on all seven matrices, in float32, in a process of its own. What
the second layer adds is what every layer adds; a model of 32 is extrapolated from both, which the
report says: it has not been run. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.suite.random_mistral import WIDTH, child_environment, make_folder

ALL_LAYERS = 32


def step_here(folder: Path, tokens: int, rank: int, checkpointing: bool) -> dict[str, Any]:
    """Take one step in this process.

    Args:
        folder: The model.
        tokens: Of one block, half of which are to be predicted.
        rank: Of the adapters.
        checkpointing: Whether activations are recomputed.

    Returns:
        Seconds, and bytes of memory.
    """
    from benchmarks.figures.footprint import own_memory
    from mistill.folders.folder import open_folder
    from mistill.pytorch.spread import load_spread
    from mistill.text.blocks import Document, pack
    from mistill.training.adapters import add_adapters
    from mistill.training.lean import remember_less
    from mistill.training.memory import give_back, unmap_when_freed
    from mistill.training.optimizers import make_optimizer
    from mistill.training.processes import accelerating
    from tune.settings import SupervisedSettings
    from tune.supervision.step import SupervisedStep, accumulate_gradients
    from tune.supervision.trainer import adapter_plan

    unmap_when_freed()
    settings = SupervisedSettings(
        base="nf4", lora_rank=rank, batch_size=1, block_length=tokens,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    model = load_spread(open_folder(folder), torch.float32, {"": "cpu"}, nf4=True)
    model.requires_grad_(False)
    add_adapters(model, rank, adapter_plan(settings))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    remember_less(model)
    model.train()
    ids = np.random.default_rng(0).integers(5, 250, tokens)
    blocks = pack([Document(ids, np.arange(tokens) >= tokens // 2)], tokens)
    with TemporaryDirectory() as scratch, accelerating(settings, Path(scratch)) as accelerator:
        module, optimizer = accelerator.prepare(
            SupervisedStep(model, settings),
            make_optimizer(model, name="adamw", learning_rate=2e-4, weight_decay=0.0),
        )
        give_back()
        loaded = own_memory()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest memory so far
        began, used = time.perf_counter(), time.process_time()
        accumulate_gradients(module, blocks, settings, accelerator, 0)
        accelerator.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        return {
            "seconds": round(time.perf_counter() - began, 2),
            "processor_seconds": round(time.process_time() - used, 2),
            "loading_peak_bytes": loaded.peak_bytes,
            "resident_bytes": loaded.resident_bytes,
            "step_peak_bytes": own_memory().peak_bytes,
        }


def main() -> None:
    """Measure, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child is not None:
        print(json.dumps(step_here(args.child, args.tokens, args.rank, args.checkpointing)))
        return
    rest = [
        *("--tokens", str(args.tokens), "--rank", str(args.rank)),
        *("--threads", str(args.threads)),
    ]
    report: dict[str, Any] = {"tokens": args.tokens, "rank": args.rank, "layers": {}}
    with TemporaryDirectory() as home:
        for layers in (1, 2):
            folder = Path(home) / str(layers)
            make_folder(folder, layers, args.width)
            for way in ((), ("--checkpointing",)):
                command = [sys.executable, "-m", "benchmarks.suite.big_tuning_layer", *rest, *way]
                done = subprocess.run(
                    [*command, "--child", str(folder)],
                    env=child_environment(args.threads),
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                name = "recomputed" if way else "remembered"
                report["layers"].setdefault(name, {})[layers] = json.loads(
                    done.stdout.splitlines()[-1]
                )
    report[f"extrapolated_to_{ALL_LAYERS}_layers"] = {
        name: {
            figure: round(one[1][figure] + (ALL_LAYERS - 1) * (one[2][figure] - one[1][figure]), 2)
            for figure in ("processor_seconds", "resident_bytes", "step_peak_bytes")
        }
        for name, one in report["layers"].items()
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
