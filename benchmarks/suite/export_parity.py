"""Does an ONNX folder say what PyTorch says with the same weights, over thousands of positions?

    python -m benchmarks.suite.export_parity CHATBOT SOURCE --texts FILE --positions 4000

The export compares a few dozen positions; this compares as many as asked for, in blocks, on any
text. PyTorch is given what the graph holds: codes of the source decoded, and matrices that the
export rounded as it rounded them, so that only the graph's own arithmetic is left. The last line
is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures.machine import describe_machine
from export.checks.parity import mean_kl, model_logits, reference_model
from export.onnx_folder import resolve
from export.settings import OnnxSettings
from export.weights.architecture import read_architecture
from export.weights.folder_weights import FolderWeights
from mistill.engine.onnx_model import OnnxModel
from mistill.errors import FolderError
from mistill.folders.folder import MANIFEST_FILE, open_folder, read_config, read_json
from mistill.folders.lineage import read_lineage
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary

MOST_DIFFERENCE = 1e-3
"""Goal for a logit where everything is computed in float32."""

MOST_DIVERGENCE = 2e-3
"""Goal for the mean KL in nats where activations are rounded to 8 bits."""


def settings_of(chatbot: Path) -> OnnxSettings:
    """The settings that a folder was exported with, as its lineage tells them.

    Args:
        chatbot: An ONNX folder that mistill made.

    Returns:
        The settings.

    Raises:
        FolderError: If its lineage does not end in an export.
    """
    steps = read_lineage(chatbot)
    if not steps or steps[-1]["step"] != "export":
        raise FolderError(
            f"{chatbot} has no export in its lineage; give a folder of mistill export"
        )
    names = {field.name for field in fields(OnnxSettings)}
    options = {name: value for name, value in steps[-1]["settings"].items() if name in names}
    options |= {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    return OnnxSettings(**options)


def measure(
    chatbot: Path, source: Path, texts: str, positions: int, block: int, threads: int | None
) -> dict[str, Any]:
    """Read a text with both, block by block.

    Args:
        chatbot: The ONNX folder.
        source: What it was exported from.
        texts: What to read.
        positions: How many positions to compare.
        block: Positions that are read at once, from an empty cache.
        threads: Threads of the ONNX folder.

    Returns:
        What was found.
    """
    settings = settings_of(chatbot)
    if settings.tune_for is not None:
        raise FolderError(f"{chatbot} was tuned; export it without --tune-for to compare it")
    info = open_folder(source)
    architecture = read_architecture(read_config(info.path))
    resolved, options = resolve(settings, info)
    vocabulary = load_vocabulary(source)
    documents = read_documents(texts, vocabulary, limit=positions)
    ids = np.concatenate([np.asarray(one.ids, np.int64) for one in documents])[:positions]
    model = OnnxModel(chatbot, threads=threads)
    differences, divergences, same, counts = [], [], [], []
    with FolderWeights(info.path, architecture, resolved) as weights:
        reference, rounding = reference_model(info.path, architecture, weights, options)
    started = time.perf_counter()
    for start in range(0, len(ids), block):
        piece = ids[start : start + block]
        expected, actual = model_logits(reference, piece), model.logits(piece[None])[0]
        differences.append(float(np.abs(actual - expected).max()))
        divergences.append(mean_kl(expected, actual))
        same.append(int((actual.argmax(-1) == expected.argmax(-1)).sum()))
        counts.append(len(piece))
    exact = resolved.precision == "float32" or settings.accuracy_level == 0
    exact = exact and settings.cache == "float32"
    kl = float(np.average(divergences, weights=counts))
    goal = MOST_DIFFERENCE if exact else MOST_DIVERGENCE
    met = max(differences) <= goal and sum(same) == len(ids) if exact else kl <= goal
    return {
        "benchmark": "export_parity",
        "chatbot": chatbot.name,
        "source": source.name,
        "precision": resolved.precision,
        "accuracy_level": settings.accuracy_level,
        "block_size": settings.block_size,
        "positions": len(ids),
        "block": block,
        "exact": exact,
        "max_difference": max(differences),
        "mean_kl": kl,
        "same_top": sum(same) / len(ids),
        "other_top": len(ids) - sum(same),
        "max_rounding": rounding,
        "codes": read_json(chatbot / MANIFEST_FILE).get("codes"),
        "goal": goal,
        "met": bool(met),
        "seconds": time.perf_counter() - started,
        "machine": asdict(describe_machine(model.threads)),
    }


def main() -> None:
    """Parse the command line and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chatbot", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--texts", default="@demo-held-out")
    parser.add_argument("--positions", type=int, default=4000)
    parser.add_argument("--block", type=int, default=250)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    print(
        json.dumps(
            measure(
                args.chatbot,
                args.source,
                args.texts,
                args.positions,
                args.block,
                args.threads,
            )
        )
    )


if __name__ == "__main__":
    main()
