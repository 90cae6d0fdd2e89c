"""README.md of a model folder: the model card that the Hub shows and that people read.

Every step that makes a model leaves one. It says what the folder is, how it was made and what was
measured, as the lineage and, in an ONNX folder, the manifest have it, with the metadata of the
Hub's cards (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistill.folders.folder import MANIFEST_FILE, FolderInfo, describe, read_config
from mistill.folders.json_text import read_json_file
from mistill.folders.ownership import CARD_FILE, is_own_card, signed_card
from mistill.folders.schemas import read_json
from mistill.shown import escaped, in_code

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Steps after which the weights say something else than their base's.
_LEARNING = {
    *("student", "heal", "distill"),
    *("supervised", "preferences", "reward", "reinforce", "merge"),
}
_METHODS = ("distill", "gptq", "nf4", "mixed", "rotate", "supervised", "preferences", "reinforce")
# Where transformers.js looks for a graph.
_FOR_THE_BROWSER = "onnx"
# No figure is as large; the record of a stranger may hold numbers of hundreds of digits.
_LARGEST = 1e9
# What before and after are figures of, and how many digits say enough.
_FIGURES = {
    "kl": ("KL to the teacher, nats", 4),
    "perplexity": ("perplexity", 2),
    "cross_entropy": ("cross-entropy, nats", 3),
    "margin_accuracy": ("margin accuracy", 3),
    "accuracy": ("accuracy", 3),
    "reward": ("mean reward", 3),
}


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model on the Hub that a folder goes back to, as far as it is known.

    Attributes:
        name: Its id.
        licence: Its licence, by the Hub's name.
        language: What it speaks, as ISO 639-1 has it.
    """

    name: str | None = None
    licence: str | None = None
    language: str | None = None


_SMOLLM2 = BaseModel(
    name="HuggingFaceTB/SmolLM2-135M-Instruct", licence="apache-2.0", language="en"
)


