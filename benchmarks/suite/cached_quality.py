"""Is a student of cached targets as good as one of a live teacher? Top-k targets beside them.

    python -m benchmarks.suite.cached_quality TEACHER STUDENT --tokens 12288 --seeds 0 1 2

For each seed the same student reads the same text in the same order and learns from the teacher
itself, from targets that ``distill.cache_targets`` drew with that seed, and from the teacher's 12
and 50 most probable tokens, renormalised, as other caches keep them. All are judged by the whole
distribution of the live teacher on the same held-out text. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any, cast

import torch

import distill
from distill.settings import TrainSettings
from distill.targets.cached_teacher import CachedTeacher, open_targets
from distill.teacher.teacher import LiveTeacher, Teacher
from distill.training.trainer import train_student
from mistill.loss.batches import Batch
from mistill.loss.targets import SampledTargets, TeacherTargets
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import TokenBlocks
from mistill.text.vocabulary import Vocabulary, load_vocabulary
from mistill.training.processes import accelerating
from mistill.training.training_text import read_blocks

logger = logging.getLogger(__name__)

# A token's id and its probability in two bytes each.
_TOP_K_BYTES = 4


class TopOfTheTeacher:
    """The most probable tokens of a live teacher, renormalised."""

    def __init__(self, teacher: LiveTeacher, k: int) -> None:
        self.teacher, self.k = teacher, k

    def targets(self, blocks: TokenBlocks, batch: Batch) -> TeacherTargets:
        """The top of each distribution."""
        dense = self.teacher.targets(blocks, batch)
        ids, weights = [], []
        for start in range(0, len(dense), 64):
            rows = slice(start, min(start + 64, len(dense)))
            out = torch.empty(rows.stop - start, dense.vocabulary_size)
            log_p = dense.log_probabilities(rows, 1.0, out, torch.empty_like(out))
            top = log_p.topk(self.k, dim=-1)
            ids.append(top.indices)
            weights.append(torch.softmax(top.values, dim=-1))
        p = torch.cat(weights)
        entropy = -torch.xlogy(p, p).sum(dim=-1)
        return SampledTargets(torch.cat(ids), p, entropy, dense.vocabulary_size)

    def expect(self, blocks: TokenBlocks) -> None:
        """Nothing: it is asked when it is needed."""


class JudgedByTheTeacher:
    """Teaches as one teacher does and judges as another."""

    def __init__(self, lessons: Teacher, judge: LiveTeacher, held_out: TokenBlocks) -> None:
        self.lessons, self.judge = lessons, judge
        self.held_out = {row.tobytes() for row in held_out.ids}

    def _judges(self, blocks: TokenBlocks) -> bool:
        return all(row.tobytes() in self.held_out for row in blocks.ids)

    def targets(self, blocks: TokenBlocks, batch: Batch) -> TeacherTargets:
        """From the judge about held-out text, else from the other."""
        teacher = self.judge if self._judges(blocks) else self.lessons
        return teacher.targets(blocks, batch)

    def expect(self, blocks: TokenBlocks) -> None:
        """Pass on what will be asked."""
        if not self._judges(blocks):
            self.lessons.expect(blocks)


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train a student by every method and seed.

    Args:
        args: The command line.
        folder: For what is made on the way.

    Returns:
        The JSON document.
    """
    vocabulary = load_vocabulary(args.teacher)
    live = LiveTeacher(load_pytorch(args.teacher).requires_grad_(False))
    runs_of: dict[str, list[dict[str, Any]]] = {}
    bytes_of: dict[str, float] = {"top-12": 12 * _TOP_K_BYTES, "top-50": 50 * _TOP_K_BYTES}
    for seed in args.seeds:
        settings = TrainSettings(
            tokens=args.tokens,
            block_length=args.block_length,
            batch_size=1,
            learning_rate=args.learning_rate,
            held_out_tokens=args.held_out_tokens,
            evaluate_every=0,
            checkpoint_every=0,
            seed=seed,
        )
        training, judged = read_blocks(args.texts, args.held_out, vocabulary, settings)
        for method in args.methods:
            lessons = _lessons(method, args, live, vocabulary, training, folder, seed, bytes_of)
            teacher = JudgedByTheTeacher(lessons, live, judged)
            work = folder / f"{method}-{seed}"
            work.mkdir()
            with accelerating(settings, logs=work) as accelerator:
                student = load_pytorch(args.student)
                progress = train_student(
                    student, teacher, training, judged, settings, accelerator=accelerator, work=work
                )
            if isinstance(lessons, CachedTeacher):
                lessons.close()
            result = {"seed": seed, "seconds": progress.seconds, **asdict(progress.last)}
            runs_of.setdefault(method, []).append(result)
            runs_of.setdefault("before", [asdict(progress.before)])
            logger.warning("%s, seed %d: held-out KL %.4f", method, seed, progress.last.kl)
    return _report(args, runs_of, bytes_of)


def _lessons(
    method: str,
    args: argparse.Namespace,
    live: LiveTeacher,
    vocabulary: Vocabulary,
    training: TokenBlocks,
    folder: Path,
    seed: int,
    bytes_of: dict[str, float],
) -> Any:
    if method == "live":
        return live
    if method.startswith("top-"):
        return TopOfTheTeacher(live, int(method.removeprefix("top-")))
    targets = folder / f"targets-{method}-{seed}"
    distill.cache_targets(
        args.teacher,
        targets,
        texts=args.texts,
        method=cast(Any, method),
        block_length=args.block_length,
        seed=seed,
    )
    size = sum(file.stat().st_size for file in targets.rglob("*") if file.is_file())
    opened = open_targets(targets, vocabulary, temperature=1.0, texts=[("texts", training)])
    bytes_of[method] = size / int(training.kept.sum())
    return opened


def _report(
    args: argparse.Namespace, runs_of: dict[str, list[dict[str, Any]]], bytes_of: dict[str, float]
) -> dict[str, Any]:
    before = runs_of.pop("before")[0]
    report: dict[str, Any] = {
        "teacher": args.teacher,
        "student": args.student,
        "tokens": args.tokens,
        "before": before,
        "runs": runs_of,
        "bytes_a_position": bytes_of,
        "mean_kl": {method: mean(run["kl"] for run in runs) for method, runs in runs_of.items()},
    }
    if "live" in runs_of:
        report["kl_over_live"] = {
            method: [
                run["kl"] / base["kl"] for run, base in zip(runs, runs_of["live"], strict=True)
            ]
            for method, runs in runs_of.items()
        }
    return report


def main() -> None:
    """Compare, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("--texts", default="@demo-train")
    parser.add_argument("--held-out", default="@demo-held-out")
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--held-out-tokens", type=int, default=4_096)
    parser.add_argument("--block-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["live", "systematic", "top-12", "top-50"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(args, Path(folder))))


if __name__ == "__main__":
    main()
