"""Make a student: some of a teacher's layers, or a fresh small model with its vocabulary.

Either way the student has the teacher's tokenizer, chat template and special tokens, because it
is made from the teacher's folder; what each of its token ids means is never in question.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill.importance import evenly_spaced, measure_influence, most_influential
from distill.pruning import copy_layers
from distill.student_settings import StudentSettings
from mistill.errors import FolderError
from mistill.folder import (
    FolderInfo,
    add_lineage,
    copy_companions,
    creating,
    open_folder,
    read_json,
    refuse_existing,
)
from mistill.pytorch import check_weights, plain_config, require_readable
from mistill.settings import require, settings_dict, settings_from
from mistill.source import resolve_model
from mistill.text import Texts, TokenBlocks, pack, read_documents
from mistill.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


def new_student(
    teacher: str | Path,
    target: str | Path,
    *,
    texts: Texts | None = None,
    settings: StudentSettings | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Make a student with some of its teacher's layers, or a fresh one with its vocabulary.

    Layers are kept by their block influence on text (``choose="influence"``), evenly spaced, or
    as named. Their weights are copied to the bit, in the teacher's own type. A fresh student has
    random float32 weights and its own sizes.

    Args:
        teacher: A model folder, a Hub id, a GGUF file or ``@smollm2``.
        target: The folder to make.
        texts: Text to measure influence on; read for nothing else.
        settings: How to make it; or give its fields as options.
        overwrite: Whether to replace the target if it exists.
        **options: Fields of ``StudentSettings``.

    Returns:
        The student's folder.

    Raises:
        SettingsError: If a setting is out of range, or does not fit the teacher.
        FolderError: If the teacher is broken, or quantized and layers of it are asked for.
        ArchitectureError: If the teacher is neither Llama nor Mistral.
        TargetExistsError: If the target exists.
    """
    settings = settings_from(StudentSettings, settings, options)
    refuse_existing(target, overwrite)
    info = open_folder(resolve_model(teacher))
    require_readable(info)
    if settings.fresh:
        config = fresh_config(read_json(info.path / "config.json"), settings)
        facts = {name: config[name] for name in _SIZES}
        with creating(target, overwrite) as folder:
            _write_fresh(folder, config, settings.seed)
            _finish(folder, info, settings, facts)
    else:
        count = _checked_count(info, settings, texts)
        keep, facts = _choose_layers(info, settings, count, texts or ())
        with creating(target, overwrite) as folder:
            copy_layers(info.path, folder, keep)
            _finish(folder, info, settings, facts)
    logger.info("made the student %s from %s: %s", target, info.path, facts)
    return Path(target)


def _finish(
    folder: Path, info: FolderInfo, settings: StudentSettings, facts: Mapping[str, Any]
) -> None:
    """Give a student what its teacher has besides weights, and its lineage."""
    copy_companions(info.path, folder)
    add_lineage(folder, step="student", settings=settings_dict(settings), source=info.path, **facts)


# --- some of the teacher's layers ---------------------------------------------------------------


def _checked_count(info: FolderInfo, settings: StudentSettings, texts: Texts | None) -> int:
    """How many layers to keep; what cannot be done is refused before anything large is read."""
    if info.form != "model":
        raise FolderError(
            f"{info.path} is a {info.form} folder, and layers are kept from float weights only, "
            "since a student that is trained further needs them; give the float model that it "
            "was made from"
        )
    if settings.choose == "named":
        require(
            settings.keep[-1] < info.layers,
            f"keep names layer {settings.keep[-1]}, and the teacher's last is {info.layers - 1}",
        )
    count = settings.layers or len(settings.keep)
    require(
        1 <= count < info.layers,
        f"layers must be between 1 and {info.layers - 1}, fewer than the teacher's "
        f"{info.layers}; " + (f"got {count}" if count else "say how many to keep"),
    )
    require(
        settings.choose != "influence" or texts is not None,
        "the influence of layers is measured on text: give texts, such as @demo-train, or choose "
        "'even'",
    )
    require(
        settings.choose != "influence" or settings.block_length <= info.context_length,
        f"block_length must not exceed the teacher's context of {info.context_length}, got "
        f"{settings.block_length}",
    )
    check_weights(info.path)
    return count