def add_card(folder: Path, name: str) -> None:
    """Write the model card of a folder that is being made, if it is a model.

    Args:
        folder: The folder, complete but for the card.
        name: What it will be called.
    """
    record = folder / "lineage.json"
    if not record.is_file() or not (folder / "config.json").is_file():
        return
    card = folder / CARD_FILE
    if card.exists() and not is_own_card(card):
        return
    info, steps = _described(folder), read_json_file(record)
    architectures = read_json(folder / "config.json").get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    scores = str(first).endswith("ForSequenceClassification")
    facts = read_json(folder / MANIFEST_FILE) if info.form == "onnx" else {}
    parts = [
        _metadata(info, steps, scores),
        f"# {escaped(name)}",
        _what_it_is(info, scores),
        _how_to_use(info, name, scores),
        _how_it_was_made(steps),
        _what_was_measured(steps, facts),
        _licence(steps),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    # Half a card would be taken for one that somebody has changed, and stay.
    partial = folder / f".{CARD_FILE}.partial"
    partial.write_text(signed_card(text), "utf-8", newline="\n")
    partial.replace(card)


def base_model(steps: Sequence[Mapping[str, Any]]) -> BaseModel:
    """The model on the Hub that a folder goes back to.

    Args:
        steps: Its lineage.

    Returns:
        What is known of it.
    """
    for step in steps:
        source = str(_settings(step).get("source") or "") if step["step"] == "teacher" else ""
        if source == "@smollm2":
            return _SMOLLM2
        source = str(step.get("hub") or source)
        if len(source) < 200 and _HUB_ID.fullmatch(source):
            return BaseModel(name=source)
    if steps and str(steps[0].get("file", "")).startswith("SmolLM2-135M-Instruct."):
        return _SMOLLM2
    return BaseModel()


def _settings(step: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of a step, which the record of a stranger may lack."""
    return step.get("settings") or {}


def relation(steps: Sequence[Mapping[str, Any]]) -> str | None:
    """What a folder is to the model that it goes back to, in the Hub's words.

    Args:
        steps: Its lineage.

    Returns:
        The word; None for the model itself.
    """
    names = {step["step"] for step in steps}
    if _LEARNING & names:
        return "finetune"
    return "quantized" if names - {"teacher"} else None


def _described(folder: Path) -> FolderInfo:
    """Describe a folder, also one whose graph lies where transformers.js looks for it."""
    if not (folder / _FOR_THE_BROWSER).is_dir():
        return describe(folder)
    config, manifest = read_config(folder), read_json(folder / MANIFEST_FILE)
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    return FolderInfo(
        path=folder,
        form="onnx",
        architecture=str(config["model_type"]),
        vocabulary_size=int(config["vocab_size"]),
        layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        parameters=int(manifest["parameters"]),
        weight_bytes=sum(size for file, size in sizes.items() if ".onnx" in file.name),
        size_bytes=sum(sizes.values()),
        context_length=int(manifest["context_length"]),
        quantization=None,
    )


def _metadata(info: FolderInfo, steps: Sequence[Mapping[str, Any]], scores: bool) -> str:
    base, known_relation = base_model(steps), relation(steps)
    library = "onnx" if info.form == "onnx" else "transformers"
    if (info.path / _FOR_THE_BROWSER).is_dir():
        library = "transformers.js"
    lines = [f"library_name: {library}"]
    lines.append(f"pipeline_tag: {'text-classification' if scores else 'text-generation'}")
    if base.name is not None:
        lines += ["base_model:", f"- {base.name}"]
        lines += [] if known_relation is None else [f"base_model_relation: {known_relation}"]
    if base.licence is not None:
        lines.append(f"license: {base.licence}")
    if base.language is not None:
        lines += ["language:", f"- {base.language}"]
    step_names = {step["step"] for step in steps}
    tags = ["mistill"]
    if info.form == "onnx":
        browser = (info.path / _FOR_THE_BROWSER).is_dir()
        tags += ["onnx", *(["transformers.js"] if browser else ["onnxruntime", "cpu"])]
    tags += ["reward-model"] if scores else []
    lines += ["tags:", *(f"- {tag}" for tag in (*tags, *(m for m in _METHODS if m in step_names)))]
    return "\n".join(["---", *lines, "---"])


def _what_it_is(info: FolderInfo, scores: bool) -> str:
    kinds = {
        "model": "A language model with float weights",
        "gptq": "A language model quantized by GPTQ or rounding, in GPTQ's files",
        "nf4": "A language model in 4-bit NormalFloat, in bitsandbytes' files",
        "onnx": "A language model as an ONNX graph",
    }
    return (
        f"{'A reward model, which scores replies' if scores else kinds[info.form]}: "
        f"{escaped(info.architecture)}, {info.layers} layers of width {info.hidden_size}, "
        f"{info.parameters / 1e6:,.0f} million parameters in {info.size_bytes / 1e6:,.0f} MB "
        f"({info.bits_per_weight:.2f} bits per weight); a vocabulary of "
        f"{info.vocabulary_size:,} tokens and a context of {info.context_length:,}."
    )


def _how_to_use(info: FolderInfo, name: str, scores: bool) -> str:
    # A shell takes a name with spaces or dollar signs for more than one name.
    word = in_code(shlex.quote(name))
    if scores:
        return (
            f"`mistill tune reinforce MODEL OUT --reward {word}` learns from its scores, and "
            f"transformers' `AutoModelForSequenceClassification` opens it."
        )
    chats = _has_chat_template(info.path)
    if info.form != "onnx":
        chat = 'mistill chat chatbot "What is a mistral?"\n' if chats else ""
        base = "" if chats else "It has no chat template, and continues texts. "
        return (
            f"```sh\npip install 'mistill[compress]'\nmistill export {word} chatbot\n{chat}```\n\n"
            f"{base}{_who_reads(info)}"
        )
    if (info.path / _FOR_THE_BROWSER).is_dir():
        quoted = in_code(name.replace("\\", "\\\\").replace("'", "\\'"))
        return f"transformers.js opens it: `await pipeline('text-generation', '{quoted}')`."
    if not chats:
        return (
            "It has no chat template, and continues texts: `mistill.open_model` opens it, and "
            "ONNX Runtime GenAI does."
        )
    return (
        f'```sh\npip install mistill\nmistill chat {word} "What is a mistral?"\n```\n\n'
        "`mistill serve` answers OpenAI's clients, and ONNX Runtime GenAI opens the folder too. "
        "How it is sampled stands in generation_config.json."
    )


def _who_reads(info: FolderInfo) -> str:
    if info.form == "gptq":
        return "transformers and gptqmodel read it too, unless its embedding or head is quantized."
    return "transformers' `AutoModelForCausalLM.from_pretrained` opens it too."


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config).get("chat_template"))


def _how_it_was_made(steps: Sequence[Mapping[str, Any]]) -> str:
    rows = ["## How it was made", "", "| step | settings | day |", "|---|---|---|"]
    for step in steps:
        settings = {n: _settings(step).get(n) for n in step.get("changed_settings") or ()}
        texts = step.get("texts")
        shown = {**settings, **({"texts": texts} if texts else {})}
        words = ", ".join(f"{_named(key)} {_shown(value)}" for key, value in shown.items())
        rows.append(f"| {_named(step['step'])} | {words} | {_named(step.get('date') or '', 10)} |")
    versions = ", ".join(
        f"{_named(key)} {_named(value)}" for key, value in (steps[-1].get("versions") or {}).items()
    )
    return "\n".join([*rows, "", f"With {versions}. lineage.json says all of it."])


def _named(words: Any, letters: int = 80) -> str:
    """The beginning of a name that somebody else may have written."""
    return escaped(str(words)[:letters])


def _shown(value: Any) -> str:
    words = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    words = in_code(words[:80])
    return f"`{words}`" if words else "none"


def _what_was_measured(steps: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    rows = []
    for step in steps:
        before, after = (step.get(when) for when in ("before", "after"))
        if not isinstance(before, dict) or not isinstance(after, dict):
            continue
        for key, (words, digits) in _FIGURES.items():
            values = [figures.get(key) for figures in (before, after)]
            if all(isinstance(value, int | float) and abs(value) < _LARGEST for value in values):
                shown = " | ".join(f"{value:.{digits}f}" for value in values)
                rows.append(f"| {_named(step['step'])} | {words} | {shown} |")
    parts = []
    if rows:
        head = ["| step | on held-out text | before | after |", "|---|---|---:|---:|"]
        parts.append("\n".join([*head, *rows]))
    parity = facts.get("parity")
    if isinstance(parity, Mapping) and "mean_kl" in parity:
        parts.append(
            f"The graph beside PyTorch on {parity['positions']} positions of a fixed text: a KL of "
            f"{parity['mean_kl']:.4f} nats, and the same most probable token at "
            f"{parity['same_top']:.0%} of them."
        )
    return "\n\n".join(["## What was measured", *parts]) if parts else ""


def _licence(steps: Sequence[Mapping[str, Any]]) -> str:
    base = base_model(steps)
    if base.licence is not None:
        return ""
    return (
        f"Its licence is that of {base.name or 'the model that it was made from'}; write it into "
        "`license:` above."
    )
