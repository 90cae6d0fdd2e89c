"""How far from its teacher does each kind of student start?

Makes students of one teacher and measures the KL(teacher || student) of each on held-out text,
before any training. Run from the root of the repository, with a float teacher folder:

    python benchmarks/suite/student_starts.py TEACHER --layers 22

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import distill
from distill.settings import TrainSettings
from distill.teacher.teacher import LiveTeacher
from distill.training.held_out import HeldOutPart, ask_about, judge
from distill.training.step import DistillationStep
from mistill.folders.folder import open_folder
from mistill.folders.lineage import fingerprint, installed_versions, read_lineage
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary
from mistill.training.processes import accelerating


def held_out_blocks(teacher: Path, texts: str, tokens: int, block_length: int) -> TokenBlocks:
    """The first tokens of held-out text."""
    documents = read_documents(texts, load_vocabulary(teacher), limit=tokens)
    return pack(documents, block_length)


def answers(teacher: Path, blocks: TokenBlocks) -> list[HeldOutPart]:
    """What the teacher says there."""
    rows = [row for row in range(len(blocks)) if blocks[row : row + 1].kept.any()]
    with accelerating(TrainSettings(), logs=Path()) as accelerator:
        return ask_about(LiveTeacher(load_pytorch(teacher)), blocks[rows], 1, accelerator)


def ways(layers: int, greedy_tokens: int, narrow: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Students to compare, as options of ``distill.new_student``."""
    return {
        "influence": {"layers": layers},
        "angular": {"layers": layers, "choose": "angular"},
        "greedy_kl": {
            "layers": layers,
            "choose": "greedy_kl",
            "calibration_tokens": greedy_tokens,
        },
        "even": {"layers": layers, "choose": "even"},
        "narrow": dict(narrow),
        "random": {"layers": layers, "fresh": True},
    }


def measure(
    name: str,
    options: Mapping[str, Any],
    arguments: argparse.Namespace,
    held_out: list[HeldOutPart],
) -> dict[str, Any]:
    """Make one student and judge it."""
    with tempfile.TemporaryDirectory() as folder:
        # Scores that another student left behind would make the time untrue.
        os.environ["XDG_CACHE_HOME"] = folder
        target = Path(folder) / "student"
        options = {"calibration_tokens": arguments.tokens, "heal": False, **options}
        started = time.perf_counter()
        distill.new_student(arguments.teacher, target, texts=arguments.texts, **options)
        seconds = time.perf_counter() - started
        entry = read_lineage(target)[-1]
        with accelerating(TrainSettings(), logs=Path(folder)) as accelerator:
            module = DistillationStep(load_pytorch(target), TrainSettings())
            found = judge(module, held_out, accelerator)
    return {
        "student": name,
        "options": options,
        "kl": found.kl,
        "kl_p99": found.kl_p99,
        "agreement": found.agreement,
        "perplexity": found.perplexity,
        "seconds_to_make": seconds,
        "parameters": entry["parameters"],
        "megabytes_at_4_bits": entry["megabytes_at_4_bits"],
        "kept_layers": entry.get("kept_layers"),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--intermediate-size", type=int, default=1024)
    parser.add_argument("--texts", default="@demo-train")
    parser.add_argument("--held-out", default="@demo-held-out")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens to calibrate on")
    parser.add_argument("--greedy-tokens", type=int, default=512)
    parser.add_argument("--scored-tokens", type=int, default=4096)
    parser.add_argument("--only", nargs="*", help="names of the students to make")
    arguments = parser.parse_args(words)
    open_folder(arguments.teacher)
    blocks = held_out_blocks(arguments.teacher, arguments.held_out, arguments.scored_tokens, 512)
    held_out = answers(arguments.teacher, blocks)
    narrow = {"intermediate_size": arguments.intermediate_size}
    results = []
    for name, options in ways(arguments.layers, arguments.greedy_tokens, narrow).items():
        if arguments.only and name not in arguments.only:
            continue
        results.append(measure(name, options, arguments, held_out))
        shown = results[-1]
        line = f"{name:10} KL {shown['kl']:.4f} agreement {shown['agreement']:.3f}"
        print(f"{line} made in {shown['seconds_to_make']:.1f} s", file=sys.stderr)
    document = {
        "teacher": fingerprint(arguments.teacher),
        "scored_positions": sum(int(part.batch.kept.sum()) for part in held_out),
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
        "students": results,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
