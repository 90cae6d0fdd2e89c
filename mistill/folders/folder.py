"""Model folders: what steps read and write.

A folder is described from its small files and the headers of its weights, without loading them.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mistill.errors import FolderError
from mistill.folders.gptq_format import HEAD, read_quantization
from mistill.folders.safetensors_file import StoredTensor, read_header
from mistill.folders.schemas import read_json as read_json
from mistill.folders.settled_config import says_tied, settled_config
from mistill.folders.weight_files import AUTO_GPTQ_CONFIG as AUTO_GPTQ_CONFIG
from mistill.folders.weight_files import tensor_homes
from mistill.folders.weight_files import weight_files as weight_files
from mistill.settings import refuse_object
from mistill.shown import visible

Form = Literal["model", "gptq", "nf4", "onnx"]

MANIFEST_FILE = "manifest.json"
TEKKEN_FILE = "tekken.json"
GENAI_FILE = "genai_config.json"
FIDELITY_FILE = "fidelity.json"
QUANTIZE_REPORT_FILE = "quantize_report.json"
QUANTIZE_TABLE_FILE = "quantize_report.csv"

REWARD_HEAD = "score.weight"
"""The tensor that only a reward model has."""

# Items of a folder that are looked at to say what it is.
_MOST_ITEMS = 1000

_COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, kw_only=True)
class FolderInfo:
    """A description of a folder, read without loading a weight.

    Attributes:
        path: Path of the folder.
        form: ``model`` (float weights), ``gptq``, ``nf4`` or ``onnx``.
        architecture: ``model_type`` of config.json, such as ``mistral``.
        vocabulary_size: Rows of the embedding, V.
        layers: Decoder layers.
        hidden_size: Width of the residual stream, D.
        parameters: Weights of the dense model that the folder stands for; a shared table counts
            once.
        weight_bytes: Bytes of the files that hold weights.
        size_bytes: Bytes of all files.
        context_length: The most positions of a text.
        quantization: ``quantization_config`` of config.json, or None.
    """

    path: Path
    form: Form
    architecture: str
    vocabulary_size: int
    layers: int
    hidden_size: int
    parameters: int
    weight_bytes: int
    size_bytes: int
    context_length: int
    quantization: dict[str, Any] | None

    @property
    def kind(self) -> str:
        """What it is in a sentence, such as "an ONNX folder"."""
        words = {"model": "a float", "gptq": "a GPTQ", "nf4": "an NF4", "onnx": "an ONNX"}
        return f"{words[self.form]} folder"

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight of the dense model, scales and tables counted."""
        return self.weight_bytes * 8 / self.parameters


def open_folder(path: str | Path, *, rewards: bool = False) -> FolderInfo:
    """Describe a folder, or raise an error that lists all its problems.

    Args:
        path: A folder of any form.
        rewards: Whether a reward model will do, which predicts no tokens.

    Returns:
        The description.

    Raises:
        FolderError: If it is missing or broken; the message lists everything that is wrong. Also if
            it is a reward model and none is wanted.
    """
    refuse_object(path)
    faults = problems(path)
    if faults:
        raise FolderError(f"{path} is not a usable model folder: {'; '.join(faults)}")
    info = describe(path)
    if not rewards and info.form == "model" and is_reward_folder(info.path):
        raise FolderError(
            f"{path} is a reward model, which scores conversations and writes no text; give the "
            "language model, or give this one to mistill tune reinforce by --reward"
        )
    return info


def is_reward_folder(folder: Path) -> bool:
    """Whether a folder holds the head of a reward model.

    Args:
        folder: A sound folder that is not of the form ``onnx``.

    Returns:
        True if there is one.
    """
    return REWARD_HEAD in tensor_headers(folder)


