"""Fidelity of a finished folder to its source and to a teacher, on held-out text.

A folder of any form runs with one layer in memory, its codes decoded when their layer's turn comes,
so that a model is measured in the memory in which it was quantized. The figures go into the
folder's report, which is no part of what it holds: neither its lineage nor its fingerprint depends
on them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistill.errors import SettingsError, TextError, VocabularyError
from mistill.folders.folder import FolderInfo, context_length, read_config
from mistill.folders.lineage import without_paths
from mistill.measures.kl import Fidelity, Predictions, compare
from mistill.pytorch.layers import LayeredModel, per_batch
from mistill.pytorch.loading import check_weights, require_readable
from mistill.sources.source import open_weights
from mistill.text.blocks import TokenBlocks
from mistill.text.rows import Texts, check_texts, sources_of
from mistill.text.vocabulary import load_vocabulary, same_vocabulary
from mistill.weights.gptq_layout import HEAD
from quantize.calibration_text import draw_up_to
from quantize.settings import SweepSettings

_log = logging.getLogger(__name__)


# --- any folder -----------------------------------------------------------------------------------


@torch.inference_mode()
def predictions(folder: str | Path, blocks: TokenBlocks) -> Predictions:
    """What a folder predicts at the positions of a text that count.

    Args:
        folder: A float, GPTQ or NF4 folder.
        blocks: The text.

    Returns:
        Its predictions, in the order of the blocks.

    Raises:
        FolderError: If the folder is broken, or holds an ONNX graph.
        ArchitectureError: If it is neither Llama nor Mistral.
    """
    info = open_weights(folder)
    require_readable(info)
    check_weights(info.path)
    model = LayeredModel(info.path)
    return Predictions(last_hidden_states(model, blocks), model.table(HEAD))


@torch.inference_mode()
def last_hidden_states(model: LayeredModel, blocks: TokenBlocks) -> Tensor:
    """What the head of a model reads at the positions of a text that count.

    Args:
        model: The model, of which one layer is in memory at a time.
        blocks: The text.

    Returns:
        Hidden states after the last norm, shape (N, D), in the order of the blocks.
    """
    batches = model.batches(blocks)
    for index in range(len(model)):
        with model.layer(index) as layer:
            for batch in batches:
                batch.hidden = batch.through(layer)
    norm = model.final_norm()
    kept = per_batch(torch.from_numpy(blocks.kept), batches)
    rows = [
        norm(batch.hidden)[mask.to(batch.hidden.device)]
        for batch, mask in zip(batches, kept, strict=True)
    ]
    return torch.cat(rows)


def measure(
    folder: str | Path, references: Mapping[str, Predictions], blocks: TokenBlocks
) -> dict[str, Fidelity]:
    """Measure the fidelity of a folder to its source, to a teacher, and the like.

    Args:
        folder: A float, GPTQ or NF4 folder.
        references: Predictions of each reference, by its name.
        blocks: The text that they predict.

    Returns:
        Fidelity by name of the reference.
    """
    return compare(references, {"model": predictions(folder, blocks)}, blocks)["model"]


# --- a folder that was just quantized -------------------------------------------------------------


@dataclass(frozen=True)
class FidelityCheck:
    """Held-out text, and the models that a quantized one is compared with on it.

    Attributes:
        source: The float folder that is quantized.
        teacher: The folder of its teacher; None if none is given.
        blocks: The text.
        held_out: Names of the text.
    """

    source: Path
    teacher: Path | None
    blocks: TokenBlocks
    held_out: list[str]

    def measure(self, folder: Path) -> dict[str, Any]:
        """Measure a finished folder, with one layer of one model in memory.

        Args:
            folder: The folder that was made from the source.

        Returns:
            As JSON values: ``source`` and ``teacher``, the fidelity of the folder to each of them,
            and ``source_to_teacher``, that of the source to the teacher.
        """
        references = {"source": predictions(self.source, self.blocks)}
        if self.teacher is not None:
            references["teacher"] = predictions(self.teacher, self.blocks)
        models = {"quantized": predictions(folder, self.blocks), "source": references["source"]}
        fidelity = compare(references, models, self.blocks)
        quantized = fidelity["quantized"]
        _log.info("KL %.5f to the source", quantized["source"].kl)
        facts: dict[str, Any] = {
            "held_out": without_paths(self.held_out),
            **{name: asdict(figures) for name, figures in quantized.items()},
        }
        if self.teacher is not None:
            facts["source_to_teacher"] = asdict(fidelity["source"]["teacher"])
        return facts


def open_check(
    source: Path,
    held_out: Texts | None,
    teacher: str | Path | None = None,
    *,
    skip_bad_rows: bool = False,
) -> FidelityCheck | None:
    """Read the held-out text, and refuse what cannot be measured before any work is done.

    The text is that of a sweep with its defaults, so that figures can be compared with a sweep's.

    Args:
        source: The float folder that is quantized.
        held_out: Text to measure on; None if nothing is to be measured.
        teacher: The model that the source learnt from; None for comparing with the source alone.
        skip_bad_rows: Whether rows of the text that cannot be read are passed over and counted.

    Returns:
        The text and the models; None if there is no text.

    Raises:
        SettingsError: If there is a teacher and no text.
        FolderError: If the teacher is no model folder.
        VocabularyError: If the teacher has another vocabulary.
        TextError: If the text holds nothing to predict.
    """
    if held_out is None:
        if teacher is not None:
            raise SettingsError(
                "a teacher is compared with on held-out text; give held_out, or leave out teacher"
            )
        return None
    check_texts(held_out, skip_bad_rows=skip_bad_rows)
    teacher_folder = None if teacher is None else open_teacher(teacher, source).path
    sweep = SweepSettings()
    length = min(sweep.block_length, context_length(source, read_config(source)))
    blocks = draw_up_to(
        sweep.held_out_samples, length, held_out, source, sweep.seed, skip_bad_rows=skip_bad_rows
    )
    if not blocks.kept.any():
        raise TextError("held_out holds no token to predict; give more text")
    return FidelityCheck(source, teacher_folder, blocks, sources_of(held_out))


def open_teacher(teacher: str | Path, folder: Path) -> FolderInfo:
    """Open a teacher, reading no weight.

    Args:
        teacher: A folder, a Hub id, or whatever else names a model.
        folder: The model that is compared with it.

    Returns:
        Facts about the teacher's folder.

    Raises:
        FolderError: If it is broken, or holds an ONNX graph.
        ArchitectureError: If it is neither Llama nor Mistral.
        VocabularyError: If the two do not share every token.
    """
    info = open_weights(teacher)
    require_readable(info)
    differences = same_vocabulary(load_vocabulary(folder), load_vocabulary(info.path))
    if differences:
        raise VocabularyError(
            f"{folder} and its teacher {teacher} have different vocabularies: "
            f"{'; '.join(differences)}; give a teacher with the same tokenizer"
        )
    return info


def report_entry(check: FidelityCheck | None, folder: Path) -> dict[str, Any]:
    """Measure a finished folder for its report.

    Args:
        check: The text and the models; None if nothing is to be measured.
        folder: The finished folder.

    Returns:
        The entry ``measured`` of the report, or no entry.
    """
    return {} if check is None else {"measured": check.measure(folder)}
