"""Make a student: a part of a teacher, or a fresh small model with its vocabulary.

Either way the student has the teacher's tokenizer, chat template and special tokens, because it
is made from the teacher's folder; what each of its token ids means is never in question. And it
is a plain Llama or Mistral model, so that every other tool reads it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from distill.healing.healed_folder import calibration_blocks, write_healed
from distill.healing.walk import Origin
from distill.settings import MEASURED, StudentSettings
from distill.student.angular import least_turning_block
from distill.student.fresh import fresh_config, write_fresh
from distill.student.importance import TeacherScores, evenly_spaced, most_influential
from distill.student.pruning import FLOATS, copy_layers
from distill.student.scores import cheapest_drops, least_missed_choice, teacher_scores
from distill.student.sizing import Sizes, fitting_layers
from distill.student.width import KeptWidth, keep_strongest
from mistill.errors import FolderError
from mistill.folders.folder import (
    FolderInfo,
    copy_companions,
    open_folder,
    read_json,
    tensor_headers,
)
from mistill.folders.lineage import add_lineage, fingerprint, installed_versions
from mistill.folders.publishing import (
    begun_on,
    creating,
    publish,
    refuse_existing,
    working,
)
from mistill.pytorch.loading import check_weights, completed_config, require_readable
from mistill.settings import require, result_settings, settings_from
from mistill.sources.source import resolve_model
from mistill.text.blocks import TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.rows import Texts, sources_of
from mistill.text.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from distill.options import StudentOptions

logger = logging.getLogger(__name__)


def new_student(
    teacher: str | Path,
    target: str | Path,
    *,
    texts: Texts | None = None,
    settings: StudentSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[StudentOptions],
) -> Path:
    """Make a student with a part of its teacher, or a fresh one with its vocabulary.

    Layers are kept by what they do on text (``choose="influence"``, ``"angular"``,
    ``"greedy_kl"`` or ``"healed"``), evenly spaced, or as named; neurons, key/value groups and
    channels by how much they are used on text. What is kept is copied in the teacher's own type,
    and to the bit unless ``hidden_size`` changes, which rescales the norms. A fresh student has
    random float32 weights and its own sizes.

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
    path = refuse_existing(target, overwrite, [teacher])
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
        if plan.heals:
            assert texts is not None
            cut = _Cut(info, keep, width, settings)
            facts = _make_healed(cut, path, texts, facts, overwrite)
        else:
            with creating(target, overwrite) as folder:
                copy_layers(info.path, folder, keep, width)
                facts = _finish(folder, info, settings, facts)
    logger.info("made the student %s from %s: %s", target, info.path, facts)
    return Path(target)


@dataclass(frozen=True)
class _Cut:
    """What a student is made of.

    Attributes:
        teacher: The teacher.
        keep: Its layers that are kept.
        width: What is kept of each; None for all.
        settings: How the student is made.
    """

    teacher: FolderInfo
    keep: tuple[int, ...]
    width: KeptWidth | None
    settings: StudentSettings

    @property
    def origin(self) -> Origin:
        """The teacher's layers and channels that the student has."""
        return Origin(self.keep, None if self.width is None else self.width.channels)


