"""Scores of a teacher's parts on some text: measured, or remembered from an earlier student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distill.student.greedy import Drop, greedy_drops
from distill.student.healed_choice import HealedChoice, healed_choices
from distill.student.importance import TeacherScores, measure_scores
from distill.student.score_cache import keep_scores, read_scores, score_file
from distill.student.width import WidthScores
from mistill.errors import TextError

if TYPE_CHECKING:
    from mistill.text.blocks import TokenBlocks


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
    measured_drops: list[Drop] = []
    if scores is not None:
        pairs = zip(scores["layers"].tolist(), scores["kl"].tolist(), strict=True)
        measured_drops = [Drop(layer, kl) for layer, kl in pairs]
    if len(measured_drops) >= count:
        return measured_drops[:count], True
    drops = greedy_drops(teacher, blocks, count, measured_drops)
    tensors = {
        "layers": torch.tensor([drop.layer for drop in drops]),
        "kl": torch.tensor([drop.kl for drop in drops], dtype=torch.float64),
    }
    keep_scores(file, tensors)
    return drops, False


def least_missed_choice(
    teacher: Path, blocks: TokenBlocks, count: int
) -> tuple[HealedChoice, bool]:
    """The layers to keep by what healing leaves, from the user's cache if they are there.

    A search for more layers that go holds the answer.

    Args:
        teacher: A float folder of a readable architecture.
        blocks: The text, two blocks or more.
        count: How many layers to drop.

    Returns:
        The choice, and whether it was made before.

    Raises:
        TextError: If there is a single block, so that none is left to judge.
        FolderError: If the teacher computes something that is not a number.
    """
    if len(blocks) < 2:
        raise TextError(
            "choosing layers by what healing leaves needs two blocks of text, one to fit and one "
            f"to judge, and there is one of {blocks.block_length} tokens; give more text or more "
            "calibration_tokens, or a smaller block_length"
        )
    file = score_file("healed", teacher, blocks)
    scores = read_scores(file)
    if scores is not None and len(scores["kl"]) > count:
        keep = scores["kept"][count].nonzero()[:, 0].tolist()
        return HealedChoice(tuple(keep), float(scores["kl"][count])), True
    choices = healed_choices(teacher, blocks, count)
    kept = torch.zeros(len(choices), len(choices[0].keep), dtype=torch.bool)
    for number, choice in enumerate(choices):
        kept[number, list(choice.keep)] = True
    kl = torch.tensor([choice.kl for choice in choices], dtype=torch.float64)
    keep_scores(file, {"kept": kept, "kl": kl})
    return choices[count], False