def _choose_layers(
    info: FolderInfo, settings: StudentSettings, count: int, texts: Texts
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The layers to keep, and what the lineage should remember of the choice."""
    if settings.choose == "named":
        return settings.keep, {"kept_layers": list(settings.keep)}
    if settings.choose == "even":
        keep = evenly_spaced(info.layers, count)
        return keep, {"kept_layers": list(keep)}
    blocks = _calibration_blocks(info, settings, texts)
    influence = measure_influence(info.path, blocks)
    keep = most_influential(influence, count)
    return keep, {
        "kept_layers": list(keep),
        "influence": [round(value, 6) for value in influence],
        "calibration_tokens": blocks.tokens,
        "texts": [str(text) for text in ([texts] if isinstance(texts, str | Path) else texts)],
    }


def _calibration_blocks(info: FolderInfo, settings: StudentSettings, texts: Texts) -> TokenBlocks:
    """The first tokens of the text, as blocks."""
    vocabulary = load_vocabulary(info.path)
    documents = read_documents(texts, vocabulary, limit=settings.calibration_tokens)
    blocks = pack(documents, settings.block_length)
    if blocks.tokens < settings.calibration_tokens:
        logger.warning("influence is measured on %d tokens: the text holds no more", blocks.tokens)
    return blocks


# --- a fresh student ----------------------------------------------------------------------------


def _write_fresh(folder: Path, config: Mapping[str, Any], seed: int) -> None:
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    weights = random_weights(plain_config(folder), seed)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def fresh_config(teacher: Mapping[str, Any], settings: StudentSettings) -> dict[str, Any]:
    """The config of a student with sizes of its own and all else from its teacher.

    The width of a head is the teacher's if neither ``hidden_size`` nor ``attention_heads`` is
    given, else their quotient.

    Args:
        teacher: The teacher's config.json, of any form.
        settings: The sizes wanted.

    Returns:
        config.json of the student.

    Raises:
        SettingsError: If one size does not divide by another.
    """
    hidden = settings.hidden_size or int(teacher["hidden_size"])
    heads = settings.attention_heads or int(teacher["num_attention_heads"])
    teacher_groups = teacher.get("num_key_value_heads") or teacher["num_attention_heads"]
    groups = settings.key_value_heads or int(teacher_groups)
    require(
        hidden % heads == 0,
        f"hidden_size must be a multiple of attention_heads; got {hidden} and {heads}",
    )
    require(
        heads % groups == 0,
        f"attention_heads must be a multiple of key_value_heads; got {heads} and {groups}",
    )
    head_dim = hidden // heads
    if settings.hidden_size is None and settings.attention_heads is None:
        head_dim = int(teacher.get("head_dim") or head_dim)
    require(
        head_dim % 2 == 0,
        f"hidden_size / attention_heads must be even, since rotary positions turn pairs; got "
        f"{hidden} / {heads} = {head_dim}",
    )
    changed = {
        **teacher,
        "hidden_size": hidden,
        "intermediate_size": settings.intermediate_size or int(teacher["intermediate_size"]),
        "num_hidden_layers": settings.layers or int(teacher["num_hidden_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "dtype": "float32",
    }
    for name in ("quantization_config", "layer_types", "torch_dtype", "auto_map", "_name_or_path"):
        changed.pop(name, None)
    return changed


_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)


def random_weights(config: PreTrainedConfig, seed: int) -> dict[str, Tensor]:
    """Weights as transformers starts them for training.

    Args:
        config: A plain config.
        seed: Where they start; the caller's own random state is left alone.

    Returns:
        Float32 tensors by name; a head that is tied to the embedding is not among them.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    # It would start the padding token's row at zero, and that token may well be the end of turn.
    config.pad_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return {name: weight.detach() for name, weight in model.named_parameters()}