def problems(path: str | Path) -> list[str]:
    """The problems that keep a folder from being used.

    Args:
        path: A folder of any form.

    Returns:
        One phrase for each problem; empty for a sound folder.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        return ["there is no such folder"]
    if not folder.is_dir():
        return ["it is a file, not a folder"]
    instead = what_it_is_instead(folder)
    if instead is not None:
        return [instead]
    faults = _config_problems(folder)
    sound_config = not faults
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        faults.append(_missing_tokenizer(folder))
    is_onnx = (folder / "model.onnx").is_file()
    weight_faults = _onnx_problems(folder) if is_onnx else _weight_problems(folder)
    if sound_config and not weight_faults:
        weight_faults = _size_problems(folder, is_onnx)
    return faults + weight_faults


def what_it_is_instead(folder: Path) -> str | None:
    """What a folder is that holds no model that mistill reads, if it is something known.

    Args:
        folder: An existing folder.

    Returns:
        A phrase that says what to give instead; None for a model folder and for anything else.
    """
    if (folder / "config.json").exists():
        return None
    if (folder / "report.json").is_file():
        return "it is a report, not a model; open report.html in it, or give one of its models"
    if (folder / "params.json").is_file() and any(folder.glob("consolidated*")):
        return (
            "it holds a model in the form of its makers (params.json, consolidated weights), which "
            "mistill does not read; give its transformers version, with config.json, "
            "model.safetensors and tokenizer.json, which most repositories hold too"
        )
    inside = sorted(
        item
        for item in itertools.islice(folder.iterdir(), _MOST_ITEMS)
        if (item / "config.json").is_file()
    )
    if not inside:
        return None
    chatbots = [item for item in inside if (item / "model.onnx").is_file()]
    shortest = min(chatbots or inside, key=lambda item: (len(item.name), item.name))
    names = ", ".join(visible(item.name) for item in inside[:12])
    more = f" and {len(inside) - 12} more" if inside[12:] else ""
    return (
        f"it is a folder of models, {names}{more}; give one of them, such as "
        f"{visible(str(shortest))}"
    )


def _missing_tokenizer(folder: Path) -> str:
    if not (folder / TEKKEN_FILE).is_file():
        return "tokenizer.json is missing"
    return (
        f"its only tokenizer is {TEKKEN_FILE}, which mistill does not read; put the tokenizer.json "
        "of the model's transformers version beside it"
    )


def describe(path: str | Path) -> FolderInfo:
    """Describe a sound folder without loading its weights.

    Args:
        path: A folder without problems.

    Returns:
        The description.
    """
    folder = Path(path).expanduser().absolute()
    config = read_config(folder)
    quantization = config.get("quantization_config")
    form = form_of(folder, config)
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    if form == "onnx":
        weights = [file for file in sizes if file.name.startswith("model.onnx")]
        parameters = int(read_json(folder / MANIFEST_FILE)["parameters"])
    else:
        weights = weight_files(folder)
        parameters = _dense_parameters(folder, config)
    return FolderInfo(
        path=folder,
        form=form,
        architecture=str(config["model_type"]),
        vocabulary_size=int(config["vocab_size"]),
        layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        parameters=parameters,
        weight_bytes=sum(sizes[file] for file in weights),
        size_bytes=sum(sizes.values()),
        context_length=context_length(folder, config),
        quantization=quantization,
    )


def form_of(folder: Path, config: Mapping[str, Any]) -> Form:
    """The form of a folder.

    Args:
        folder: Path of the folder.
        config: Content of config.json.

    Returns:
        ``onnx`` where a graph is, else what ``quantization_config`` says, else ``model``.

    Raises:
        FolderError: If the weights are quantized in a way that mistill does not read.
    """
    if (folder / "model.onnx").is_file():
        return "onnx"
    quantization = config.get("quantization_config")
    if quantization is None:
        return "model"
    if not isinstance(quantization, Mapping):
        raise FolderError(f"quantization_config in {folder} should be an object")
    method = quantization.get("quant_method")
    if method == "gptq":
        return "gptq"
    if method == "bitsandbytes" and quantization.get("bnb_4bit_quant_type") == "nf4":
        return "nf4"
    raise FolderError(
        f"{folder} is quantized as {method!r}; mistill reads float, GPTQ and NF4 folders"
    )


def context_length(folder: Path, config: Mapping[str, Any]) -> int:
    """Most positions that a model can hold.

    Args:
        folder: The folder; an ONNX folder may hold fewer than its config says.
        config: Content of config.json.

    Returns:
        Positions.
    """
    genai = folder / GENAI_FILE
    if (folder / "model.onnx").is_file() and genai.is_file():
        return int(read_json(genai)["model"]["context_length"])
    return int(config["max_position_embeddings"])


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json as the rest of the folder bears it out.

    AutoGPTQ's quantize_config.json beside it is read too, and what the weights contradict is
    settled as transformers settles it: ``mistill.folders.settled_config``.

    Args:
        folder: A folder of any form.

    Returns:
        The config; if it has no ``quantization_config``, that of quantize_config.json is added.

    Raises:
        FolderError: If a file is missing or is not a JSON object.
    """
    config = read_json(folder / "config.json")
    if "quantization_config" not in config and (folder / AUTO_GPTQ_CONFIG).is_file():
        quantize_config = read_json(folder / AUTO_GPTQ_CONFIG)
        config["quantization_config"] = {"quant_method": "gptq", **quantize_config}
    return settled_config(folder, config)


