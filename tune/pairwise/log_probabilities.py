"""Log-probabilities under the reference, computed once and written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mistill.judging.likelihood import GROUP, answer_log_probabilities
from mistill.preferences.tokens import Answer
from mistill.progress import track
from mistill.training.processes import this_process
from tune.trainers.shares import in_shares

if TYPE_CHECKING:
    from accelerate import PartialState


def recorded_log_probabilities(
    model: Any,
    answers: Sequence[Answer],
    record: Path,
    fingerprint: str,
    *,
    low_precision: bool = False,
) -> NDArray[np.float64]:
    """Log p of each answer, computed once and written down, so that a killed run resumes.

    Args:
        model: The reference: the model as it is given, without or before any adapter.
        answers: N prompts with answers.
        record: A file of JSON lines; the first one names the fingerprint.
        fingerprint: Of the model, the token ids and the precision; a record of others is begun
            anew.
        low_precision: Whether the model computes in bfloat16.

    Returns:
        Shape (N,).
    """
    state = this_process()
    known = _known(record, fingerprint, state)[: len(answers)]
    with track("reference", len(answers), "answers", done=len(known)) as progress:

        def compute(some: Sequence[Answer]) -> NDArray[np.float64]:
            values = answer_log_probabilities(model, some, low_precision=low_precision)
            progress.advance(len(some) * state.num_processes)
            return values

        while len(known) < len(answers):
            part = answers[len(known) : len(known) + GROUP * state.num_processes]
            new = in_shares(part, compute, GROUP)
            if state.is_main_process:
                with record.open("a", encoding="utf-8") as opened:
                    opened.write("".join(json.dumps(value) + "\n" for value in new.tolist()))
            known += new.tolist()
    return np.array(known)


def _known(record: Path, fingerprint: str, state: PartialState) -> list[float]:
    """What the record holds, which one process reads for all; an empty one is begun."""
    from accelerate.utils import broadcast_object_list

    known: list[list[float]] = [[]]
    if state.is_main_process:
        known = [_read_record(record, fingerprint)]
        if not known[0]:
            record.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", "utf-8")
    if state.num_processes > 1:
        broadcast_object_list(known)
    return known[0]


def _read_record(record: Path, fingerprint: str) -> list[float]:
    """The numbers of a record, in whole parts; what a kill cut short is cut off."""
    lines = record.read_bytes().split(b"\n")[:-1] if record.is_file() else []
    try:
        same = bool(lines) and json.loads(lines[0]).get("fingerprint") == fingerprint
        numbers = [float(line) for line in lines[1:]] if same else []
    except (ValueError, AttributeError):
        return []
    whole = len(numbers) // GROUP * GROUP
    if same and whole < len(numbers):
        record.write_bytes(b"".join(line + b"\n" for line in lines[: whole + 1]))
    return numbers[:whole]