def _make_healed(
    cut: _Cut, target: Path, texts: Texts, facts: Mapping[str, Any], overwrite: bool
) -> dict[str, Any]:
    """Cut a student and heal it, or finish what an interrupted run left of that."""
    settings = cut.settings
    vocabulary = load_vocabulary(cut.teacher.path, today=begun_on(target))
    blocks = calibration_blocks(
        texts,
        vocabulary,
        settings.heal_tokens,
        settings.block_length,
        skip_bad_rows=settings.skip_bad_rows,
    )
    key = {
        "step": "student",
        "teacher": fingerprint(cut.teacher.path),
        "settings": result_settings(settings),
        "kept_layers": list(cut.keep),
        "kept_width": None if cut.width is None else cut.width.digest,
        "texts": blocks.digest,
        "versions": installed_versions(),
        **vocabulary.date_key,
    }
    with working(target, key, anew=overwrite) as work:
        pruned, result = work / "pruned", work / "result"
        for folder in (pruned, result):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        copy_layers(cut.teacher.path, pruned, cut.keep, cut.width)
        shutil.copyfile(pruned / "config.json", result / "config.json")
        healing = write_healed(pruned, result, work, cut.teacher.path, cut.origin, blocks)
        shutil.rmtree(pruned)
        healing["texts"] = sources_of(texts)
        all_facts = _finish(result, cut.teacher, settings, {**facts, **healing})
        publish(work, target, overwrite)
    return all_facts


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
        heals: Whether what is kept is healed.
    """

    layers: int
    fewer_layers: bool
    narrower: bool
    heals: bool


def _plan(
    info: FolderInfo, config: Mapping[str, Any], settings: StudentSettings, texts: Texts | None
) -> _Plan:
    """How much to keep; what cannot be done is refused before anything large is read."""
    if info.form != "model":
        raise FolderError(
            f"{info.path} is {info.kind}, and a student is cut from float weights only, "
            "since one that is trained further needs them; give the float model that it was made "
            "from"
        )
    teacher = Sizes.of(config)
    student = _narrowed(teacher, config, settings)
    narrower = student != teacher
    layers = _layer_count(info, teacher, student, settings)
    heals = texts is not None if settings.heal is None else settings.heal
    plan = _Plan(layers, layers < info.layers, narrower, heals)
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
        not plan.heals or texts is not None,
        "a student is healed on text: give texts, such as @demo-train, or leave out heal",
    )
    require(
        not (by_text or plan.narrower or plan.heals)
        or settings.block_length <= info.context_length,
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
        blocks = _calibration_blocks(info, settings.walk_tokens, settings, texts)
        scores, reused = teacher_scores(info.path, blocks)
        facts |= {"calibration_tokens": blocks.tokens, "scores_reused": reused}
    keep = tuple(range(info.layers))
    if plan.fewer_layers:
        keep, choice = _choose_layers(info, settings, plan.layers, scores, texts)
        facts |= choice
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
        facts["texts"] = sources_of(texts)
    if width is not None and width.channels is not None:
        facts["kept_channels"] = width.channels.tolist()
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
        blocks = _calibration_blocks(info, settings.greedy_tokens, settings, texts)
        drops, reused = cheapest_drops(info.path, blocks, dropped)
        dropped_layers = {drop.layer for drop in drops}
        return tuple(layer for layer in everything if layer not in dropped_layers), {
            "dropped_layers": [drop.layer for drop in drops],
            "kl_without_them": [round(drop.kl, 6) for drop in drops],
            "calibration_tokens": blocks.tokens,
            "scores_reused": reused,
        }
    if settings.choose == "healed":
        blocks = _choosing_blocks(info, settings, texts)
        choice, reused = least_missed_choice(info.path, blocks, dropped)
        return choice.keep, {
            "dropped_layers": sorted(set(everything) - set(choice.keep)),
            "kl_when_healed": round(choice.kl, 6),
            "calibration_tokens": blocks.tokens,
            "scores_reused": reused,
        }
    assert scores is not None
    if settings.choose == "angular":
        first = least_turning_block(scores.angular, dropped)
        dropped_layers = set(everything[first : first + dropped])
        distance = float(scores.angular[first, first + dropped])
        return tuple(layer for layer in everything if layer not in dropped_layers), {
            "dropped_layers": sorted(dropped_layers),
            "angular_distance": round(distance, 6),
        }
    return most_influential(scores.influence, count), {
        "influence": [round(value, 6) for value in scores.influence]
    }


def _choosing_blocks(info: FolderInfo, settings: StudentSettings, texts: Texts) -> TokenBlocks:
    """As many tokens of every text, as blocks in turn."""
    each = -(-settings.choosing_tokens // len(sources_of(texts)))
    return calibration_blocks(
        texts,
        load_vocabulary(info.path),
        each,
        settings.block_length,
        skip_bad_rows=settings.skip_bad_rows,
    )


def _calibration_blocks(
    info: FolderInfo, tokens: int, settings: StudentSettings, texts: Texts
) -> TokenBlocks:
    """The first tokens of the text, as blocks."""
    vocabulary = load_vocabulary(info.path)
    documents = read_documents(
        texts,
        vocabulary,
        limit=tokens,
        skip_bad_rows=settings.skip_bad_rows,
        block_length=settings.block_length,
    )
    blocks = pack(documents, settings.block_length)
    if blocks.tokens < tokens:
        logger.warning("scores are measured on %d tokens: the text holds no more", blocks.tokens)
    return blocks
