"""A whole optimizer step: mistill with a live and with a cached teacher, and TRL's GKDTrainer.

    python -m benchmarks.suite.training_step TEACHER STUDENT --rivals-python PATH

All train the same student on the same blocks with the same optimizer, off-policy, forward KL,
float32. ``scales`` is the same student in four bits, of which ``quantize.tune`` trains scales and
norms alone, from the teacher's hidden states on disk. ``mkl`` is the live teacher with torch's own
choice of a library for products of matrices, where ``mistill.pytorch.products`` chooses another.
TRL's turn is its ``training_step`` and the optimizer's step, without the rest of its loop. Peak
memory is that of the process: weights, gradients, optimizer and all. The teacher is asked once for
``cached`` and for ``scales``, before anything is timed. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite.turns import paired_ratio, peak_bytes, serve, summary, take_turns
from mistill.loss.batches import make_batch
from mistill.text.blocks import TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary

METHODS = ("live", "mkl", "cached", "scales", "trl")


def blocks_of(args: argparse.Namespace) -> TokenBlocks:
    """The blocks of one step, and of the step that is announced next."""
    documents = read_documents(args.texts, load_vocabulary(args.teacher))
    blocks = pack(documents, args.block_length)
    return blocks[: 2 * args.blocks]


def ours(args: argparse.Namespace, targets: str | None, *, by_mkl: bool) -> None:
    """A child that trains with mistill."""
    from accelerate import Accelerator

    from distill.settings import TrainSettings
    from distill.teacher.teacher import LiveTeacher, Teacher
    from distill.training.step import DistillationStep, accumulate_gradients
    from mistill.pytorch.loading import load_pytorch
    from mistill.pytorch.products import fast_products
    from mistill.training.lean import remember_less
    from mistill.training.memory import unmap_when_freed
    from mistill.training.optimizers import make_optimizer

    blocks = blocks_of(args)
    waited = [0.0]
    teacher: Teacher
    if targets is None:
        teacher = LiveTeacher(load_pytorch(args.teacher).requires_grad_(False))
    else:
        from distill.targets.cached_teacher import open_targets

        vocabulary = load_vocabulary(args.teacher)
        cached = open_targets(targets, vocabulary, temperature=1.0, texts=[("texts", blocks)])
        teacher = _Clocked(cached, waited)
    settings = TrainSettings(batch_size=args.blocks, micro_batch_size=args.blocks)
    accelerator = Accelerator(cpu=True)
    student = load_pytorch(args.student).train()
    remember_less(student)
    unmap_when_freed()
    module, optimizer = accelerator.prepare(
        DistillationStep(student, settings),
        make_optimizer(
            student,
            name=settings.optimizer,
            learning_rate=settings.peak_learning_rate,
            weight_decay=settings.weight_decay,
        ),
    )
    halves = [blocks[: args.blocks], blocks[args.blocks :]]
    teacher.expect(halves[0])

    def work() -> Mapping[str, Any]:
        waited[0] = 0.0
        started = time.perf_counter()
        now = halves.pop(0)
        halves.append(now)
        teacher.expect(halves[0])
        sums = accumulate_gradients(module, teacher, now, settings, accelerator)
        accelerator.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        return {
            "loss": sums.loss,
            "tokens_per_second": sums.tokens / seconds,
            "waited_for_teacher": waited[0] / seconds,
            "process_peak_mib": peak_bytes() / 2**20,
        }

    # The training loop chooses a library for its products too.
    with nullcontext() if by_mkl else fast_products():
        serve(work)


def scales(args: argparse.Namespace) -> None:
    """A child that tunes scales and norms with mistill; its student is a GPTQ folder."""
    from mistill.pytorch.products import fast_products
    from mistill.training.processes import accelerating
    from mistill.training.step_module import prepare_step
    from quantize.scales.scale_training import ScaledModel, ScaleStep, ScaleTuning
    from quantize.scales.teacher_states import ask_teacher
    from quantize.settings import TuningSettings

    blocks = blocks_of(args)
    settings = TuningSettings(batch_size=args.blocks, micro_batch_size=args.blocks)
    with tempfile.TemporaryDirectory() as scratch, fast_products():
        work = Path(scratch)
        with accelerating(settings, logs=work) as accelerator:
            said = ask_teacher(Path(args.teacher), blocks, blocks[:1], accelerator, work)
            scaled = ScaledModel(Path(args.student), norms=True)
            module, optimizer = prepare_step(
                ScaleStep(scaled.model, settings.loss_memory_mib),
                accelerator,
                optimizer="adamw",
                learning_rate=settings.learning_rate,
                weight_decay=0.0,
                gradient_checkpointing=False,
            )
            task = ScaleTuning(module, scaled, *said, blocks[:1], settings, accelerator)
            halves = [blocks[: args.blocks], blocks[args.blocks :]]

            def work_once() -> Mapping[str, Any]:
                started = time.perf_counter()
                now = halves.pop(0)
                halves.append(now)
                sums = task.gradients(0, now)
                optimizer.step()
                optimizer.zero_grad()
                seconds = time.perf_counter() - started
                return {
                    "loss": sums.loss,
                    "tokens_per_second": sums.tokens / seconds,
                    "process_peak_mib": peak_bytes() / 2**20,
                }

            serve(work_once)


class _Clocked:
    """A cached teacher, and how long the student waits for it."""

    def __init__(self, teacher: Any, waited: list[float]) -> None:
        self.teacher, self.waited = teacher, waited

    def expect(self, blocks: TokenBlocks) -> None:
        started = time.perf_counter()
        self.teacher.expect(blocks)
        self.waited[0] += time.perf_counter() - started

    def targets(self, blocks: TokenBlocks, batch: Any) -> Any:
        started = time.perf_counter()
        found = self.teacher.targets(blocks, batch)
        self.waited[0] += time.perf_counter() - started
        return found


def trl(args: argparse.Namespace) -> None:
    """A child that trains with TRL."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from mistill.pytorch.loading import load_pytorch

    blocks = blocks_of(args)
    teacher, student = load_pytorch(args.teacher), load_pytorch(args.student)
    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=folder,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            per_device_train_batch_size=args.blocks,
        )
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_list([{"input_ids": [1, 2]}]),
            processing_class=AutoTokenizer.from_pretrained(args.teacher),
            data_collator=lambda rows: rows,
        )
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    student.train()
    halves: list[dict[str, Any]] = []
    for part in (blocks[: args.blocks], blocks[args.blocks :]):
        batch = make_batch(part, torch.device("cpu"))
        labels = torch.full_like(batch.ids, -100)
        labels[:, 1:][batch.kept[:, :-1]] = batch.next_ids
        halves.append(
            {
                "input_ids": batch.ids,
                "attention_mask": torch.ones_like(batch.ids),
                "labels": labels,
                "tokens": part.tokens,
            }
        )

    def work() -> Mapping[str, Any]:
        started = time.perf_counter()
        batch = dict(halves.pop(0))
        halves.append(dict(batch))
        tokens = batch.pop("tokens")
        kept = (batch["labels"] != -100).sum()
        loss = trainer.training_step(student, batch, num_items_in_batch=kept)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        return {
            "loss": float(loss),
            "tokens_per_second": tokens / seconds,
            "process_peak_mib": peak_bytes() / 2**20,
        }

    serve(work)


