"""What a teacher says about a text, kept on disk, so that the teacher need not be there again.

Everything that can be wrong is found before a weight is read. Then the teacher reads the pieces
of the text shard by shard, and each shard is written whole. A folder without ``manifest.json`` is
unfinished: the same call goes on with it, and any number of processes and machines may work on it
side by side, each on its own shards. The bytes of a shard depend on the teacher, the text and the
settings, and on nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from distill.settings import TargetSettings
from distill.targets.asking import ask
from distill.targets.shards import (
    Piece,
    Plan,
    differences,
    finish,
    make_plan,
    shard_bytes,
    shard_name,
    sound_shard,
    template_digest,
)
from mistill.errors import FolderError, SettingsError, TargetExistsError, TextError
from mistill.folders.folder import MANIFEST_FILE, FolderInfo
from mistill.folders.lineage import LINEAGE_FILE, fingerprint, lineage_after
from mistill.folders.location import Location, location_of
from mistill.folders.publishing import day_of, is_full_disk, refuse_existing
from mistill.folders.targets_folder import PLAN_FILE, is_targets, read_document
from mistill.progress import track
from mistill.settings import environment_number, require, result_settings, settings_from
from mistill.sources.source import open_weights
from mistill.text.blocks import TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.rows import Texts, check_texts
from mistill.text.vocabulary import Vocabulary, load_vocabulary

if TYPE_CHECKING:
    from distill.options import TargetOptions
    from distill.targets.codec import StoredTargets
    from distill.teacher.teacher import LiveTeacher

_LOOK_AGAIN_SECONDS = 0.5
# What says who works, and not what comes of it.
_WORKERS = ("rank", "ranks")

logger = logging.getLogger(__name__)


def cache_targets(
    teacher: str | Path,
    target: str | Path,
    *,
    texts: Texts,
    settings: TargetSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[TargetOptions],
) -> Path | str:
    """Ask a teacher about a text once, and keep on disk what it says.

    At every position that counts, tokens are drawn from the teacher's distribution; a student
    that learns from them learns on average what the teacher itself would have taught it. Give
    ``distill.train`` the folder in place of the teacher.

    An interrupted call goes on where it was when it is made again, and ends with the same bytes.
    Processes started by ``torchrun`` or ``accelerate launch`` share the work, and so do machines
    that are told their ``rank``.

    Args:
        teacher: The model to ask, in any form that PyTorch runs.
        target: The folder to make, on this machine or any location that fsspec knows, such as
            ``s3://bucket/targets``.
        texts: Text or conversations; that which the student is judged on too, if the teacher
            will not be there.
        settings: How to keep what it says; or give its fields as keywords.
        overwrite: Whether targets that exist are replaced.
        **options: Fields of ``TargetSettings``.

    Returns:
        The target; finished, unless other ranks are still at work.

    Raises:
        SettingsError: If a setting is out of range, or a block does not fit the teacher's context.
        FolderError: If the teacher is missing or broken, or the target holds other targets.
        TextError: If there is no text.
    """
    settings = settings_from(TargetSettings, settings, options)
    location = location_of(target)
    if location.remote is None:
        refuse_existing(target, overwrite=True)
    check_texts(texts, skip_bad_rows=settings.skip_bad_rows)
    workers = _workers(settings)
    _check_target(location, workers, overwrite)
    info = open_weights(teacher)
    require(
        settings.block_length <= info.context_length,
        f"a block_length of {settings.block_length} does not fit the teacher's context of "
        f"{info.context_length}; lower it",
    )
    from mistill.pytorch.reading import require_finite_weights

    require_finite_weights(info.path)
    vocabulary = load_vocabulary(info.path, today=_begun_on(location, overwrite))
    documents = read_documents(
        texts,
        vocabulary,
        skip_bad_rows=settings.skip_bad_rows,
        block_length=settings.block_length,
    )
    blocks = pack(documents, settings.block_length)
    if not blocks.kept.any():
        raise TextError(
            "the texts hold nothing to be predicted; give text, or conversations with replies"
        )
    plan = make_plan(blocks, settings.shard_tokens, _facts(info, vocabulary, settings))
    try:
        if _begin(location, plan, overwrite):
            checksums = _make_shards(location, plan, blocks, info, settings, workers)
            _end(location, plan, checksums, info, settings, workers)
    except Exception as error:
        if is_full_disk(error):
            raise FolderError(
                f"no room to write {target}: free some space on its disk and run this again; it "
                "will resume"
            ) from error
        raise
    return location.path


# --- who works on what --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Workers:
    """Which of how many processes this is.

    Attributes:
        rank: From 0.
        ranks: All of them.
        launched: Whether a common launcher started them, and will end them together.
    """

    rank: int
    ranks: int
    launched: bool


def _workers(settings: TargetSettings) -> _Workers:
    by_settings = settings.ranks is not None
    rank, ranks = (settings.rank, settings.ranks) if by_settings else (None, None)
    if not by_settings and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, ranks = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1, 1)
        require(rank < ranks, f"RANK is {rank} and WORLD_SIZE {ranks}; ranks begin at 0")
    return _Workers(rank or 0, ranks or 1, launched=not by_settings and ranks is not None)


def _check_target(location: Location, workers: _Workers, overwrite: bool) -> None:
    """Refuse a target that exists and is no unfinished folder of targets."""
    if overwrite and workers.ranks > 1:
        raise SettingsError(
            f"{workers.ranks} processes cannot agree on when to overwrite {location}; remove it "
            "before they start"
        )
    names = location.names()
    if not names:
        return
    if not is_targets(location):
        if overwrite:
            raise FolderError(
                f"{location} exists and is not a folder of targets; choose another target"
            )
        raise TargetExistsError(f"{location} exists already; choose another name")
    if MANIFEST_FILE in names and not overwrite and workers.ranks == 1:
        raise TargetExistsError(f"{location} exists already; choose another name or overwrite it")


def _facts(info: FolderInfo, vocabulary: Vocabulary, settings: TargetSettings) -> dict[str, Any]:
    """All that decides what the teacher says and how it is written, but for the text."""
    options = result_settings(settings, *_WORKERS)
    precision = settings.precision
    if precision == "auto":
        precision = "bfloat16" if _device_type() == "cuda" else "float32"
    return {
        "teacher": {
            "fingerprint": fingerprint(info.path),
            "form": info.form,
            "dtype": precision,
        },
        "vocabulary": {"size": info.vocabulary_size, "fingerprint": vocabulary.fingerprint()},
        "template": template_digest(vocabulary),
        "settings": options,
        **vocabulary.date_key,
    }


def _begun_on(location: Location, overwrite: bool) -> date:
    """The day on which unfinished targets were begun, or today."""
    names = location.names()
    if PLAN_FILE in names:
        return day_of(read_document(location, PLAN_FILE).get("date"))
    if MANIFEST_FILE in names and not overwrite:
        return day_of(read_document(location, MANIFEST_FILE).get("date"))
    return day_of(None)


def _begin(location: Location, plan: Plan, overwrite: bool) -> bool:
    """Write the plan, or go on with an equal one; False if others have finished it."""
    names = location.names()
    finished = MANIFEST_FILE in names
    if finished or PLAN_FILE in names:
        there = read_document(location, MANIFEST_FILE if finished else PLAN_FILE)
        same = _comparable(there) == _comparable(plan.facts)
        if same and not (finished and overwrite):
            return not finished
        if not overwrite:
            other = "; ".join(differences(there, _comparable(plan.facts)))
            state = "finished" if finished else "unfinished"
            raise FolderError(
                f"{location} holds {state} targets, and this call has {other}: make the call that "
                "began them, choose another target, or overwrite it"
            )
    # The plan first: without it and without a manifest, no call would know what is there.
    location.write(PLAN_FILE, (json.dumps(plan.facts, indent=0) + "\n").encode())
    location.remove(MANIFEST_FILE)
    for name in names:
        if name.startswith(("shard-", ".shard-")):
            location.remove(name)
    return True


def _comparable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a plan, from a plan or from the manifest that it became."""
    comparable = {
        name: value
        for name, value in facts.items()
        if name not in ("plan", "files", "stored_tokens", "mean_entropy")
    }
    comparable["teacher"] = {
        name: value for name, value in comparable["teacher"].items() if name != "name"
    }
    return comparable


