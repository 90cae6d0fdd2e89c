"""Measure a finished folder on held-out text before it is published, where that is asked for.

What is found goes into the folder's report, which is no part of what it holds: neither its lineage
nor its fingerprint tells whether it was measured.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mistill.errors import FolderError, SettingsError, TextError, VocabularyError
from mistill.folders.folder import FolderInfo, context_length, open_folder, read_config
from mistill.measures.kl import compare
from mistill.pytorch.loading import require_readable
from mistill.sources.source import resolve_model
from mistill.text.blocks import TokenBlocks
from mistill.text.rows import Texts, check_texts
from mistill.text.vocabulary import load_vocabulary, same_vocabulary
from quantize.calibration_text import draw_up_to, names_of
from quantize.measuring.measuring import predictions
from quantize.settings import SweepSettings

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judge:
    """Held-out text, and the models that a quantized one is compared with on it.

    Attributes:
        source: The float folder that is quantized.
        teacher: The folder of its teacher; None if none is given.
        blocks: The text.
        held_out: What the text is called.
    """

    source: Path
    teacher: Path | None
    blocks: TokenBlocks
    held_out: list[str]

    def measure(self, folder: Path) -> dict[str, Any]:
        """Measure a finished folder, with one layer of one model in memory.

        Args:
            folder: What was made of the source.

        Returns:
            As JSON values: ``source`` and ``teacher``, how close the folder is to each of them,
            and ``source_to_teacher``, how close the source was.
        """
        models = {"source": self.source, "teacher": self.teacher}
        asked = {
            name: predictions(path, self.blocks)
            for name, path in models.items()
            if path is not None
        }
        judged = {"made": predictions(folder, self.blocks), "source": asked["source"]}
        found = compare(asked, judged, self.blocks)
        made = found["made"]
        _log.info("KL %.5f to the source", made["source"].kl)
        measured: dict[str, Any] = {"held_out": self.held_out, "source": asdict(made["source"])}
        if self.teacher is not None:
            measured |= {
                "teacher": asdict(made["teacher"]),
                "source_to_teacher": asdict(found["source"]["teacher"]),
            }
        return measured


def open_judge(
    source: Path, held_out: Texts | None, teacher: str | Path | None = None
) -> Judge | None:
    """Make ready to measure, and refuse what cannot be measured before any work is done.

    The text is that of a sweep with its defaults, so that figures can be held beside one another.

    Args:
        source: The float folder that is quantized.
        held_out: Text to measure on; None for not measuring.
        teacher: The model that the source learnt from; None for comparing with the source alone.

    Returns:
        The judge; None if there is no text.

    Raises:
        SettingsError: If there is a teacher and no text.
        FolderError: If the teacher is no model folder.
        VocabularyError: If the teacher has other tokens.
        TextError: If the text holds nothing to predict.
    """
    if held_out is None:
        if teacher is not None:
            raise SettingsError(
                "a teacher is compared with on held-out text; give held_out, or leave it out"
            )
        return None
    check_texts(held_out)
    guide = None if teacher is None else open_teacher(teacher, source).path
    usual = SweepSettings()
    length = min(usual.block_length, context_length(source, read_config(source)))
    blocks = draw_up_to(usual.held_out_samples, length, held_out, source, usual.seed)
    if not blocks.kept.any():
        raise TextError("held_out holds no token to predict; give more of it")
    return Judge(source, guide, blocks, names_of(held_out))


def open_teacher(teacher: str | Path, folder: Path) -> FolderInfo:
    """Open a teacher, reading no weight.

    Args:
        teacher: A folder, a Hub id, or whatever else names a model.
        folder: The model that is compared with it.

    Returns:
        What the teacher's folder holds.

    Raises:
        FolderError: If it is broken, or holds an ONNX graph.
        ArchitectureError: If it is neither Llama nor Mistral.
        VocabularyError: If the two do not share every token.
    """
    info = open_folder(resolve_model(teacher))
    if info.form == "onnx":
        raise FolderError(f"{teacher} is an ONNX folder; give the model that it was exported from")
    require_readable(info)
    differences = same_vocabulary(load_vocabulary(folder), load_vocabulary(info.path))
    if differences:
        raise VocabularyError(
            f"{folder} and its teacher {teacher} have different vocabularies: "
            f"{'; '.join(differences)}; give a teacher with the same tokenizer"
        )
    return info


def judged(judge: Judge | None, folder: Path) -> dict[str, Any]:
    """What a report says of the measurement.

    Args:
        judge: Who measures; None for nobody.
        folder: The finished folder.

    Returns:
        ``measured``, or nothing.
    """
    return {} if judge is None else {"measured": judge.measure(folder)}