def main() -> None:
    """Compare, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("--texts", default="@demo-train")
    parser.add_argument("--rivals-python", help="Python that has trl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=4, help="blocks of a step")
    parser.add_argument("--block-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--targets", help="cached targets of the texts; made where they are not")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child == "trl":
        trl(args)
    elif args.child == "scales":
        scales(args)
    elif args.child:
        ours(args, args.targets, by_mkl=args.child == "mkl")
    else:
        print(json.dumps(compare(args)))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Let all train in turn.

    Args:
        args: The command line.

    Returns:
        The JSON document.
    """
    import distill
    import quantize

    rest = [
        *("--texts", args.texts, "--blocks", str(args.blocks)),
        *("--block-length", str(args.block_length), "--threads", str(args.threads)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        targets = args.targets or Path(folder) / "targets"
        if not Path(targets).exists():
            distill.cache_targets(
                args.teacher, targets, texts=args.texts, block_length=args.block_length
            )
        rounded = quantize.to_rounding(
            args.student, Path(folder) / "rounded", bits=4, group_size=32
        )
        commands = {}
        for method in METHODS:
            student = str(rounded) if method == "scales" else args.student
            python = args.rivals_python if method == "trl" else sys.executable
            if python:
                command = [python, "-m", "benchmarks.suite.training_step", args.teacher, student]
                command += ["--child", method]
                extra = ["--targets", str(targets)] if method == "cached" else []
                commands[method] = [*command, *rest, *extra]
        samples = take_turns(commands, args.rounds)
    figures = ("tokens_per_second", "process_peak_mib", "peak_mib")
    report: dict[str, Any] = {
        "teacher": args.teacher,
        "student": args.student,
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
    from_disk = samples["cached"]
    report["waited_for_cached_targets"] = summary(from_disk, "waited_for_teacher")
    by_mkl = samples["mkl"]
    report["live_over_mkl"] = paired_ratio(samples["live"], by_mkl, "tokens_per_second")
    report["cached_over_live"] = paired_ratio(from_disk, samples["live"], "tokens_per_second")
    by_scales = samples["scales"]
    report["scales_over_cached"] = paired_ratio(by_scales, from_disk, "tokens_per_second")
    report["scales_peak_over_cached"] = paired_ratio(by_scales, from_disk, "process_peak_mib")
    if "trl" in samples:
        theirs = samples["trl"]
        report["live_over_trl"] = paired_ratio(samples["live"], theirs, "tokens_per_second")
        report["live_peak_over_trl"] = paired_ratio(samples["live"], theirs, "process_peak_mib")
        report["live_step_memory_over_trl"] = paired_ratio(samples["live"], theirs, "peak_mib")
    return report


if __name__ == "__main__":
    main()
