"""Heal a student folder in closed form, so that its training begins near its teacher.

A layer that is healed is stored beside the target at once, and the same call resumes behind it
after an interruption.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.healing.walk import ATTENTION, MLP, RIDGES, HealedLayer, Origin, heal_layers
from distill.settings import HealSettings
from mistill.errors import FolderError, VocabularyError
from mistill.folders.folder import (
    FolderInfo,
    copy_companions,
    open_folder,
    tensor_headers,
)
from mistill.folders.lineage import add_lineage, fingerprint, installed_versions, read_lineage
from mistill.folders.publishing import begun_on, publish, refuse_existing, replacing, working
from mistill.progress import track
from mistill.pytorch.layers import LayeredModel, accelerator_or_cpu
from mistill.pytorch.loading import (
    check_weights,
    completed_config,
    require_readable,
    stored_tensors,
)
from mistill.settings import require, result_settings, settings_from
from mistill.sources.source import resolve_model
from mistill.text.blocks import TokenBlocks, joined, pack
from mistill.text.documents import read_documents
from mistill.text.rows import Texts, sources_of
from mistill.text.vocabulary import Vocabulary, load_vocabulary, same_vocabulary
from mistill.weights.tensor_writer import TensorWriter

if TYPE_CHECKING:
    from distill.options import HealOptions

logger = logging.getLogger(__name__)

_FACTS = "mistill"
_OUTPUT = re.compile(rf"model\.layers\.(\d+)\.({re.escape(ATTENTION)}|{re.escape(MLP)})\.weight")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def heal(
    student: str | Path,
    target: str | Path,
    *,
    teacher: str | Path,
    texts: Texts,
    settings: HealSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[HealOptions],
) -> Path:
    """Refit the output matrices of a pruned student, in closed form, to what its teacher computes.

    ``o_proj`` and ``down_proj`` of every layer are fitted by ridge least squares, in order, on the
    student's own hidden states, so that its residual stream is the teacher's again as far as it
    can be. No gradient is computed. One layer of each model is in memory at a time. Give text of
    several kinds: a student that is healed on chats alone may lose on other text.

    Args:
        student: A model folder with float weights, as ``new_student`` makes it.
        target: The folder to make.
        teacher: The model that the student was cut from: a model folder, a Hub id, a GGUF file or
            ``@smollm2``.
        texts: Calibration text, best of several kinds; as many tokens of each are read.
        settings: How to heal; or give its fields as options.
        overwrite: Whether to replace the target if it exists.
        **options: Fields of ``HealSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range, or the layers that the student has of its
            teacher are not known.
        FolderError: If a model is broken or quantized, or computes values that are not numbers.
        ArchitectureError: If one of them is neither Llama nor Mistral.
        VocabularyError: If their vocabularies differ.
        TextError: If there is no text.
    """
    settings = settings_from(HealSettings, settings, options)
    path = refuse_existing(target, overwrite, [student, teacher])
    info = _float_folder(student)
    large = _float_folder(resolve_model(teacher))
    _require_shared(info, large)
    origin = _origin(info, large, settings)
    _require_context(large, settings.block_length)
    vocabulary = load_vocabulary(large.path, today=begun_on(path))
    blocks = calibration_blocks(
        texts,
        vocabulary,
        settings.tokens,
        settings.block_length,
        skip_bad_rows=settings.skip_bad_rows,
    )
    key = {
        "step": "heal",
        "student": fingerprint(info.path),
        "teacher": fingerprint(large.path),
        "settings": result_settings(settings),
        "texts": blocks.digest,
        "versions": installed_versions(),
        **vocabulary.date_key,
    }
    with working(path, key, anew=overwrite) as work:
        result = work / "result"
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        shutil.copyfile(info.path / "config.json", result / "config.json")
        facts = write_healed(info.path, result, work, large.path, origin, blocks, settings.ridge)
        copy_companions(info.path, result)
        facts |= {
            "teacher": str(teacher),
            "teacher_fingerprint": key["teacher"],
            "texts": sources_of(texts),
        }
        add_lineage(result, step="heal", settings=settings, source=info.path, **facts)
        publish(work, path, overwrite)
    return Path(target)


def calibration_blocks(
    texts: Texts,
    vocabulary: Vocabulary,
    tokens: int,
    block_length: int,
    *,
    skip_bad_rows: bool = False,
) -> TokenBlocks:
    """The first tokens of every text, as blocks.

    Args:
        texts: One text or several.
        vocabulary: Of the models.
        tokens: Most tokens of each text.
        block_length: Positions of a block.
        skip_bad_rows: Whether rows that cannot be read are passed over.

    Returns:
        The blocks of all texts, in turn, so that any share of them holds every kind.

    Raises:
        TextError: If there is no text.
    """
    parts = []
    for source in sources_of(texts):
        documents = read_documents(source, vocabulary, limit=tokens, skip_bad_rows=skip_bad_rows)
        part = pack(documents, block_length)
        if part.tokens < tokens:
            logger.info("%s holds %d of the %d calibration tokens", source, part.tokens, tokens)
        parts.append(part)
    return joined(parts)


def write_healed(
    student: Path,
    target: Path,
    work: Path,
    teacher: Path,
    origin: Origin,
    blocks: TokenBlocks,
    ridge: float | None = None,
) -> dict[str, Any]:
    """Write the weights of a student, those of its output matrices healed.

    Args:
        student: The student's folder.
        target: The folder to write the weights into.
        work: Where healed layers are kept until all are; those that are there are not done again.
        teacher: The folder that the student was cut from.
        origin: What it was cut from there.
        blocks: Calibration text.
        ridge: The ridge of every fit; None chooses one for each on text that is left out of it.

    Returns:
        Facts for the lineage.

    Raises:
        FolderError: If one of the models computes values that are not finite.
    """
    device = accelerator_or_cpu()
    layers = heal_layers(
        LayeredModel(teacher, device),
        LayeredModel(student, device),
        origin,
        blocks,
        types=_types(student),
        ridges=RIDGES if ridge is None else (ridge,),
        stored=lambda index: _read_layer(work, index),
    )
    fits = []
    with torch.inference_mode(), track("healing", len(origin.layers), "layers") as bar:
        for layer in layers:
            if not _file(work, layer.index).exists():
                _keep_layer(work, layer)
            fits.append(layer.fits)
            bar.advance()
    with TensorWriter(target) as writer:
        for name, tensor in stored_tensors(student):
            writer.add(name, _healed_tensor(work, name, tensor))
    return {
        "healing_tokens": blocks.tokens,
        "healing_blocks": blocks.digest,
        "healed": fits,
    }


def origin_of(facts: Mapping[str, Any]) -> Origin | None:
    """What a student was cut from, by the facts in its lineage.

    Args:
        facts: The entry of the step that made it.

    Returns:
        Its layers and channels; None where the entry does not say.
    """
    layers = facts.get("kept_layers")
    if not isinstance(layers, Sequence) or not all(isinstance(layer, int) for layer in layers):
        return None
    channels = facts.get("kept_channels")
    return Origin(tuple(layers), None if channels is None else torch.tensor(channels))


# --- what is healed -----------------------------------------------------------------------------


def _float_folder(model: str | Path) -> FolderInfo:
    """A readable model with float weights, whose tensors are those of its config."""
    info = open_folder(model)
    if info.form != "model":
        raise FolderError(
            f"{info.path} is {info.kind}, and only float weights are healed; give the "
            "float model that it was made from"
        )
    require_readable(info)
    check_weights(info.path)
    return info


def _require_context(teacher: FolderInfo, block_length: int) -> None:
    require(
        block_length <= teacher.context_length,
        f"block_length must not exceed the teacher's context of {teacher.context_length}, got "
        f"{block_length}",
    )


def _require_shared(student: FolderInfo, teacher: FolderInfo) -> None:
    differences = same_vocabulary(load_vocabulary(student.path), load_vocabulary(teacher.path))
    if differences:
        raise VocabularyError(
            f"student and teacher have different vocabularies: {'; '.join(differences)}; heal a "
            "student with the teacher that it was cut from"
        )


def _origin(student: FolderInfo, teacher: FolderInfo, settings: HealSettings) -> Origin:
    """The teacher's layers and channels that a student has."""
    entries = [entry for entry in read_lineage(student.path) if entry.get("step") == "student"]
    origin = origin_of(entries[-1]) if entries else None
    if settings.kept_layers:
        origin = Origin(settings.kept_layers, None if origin is None else origin.channels)
    require(
        origin is not None,
        f"the lineage of {student.path} does not say which of the teacher's layers it has; name "
        "them in kept_layers",
    )
    assert origin is not None
    require(
        len(origin.layers) == student.layers and origin.layers[-1] < teacher.layers,
        f"kept_layers must name one of the teacher's {teacher.layers} layers for each of the "
        f"student's {student.layers}, got {', '.join(map(str, origin.layers))}",
    )
    width = completed_config(student.path)["hidden_size"]
    whole = completed_config(teacher.path)["hidden_size"]
    channels = whole if origin.channels is None else len(origin.channels)
    require(
        width == channels,
        f"the student's hidden states have {width} channels, and {channels} of the teacher's "
        f"{whole} are known to be kept; heal a student that was cut from this teacher",
    )
    return origin