# --- asking the teacher -------------------------------------------------------------------------


def _make_shards(
    location: Location,
    plan: Plan,
    blocks: TokenBlocks,
    info: FolderInfo,
    settings: TargetSettings,
    workers: _Workers,
) -> dict[int, str]:
    """Make what is missing of this process's shards; checksums by the number of the shard."""
    checksums: dict[int, str] = {}
    missing = []
    done = 0
    own_shards = range(workers.rank, plan.shards, workers.ranks)
    for shard in own_shards:
        sound = sound_shard(location, shard, plan)
        location.remove_partials(shard_name(shard))
        if sound is None:
            missing.append(shard)
            continue
        checksums[shard] = hashlib.sha256(sound[1]).hexdigest()
        done += _tokens(plan.run(shard))
    if not missing:
        return checksums
    from mistill.pytorch.products import fast_products

    teacher = _load_teacher(info, plan)
    total = sum(_tokens(plan.run(shard)) for shard in own_shards)
    with track("caching targets", total=total, unit="tok", done=done) as bar, fast_products():
        for shard in missing:
            pieces = plan.run(shard)
            answers: dict[int, StoredTargets] = {}
            for numbers, tokens, answer in ask(teacher, blocks, pieces, settings):
                positions = [pieces[number].positions for number in numbers]
                answers.update(zip(numbers, answer.split(positions), strict=True))
                bar.advance(tokens, note=f"shard {shard + 1} of {plan.shards}")
            content = _encode(pieces, answers, settings, info.vocabulary_size, plan, shard)
            location.write(shard_name(shard), content)
            checksums[shard] = hashlib.sha256(content).hexdigest()
    return checksums


