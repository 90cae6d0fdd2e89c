"""Make a student: a part of a teacher, or a fresh small model with its vocabulary.

Either way the student has the teacher's tokenizer, chat template and special tokens, because it
is made from the teacher's folder; what each of its token ids means is never in question. And it
is a plain Llama or Mistral model, so that every other tool reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distill.settings import MEASURED, StudentSettings
from distill.student.angular import least_turning_block
from distill.student.fresh import fresh_config, write_fresh
from distill.student.greedy import Drop, greedy_drops
from distill.student.importance import (
    TeacherScores,
    evenly_spaced,
    measure_scores,
    most_influential,
)
from distill.student.pruning import FLOATS, copy_layers
from distill.student.score_cache import keep_scores, read_scores, score_file
from distill.student.sizing import Sizes, fitting_layers
from distill.student.width import KeptWidth, WidthScores, keep_strongest
from mistill.errors import FolderError, TextError
from mistill.folders.folder import (
    FolderInfo,
    copy_companions,
    open_folder,
    read_json,
    tensor_headers,
)
from mistill.folders.lineage import add_lineage
from mistill.folders.publishing import creating, refuse_existing
from mistill.pytorch.loading import check_weights, completed_config, require_readable
from mistill.settings import require, settings_from
from mistill.sources.source import resolve_model
from mistill.text.blocks import TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.rows import Texts
from mistill.text.vocabulary import load_vocabulary

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
    """Make a student with a part of its teacher, or a fresh one with its vocabulary.

    Layers are kept by what they do on text (``choose="influence"``, ``"angular"`` or
    ``"greedy_kl"``), evenly spaced, or as named; neurons, key/value groups and channels by how
    much they are used on text. What is kept is copied in the teacher's own type, and to the bit
    unless ``hidden_size`` changes, which rescales the norms. A fresh student has random float32
    weights and its own sizes.

    What was measured stays in the user's cache, so that another student of the same teacher by
    the same text is made without measuring again.

    Args:
        teacher: A model folder, a Hub id, a GGUF file or ``@smollm2``.
        target: The folder to make.
        texts: Text to measure the teacher on; read for nothing else.
        settings: How to make it; or give its fields as options.
        overwrite: Whether to replace the target if it exists.
        **options: Fields of ``StudentSettings``.

    Returns:
        The student's folder.

    Raises:
        SettingsError: If a setting is out of range, or does not fit the teacher.
        FolderError: If the teacher is broken, or quantized and a part of it is asked for.
        ArchitectureError: If the teacher is neither Llama nor Mistral.
        TargetExistsError: If the target exists.
    """
    settings = settings_from(StudentSettings, settings, options)
    refuse_existing(target, overwrite, [teacher])
    info = open_folder(resolve_model(teacher))
    require_readable(info)
    config = completed_config(info.path)
    if settings.fresh:
        config = fresh_config(config, settings)
        with creating(target, overwrite) as folder:
            write_fresh(folder, config, settings.seed)
            facts = _finish(folder, info, settings, {})
    else:
        plan = _plan(info, config, settings, texts)
        keep, width, facts = _choose(info, config, settings, plan, texts or ())
        with creating(target, overwrite) as folder:
            copy_layers(info.path, folder, keep, width)
            facts = _finish(folder, info, settings, facts)
    logger.info("made the student %s from %s: %s", target, info.path, facts)
    return Path(target)


_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)


def _finish(
    folder: Path, info: FolderInfo, settings: StudentSettings, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Give a student what its teacher has besides weights, and its lineage."""
    copy_companions(info.path, folder)
    config = read_json(folder / "config.json")
    sizes = Sizes.of(config)
    all_facts = {
        **facts,
        **{name: config[name] for name in _SIZES},
        "parameters": sizes.parameters,
        "megabytes_at_4_bits": round(sizes.megabytes_at_4_bits, 3),
    }
    add_lineage(folder, step="student", settings=settings, source=info.path, **all_facts)
    return all_facts