def tensor_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors in the weights of a folder, from the headers of its files.

    Args:
        folder: A model folder.

    Returns:
        Tensors by name.

    Raises:
        FolderError: If a file is damaged.
    """
    return {name: stored for name, (_, stored) in tensor_homes(folder).items()}


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a model besides its weights and config: tokenizer, template, settings.

    Args:
        source: A model folder.
        target: The folder being made.
    """
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _config_problems(folder: Path) -> list[str]:
    try:
        config = read_config(folder)
    except FolderError as error:
        return [_inside(folder, error)]
    required = (
        "model_type",
        "vocab_size",
        "num_hidden_layers",
        "hidden_size",
        "max_position_embeddings",
    )
    missing = [name for name in required if name not in config]
    faults = [f"config.json lacks {', '.join(missing)}"] if missing else []
    faults += [
        f"{name} in config.json should be a whole number, not None"
        for name in required[1:]
        if name in config and config[name] is None
    ]
    try:
        form_of(folder, config)
    except FolderError as error:
        faults.append(str(error))
    return faults


def _onnx_problems(folder: Path) -> list[str]:
    faults = []
    files: dict[str, Any] = {}
    for name in (GENAI_FILE, MANIFEST_FILE):
        try:
            files = read_json(folder / name).get("files", files)
        except FolderError as error:
            faults.append(_inside(folder, error))
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            faults.append(
                f"{name} has {file.stat().st_size} bytes, not the {entry['bytes']} of the manifest"
            )
    return faults


def _size_problems(folder: Path, is_onnx: bool) -> list[str]:
    """Counts in the small files that the weights cannot hold, before any loop runs over them."""
    config = read_config(folder)
    counts = {"vocab_size": config["vocab_size"], "hidden_size": config["hidden_size"]}
    if is_onnx:
        room = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
        counts["context_length"] = context_length(folder, config)
        most_layers, unit = room, f"{room} bytes"
    else:
        tensors = tensor_headers(folder)
        if not any(math.prod(stored.shape) for stored in tensors.values()):
            return ["its weights hold no number"]
        room = 8 * sum(stored.size for stored in tensors.values())
        most_layers, unit = len(tensors), f"{len(tensors)} tensors"
    counts["num_hidden_layers"] = config["num_hidden_layers"]
    limits = dict.fromkeys(counts, room) | {"num_hidden_layers": most_layers}
    return [
        f"{name} is {count}, more than the {unit} of its weights can hold"
        for name, count in counts.items()
        if count > limits[name]
    ]


def _inside(folder: Path, error: FolderError) -> str:
    """A message about a file of a folder, without the path of the folder."""
    return str(error).replace(f"{folder}{os.sep}", "")


def _weight_problems(folder: Path) -> list[str]:
    try:
        files = weight_files(folder)
    except FolderError as error:
        return [f"model.safetensors.index.json is damaged: {_inside(folder, error)}"]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        if pickled:
            return [f"its weights are pickled ({pickled[0]}); mistill reads safetensors only"]
        return [f"{name} is missing" for name in missing]
    faults = []
    for file in files:
        try:
            read_header(file)
        except FolderError as error:
            faults.append(_inside(folder, error))
    return faults


def _dense_parameters(folder: Path, config: Mapping[str, Any]) -> int:
    """Count the weights of the dense model, whatever format they are stored in."""
    tensors = tensor_headers(folder)
    gptq_format = None
    total = 0
    for name, stored in tensors.items():
        count = math.prod(stored.shape)
        if name.startswith(f"{HEAD}.") and says_tied(config):
            continue  # a second copy of the embedding
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            gptq_format = gptq_format or read_quantization(config)
            module_format = None if gptq_format is None else gptq_format.format_of(module)
            total += count * 32 // (module_format.bits if module_format else 32)
        elif f"{name}.quant_state.bitsandbytes__nf4" in tensors:
            total += stored.size * 2
        elif name.endswith((".weight", ".bias")):
            total += count
    return total