def _types(student: Path) -> dict[str, torch.dtype]:
    """The types of the matrices that are healed, by their names in a layer."""
    headers = tensor_headers(student)
    types = {}
    for name in (ATTENTION, MLP):
        stored = headers[f"model.layers.0.{name}.weight"].dtype
        if stored not in _FLOATS:
            raise FolderError(
                f"{student} stores {name} as {stored}, and matrices are healed in "
                f"{', '.join(_FLOATS)} only; convert it first"
            )
        types[name] = _FLOATS[stored]
    return types


# --- layers that are done -----------------------------------------------------------------------


def _file(work: Path, index: int) -> Path:
    return work / f"healed-{index:05}.safetensors"


def _healed_tensor(work: Path, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the student as healing left it."""
    match = _OUTPUT.fullmatch(name)
    if match is None:
        return tensor
    with safe_open(_file(work, int(match[1])), framework="pt") as opened:
        healed: Tensor = opened.get_tensor(match[2])
    return healed


def _keep_layer(work: Path, layer: HealedLayer) -> None:
    with replacing(_file(work, layer.index)) as partial:
        save_file(layer.weights, partial, metadata={_FACTS: json.dumps(layer.fits)})


def _read_layer(work: Path, index: int) -> HealedLayer | None:
    """A layer that an earlier run healed; None if there is none, or it is damaged."""
    file = _file(work, index)
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return HealedLayer(index, weights, json.loads(opened.metadata()[_FACTS]))
    except (OSError, SafetensorError, ValueError, LookupError):
        return None
