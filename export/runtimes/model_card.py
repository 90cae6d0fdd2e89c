"""README.md of an ONNX folder: the model card that the Hub shows and that people read.

It says what the folder is, how it was made and what was measured, from the lineage and the
manifest, with the metadata of the Hub's cards (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mistill.folders.folder import FolderInfo
from mistill.folders.ownership import CARD_FILE, signed_card
from mistill.folders.publishing import write_atomically

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Steps after which the weights say something else than their base's.
_LEARNING = {"student", "heal", "distill", "supervised", "preferences", "reinforce", "merge"}
# What the embedded teacher is on the Hub, and its licence.
_EMBEDDED = {"@smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}


def write_card(
    folder: Path,
    source: FolderInfo,
    steps: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    *,
    name: str,
    chats: bool,
) -> None:
    """Write the model card of a folder that is being made.

    Args:
        folder: The folder.
        source: The folder that it was exported from.
        steps: Its lineage.
        facts: What the manifest says of the graph.
        name: Name of the folder.
        chats: Whether it has a chat template.
    """
    parts = [
        _metadata(steps),
        f"# {name}",
        _what_it_is(folder, source, facts),
        _how_to_use(name, chats),
        _how_it_was_made(steps),
        _what_was_measured(steps, facts),
        _licence(steps),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_atomically(folder / CARD_FILE, signed_card(text))


def base_model(steps: Sequence[Mapping[str, Any]]) -> tuple[str | None, str | None]:
    """The model on the Hub that a folder goes back to.

    Args:
        steps: Its lineage.

    Returns:
        Its id and licence, as far as they are known.
    """
    for step in steps:
        named = str(step["settings"].get("source") or "") if step["step"] == "teacher" else ""
        if named in _EMBEDDED:
            return _EMBEDDED[named]
        if _HUB_ID.fullmatch(named):
            return named, None
    if steps and str(steps[0].get("file", "")).startswith("SmolLM2-135M-Instruct."):
        return _EMBEDDED["@smollm2"]
    return None, None


def _metadata(steps: Sequence[Mapping[str, Any]]) -> str:
    base, licence = base_model(steps)
    made = [step["step"] for step in steps]
    relation = "finetune" if _LEARNING & set(made) else "quantized"
    lines = ["library_name: onnx", "pipeline_tag: text-generation"]
    if base is not None:
        lines += ["base_model:", f"- {base}", f"base_model_relation: {relation}"]
    if licence is not None:
        lines.append(f"license: {licence}")
    tags = ["mistill", "onnx", "onnxruntime", "cpu"]
    methods = ("distill", "gptq", "nf4", "mixed")
    lines += ["tags:", *(f"- {tag}" for tag in (*tags, *(m for m in methods if m in made)))]
    return "\n".join(["---", *lines, "---"])


def _what_it_is(folder: Path, source: FolderInfo, facts: Mapping[str, Any]) -> str:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return (
        f"A language model for ONNX Runtime on a CPU: {source.architecture}, {source.layers} "
        f"layers of width {source.hidden_size}, {facts['parameters'] / 1e6:,.0f} million "
        f"parameters in {size / 1e6:,.0f} MB; a vocabulary of {source.vocabulary_size:,} tokens "
        f"and a context of {facts['context_length']:,}."
    )


def _how_to_use(name: str, chats: bool) -> str:
    if not chats:
        return (
            "It has no chat template, and continues texts: `mistill.open_model` opens it, and "
            "ONNX Runtime GenAI does."
        )
    return (
        f'```sh\npip install mistill\nmistill chat {name} "What is a mistral?"\n```\n\n'
        "`mistill serve` answers OpenAI's clients, and ONNX Runtime GenAI opens the folder too. "
        "How it is sampled stands in generation_config.json."
    )


def _how_it_was_made(steps: Sequence[Mapping[str, Any]]) -> str:
    rows = ["## How it was made", "", "| step | settings | day |", "|---|---|---|"]
    for step in steps:
        settings = {n: step["settings"].get(n) for n in step.get("changed_settings", ())}
        texts = step.get("texts")
        shown = {**settings, **({"texts": texts} if texts else {})}
        words = ", ".join(f"{key} {_shown(value)}" for key, value in shown.items())
        rows.append(f"| {step['step']} | {words} | {str(step.get('date', ''))[:10]} |")
    versions = ", ".join(
        f"{key} {value}" for key, value in (steps[-1].get("versions") or {}).items()
    )
    return "\n".join([*rows, "", f"With {versions}. lineage.json says all of it."])


def _shown(value: Any) -> str:
    words = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    words = words.replace("|", "/").replace("\n", " ")
    return f"`{words[:80]}`" if words else "none"


def _what_was_measured(steps: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    lines = []
    for step in steps:
        before, after = (step.get(when) for when in ("before", "after"))
        if step["step"] == "distill" and isinstance(before, dict) and isinstance(after, dict):
            lines.append(
                f"Distilled from {step.get('teacher')} on {step.get('tokens', 0):,} tokens: on "
                f"held-out text its KL to the teacher was {before['kl']:.3f} nats before and "
                f"{after['kl']:.3f} after."
            )
    parity = facts.get("parity")
    if isinstance(parity, Mapping) and "mean_kl" in parity:
        lines.append(
            f"The graph beside PyTorch on {parity['positions']} positions of a fixed text: a KL of "
            f"{parity['mean_kl']:.4f} nats, and the same most probable token at "
            f"{parity['same_top']:.0%} of them."
        )
    return "\n\n".join(["## What was measured", *lines]) if lines else ""


def _licence(steps: Sequence[Mapping[str, Any]]) -> str:
    base, licence = base_model(steps)
    if licence is not None:
        return ""
    return (
        f"Its licence is that of {base or 'the model that it was made from'}; write it into "
        "`license:` above."
    )