# --- what is asked for --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How much of the teacher to keep.

    Attributes:
        layers: How many layers.
        fewer_layers: Whether those are not all.
        narrower: Whether less than their whole width is kept.
    """

    layers: int
    fewer_layers: bool
    narrower: bool


def _plan(
    info: FolderInfo, config: Mapping[str, Any], settings: StudentSettings, texts: Texts | None
) -> _Plan:
    """How much to keep; what cannot be done is refused before anything large is read."""
    if info.form != "model":
        raise FolderError(
            f"{info.path} is a {info.form} folder, and a student is cut from float weights only, "
            "since one that is trained further needs them; give the float model that it was made "
            "from"
        )
    teacher = Sizes.of(config)
    student = _narrowed(teacher, config, settings)
    narrower = student != teacher
    layers = _layer_count(info, teacher, student, settings)
    plan = _Plan(layers, layers < info.layers, narrower)
    _check_text(info, settings, plan, texts)
    check_weights(info.path)
    if narrower:
        _check_types(info.path)
    return plan


def _narrowed(teacher: Sizes, config: Mapping[str, Any], settings: StudentSettings) -> Sizes:
    """The shape of a layer of the student."""
    for name in ("hidden_size", "intermediate_size", "key_value_heads"):
        wanted, most = getattr(settings, name), getattr(teacher, name)
        require(
            wanted is None or wanted <= most,
            f"{name} must be at most the teacher's {most}, since a part of it is kept; got "
            f"{wanted}; add fresh for a student of any size",
        )
    groups = settings.key_value_heads or teacher.key_value_heads
    heads = groups * (teacher.attention_heads // teacher.key_value_heads)
    hidden = settings.hidden_size or teacher.hidden_size
    require(
        config["model_type"] != "llama" or hidden % heads == 0,
        f"hidden_size of a Llama must be a multiple of its {heads} attention heads, or "
        f"transformers will not load it; got {hidden}, near which {hidden // heads * heads} and "
        f"{(hidden // heads + 1) * heads} are",
    )
    return replace(
        teacher,
        hidden_size=hidden,
        intermediate_size=settings.intermediate_size or teacher.intermediate_size,
        attention_heads=heads,
        key_value_heads=groups,
    )


def _layer_count(
    info: FolderInfo, teacher: Sizes, student: Sizes, settings: StudentSettings
) -> int:
    """How many layers to keep."""
    narrower = student != teacher
    if settings.choose == "named":
        require(
            settings.keep[-1] < info.layers,
            f"keep names layer {settings.keep[-1]}, and the teacher's last is {info.layers - 1}",
        )
    fitting = fitting_layers(student, settings)
    if fitting is not None:
        require(
            narrower or fitting < info.layers,
            f"the whole teacher is no larger than asked for: it has {teacher.parameters:,} "
            f"parameters, {teacher.megabytes_at_4_bits:.1f} megabytes at 4 bits; ask for less",
        )
        return min(fitting, info.layers)
    count = settings.layers or len(settings.keep) or (info.layers if narrower else 0)
    most = info.layers if narrower else info.layers - 1
    require(
        1 <= count <= most,
        f"layers must be between 1 and {most}, {'no more' if narrower else 'fewer'} than the "
        f"teacher's {info.layers}; " + (f"got {count}" if count else "say how many to keep"),
    )
    return count


def _check_text(
    info: FolderInfo, settings: StudentSettings, plan: _Plan, texts: Texts | None
) -> None:
    by_text = plan.fewer_layers and settings.choose in MEASURED
    require(
        not by_text or texts is not None,
        "what layers do is measured on text: give texts, such as @demo-train, or choose 'even'",
    )
    require(
        not plan.narrower or texts is not None,
        "which neurons, heads and channels are used is measured on text: give texts, such as "
        "@demo-train",
    )
    require(
        not (by_text or plan.narrower) or settings.block_length <= info.context_length,
        f"block_length must not exceed the teacher's context of {info.context_length}, got "
        f"{settings.block_length}",
    )


def _check_types(folder: Path) -> None:
    """Refuse to cut through numbers of a type that cannot be computed with."""
    for name, stored in tensor_headers(folder).items():
        if stored.dtype not in FLOATS:
            raise FolderError(
                f"{folder} stores {name} as {stored.dtype}, and width is cut from "
                f"{', '.join(FLOATS)} only; convert it first"
            )


# --- what is kept -------------------------------------------------------------------------------


def _choose(
    info: FolderInfo,
    config: Mapping[str, Any],
    settings: StudentSettings,
    plan: _Plan,
    texts: Texts,
) -> tuple[tuple[int, ...], KeptWidth | None, dict[str, Any]]:
    """The layers and the width to keep, and what the lineage should remember of the choice."""
    facts: dict[str, Any] = {}
    walked = plan.fewer_layers and settings.choose in ("influence", "angular")
    scores = None
    if plan.narrower or walked:
        blocks = _calibration_blocks(info, settings.walk_tokens, settings.block_length, texts)
        scores, reused = teacher_scores(info.path, blocks)
        facts |= {"calibration_tokens": blocks.tokens, "scores_reused": reused}
    keep = tuple(range(info.layers))
    if plan.fewer_layers:
        keep, chosen = _choose_layers(info, settings, plan.layers, scores, texts)
        facts |= chosen
    width = None
    if plan.narrower:
        assert scores is not None
        width = keep_strongest(
            scores.width,
            config,
            intermediate_size=settings.intermediate_size,
            key_value_heads=settings.key_value_heads,
            hidden_size=settings.hidden_size,
        )
    if "calibration_tokens" in facts:
        facts["texts"] = [str(text) for text in _as_list(texts)]
    return keep, width, {"kept_layers": list(keep), **facts}


def _choose_layers(
    info: FolderInfo,
    settings: StudentSettings,
    count: int,
    scores: TeacherScores | None,
    texts: Texts,
) -> tuple[tuple[int, ...], dict[str, Any]]:
    everything = range(info.layers)
    dropped = info.layers - count
    if settings.choose == "named":
        return settings.keep, {}
    if settings.choose == "even":
        return evenly_spaced(info.layers, count), {}
    if settings.choose == "greedy_kl":
        blocks = _calibration_blocks(info, settings.greedy_tokens, settings.block_length, texts)
        drops, reused = cheapest_drops(info.path, blocks, dropped)
        gone = {drop.layer for drop in drops}
        return tuple(layer for layer in everything if layer not in gone), {
            "dropped_layers": [drop.layer for drop in drops],
            "kl_without_them": [round(drop.kl, 6) for drop in drops],
            "calibration_tokens": blocks.tokens,
            "scores_reused": reused,
        }
    assert scores is not None
    if settings.choose == "angular":
        first = least_turning_block(scores.angular, dropped)
        gone = set(everything[first : first + dropped])
        distance = float(scores.angular[first, first + dropped])
        return tuple(layer for layer in everything if layer not in gone), {
            "dropped_layers": sorted(gone),
            "angular_distance": round(distance, 6),
        }
    return most_influential(scores.influence, count), {
        "influence": [round(value, 6) for value in scores.influence]
    }


def _calibration_blocks(
    info: FolderInfo, tokens: int, block_length: int, texts: Texts
) -> TokenBlocks:
    """The first tokens of the text, as blocks."""
    vocabulary = load_vocabulary(info.path)
    blocks = pack(read_documents(texts, vocabulary, limit=tokens), block_length)
    if blocks.tokens < tokens:
        logger.warning("scores are measured on %d tokens: the text holds no more", blocks.tokens)
    return blocks


def _as_list(texts: Texts) -> list[str | Path]:
    return [texts] if isinstance(texts, str | Path) else list(texts)


# --- scores, measured or remembered -------------------------------------------------------------


def teacher_scores(teacher: Path, blocks: TokenBlocks) -> tuple[TeacherScores, bool]:
    """What a walk through a teacher tells on some text, from the user's cache if it is there.

    Args:
        teacher: A float folder of a readable architecture.
        blocks: The text.

    Returns:
        The scores, and whether they were measured before.

    Raises:
        FolderError: If the teacher computes something that is not a number.
    """
    file = score_file("walk", teacher, blocks)
    stored = read_scores(file)
    if stored is not None:
        width = WidthScores(*(stored[name] for name in ("neurons", "groups", "channels")))
        return TeacherScores(tuple(stored["influence"].tolist()), stored["angular"], width), True
    scores = measure_scores(teacher, blocks)
    tensors = {
        "influence": torch.tensor(scores.influence, dtype=torch.float64),
        "angular": scores.angular,
        **vars(scores.width),
    }
    keep_scores(file, tensors)
    return scores, False


def cheapest_drops(teacher: Path, blocks: TokenBlocks, count: int) -> tuple[list[Drop], bool]:
    """Layers to drop by greedy KL, as far as they are in the user's cache from there.

    A search that went further holds the answer; one that went less far is gone on with.

    Args:
        teacher: A float folder of a readable architecture.
        blocks: The text.
        count: How many to drop.

    Returns:
        The drops in order, and whether nothing had to be tried.

    Raises:
        TextError: If nothing in the text is to be predicted.
        FolderError: If the teacher computes something that is not a number.
    """
    if not blocks.kept.any():
        raise TextError(
            "greedy KL needs tokens to be predicted, and the text begins with none; give more "
            "calibration_tokens"
        )
    file = score_file("greedy", teacher, blocks)
    scores = read_scores(file)
    known: list[Drop] = []
    if scores is not None:
        pairs = zip(scores["layers"].tolist(), scores["kl"].tolist(), strict=True)
        known = [Drop(layer, kl) for layer, kl in pairs]
    if len(known) >= count:
        return known[:count], True
    drops = greedy_drops(teacher, blocks, count, known)
    tensors = {
        "layers": torch.tensor([drop.layer for drop in drops]),
        "kl": torch.tensor([drop.kl for drop in drops], dtype=torch.float64),
    }
    keep_scores(file, tensors)
    return drops, False