def _encode(
    pieces: Sequence[Piece],
    answers: dict[int, StoredTargets],
    settings: TargetSettings,
    vocabulary_size: int,
    plan: Plan,
    shard: int,
) -> bytes:
    from distill.targets.codec import codec_of

    codec = codec_of(settings, vocabulary_size)
    ordered = [answers[number] for number in range(len(pieces))]
    facts = {
        "plan": plan.name,
        "shard": shard,
        "stored_tokens": sum(len(answer.ids) for answer in ordered),
        "entropy": float(sum(answer.entropy.sum(dtype=np.float64) for answer in ordered)),
    }
    return shard_bytes(pieces, [codec.encode(answer) for answer in ordered], facts)


def _load_teacher(info: FolderInfo, plan: Plan) -> LiveTeacher:
    import torch

    from distill.teacher.teacher import LiveTeacher
    from mistill.pytorch.loading import load_pytorch

    dtype = getattr(torch, plan.facts["teacher"]["dtype"])
    model: Any = load_pytorch(info.path, dtype=dtype).requires_grad_(False)
    device = torch.device("cpu")
    if _device_type() == "cuda":
        device = torch.device("cuda", environment_number("LOCAL_RANK", 0))
    return LiveTeacher(model if model.device == device else model.to(device))


def _device_type() -> str:
    import torch
    from accelerate.utils import parse_flag_from_env

    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return "cpu" if on_cpu else "cuda"


def _tokens(pieces: Sequence[Piece]) -> int:
    return sum(piece.stop - piece.start for piece in pieces)


# --- the end ------------------------------------------------------------------------------------


def _end(
    location: Location,
    plan: Plan,
    checksums: dict[int, str],
    info: FolderInfo,
    settings: TargetSettings,
    workers: _Workers,
) -> None:
    """Write lineage and manifest when all shards are there, or leave it to others."""
    if workers.launched and workers.rank > 0:
        while not location.exists(MANIFEST_FILE):
            time.sleep(_LOOK_AGAIN_SECONDS)
        return
    steps = lineage_after(
        info.path,
        step="targets",
        settings=settings,
        positions=plan.facts["positions"],
    )
    while True:
        names = location.names()
        missing = [n for n in range(plan.shards) if shard_name(n) not in names]
        if not missing:
            location.write(LINEAGE_FILE, (json.dumps(steps, indent=0) + "\n").encode())
            if not finish(location, plan, info.path.name, checksums):
                raise FolderError(
                    f"a file of {location} was damaged while others were written; make the same "
                    "call again: it makes anew what is missing"
                )
            return
        if not workers.launched:
            logger.info(
                "%d of %d shards of %s are there; it is finished when the others are",
                plan.shards - len(missing),
                plan.shards,
                location,
            )
            return
        time.sleep(_LOOK_AGAIN_SECONDS)
