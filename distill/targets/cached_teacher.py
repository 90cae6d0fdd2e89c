"""A teacher that is not there: what it said is read from a folder of targets.

What a batch needs is found by the keys of its pieces, read, checked and decoded in a thread of
its own while the batch before it is trained on.

N is kept positions, K different tokens of a position, V vocabulary.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.settings import TargetSettings
from distill.targets.codec import StoredTargets, codec_of, join
from distill.targets.shards import (
    Piece,
    ShardIndex,
    damaged,
    find_pieces,
    read_index,
    template_digest,
)
from mistill.errors import SettingsError, TextError, VocabularyError
from mistill.folders.location import Location, location_of
from mistill.folders.targets_folder import read_manifest
from mistill.loss.targets import SampledTargets, TopKTargets
from mistill.settings import typed_options
from mistill.text.vocabulary import load_vocabulary, same_vocabulary

if TYPE_CHECKING:
    from mistill.loss.batches import Batch
    from mistill.text.blocks import TokenBlocks
    from mistill.text.vocabulary import Vocabulary

# Batches that are kept ready; what else is expected waits until one of them is asked for.
_MOST_READY = 16

_Arrays = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]


class CachedTeacher:
    """A ``distill.teacher.teacher.Teacher`` that reads what ``distill.cache_targets`` has written.

    ``open_targets`` is the way to get one.

    Attributes:
        fingerprint: A short name for the content of the folder, for the key of a resumable run.
        teacher: What is known of the model that spoke: ``name``, ``fingerprint``, ``form``,
            ``dtype``.
        temperature: At which the targets were drawn.
        block_length: At which long documents were cut.
        method: ``systematic``, ``multinomial`` or ``top_k``.
        positions: Kept positions in the folder.
    """

    fingerprint: str
    teacher: dict[str, str]
    temperature: float
    block_length: int
    method: str
    positions: int

    def __init__(
        self, location: Location, manifest: Mapping[str, Any], shards: Sequence[ShardIndex]
    ) -> None:
        """Prepare to read; nothing is read yet.

        Args:
            location: The folder.
            manifest: Its manifest.
            shards: Where the pieces are.
        """
        names = {field.name for field in fields(TargetSettings)}
        options = {name: value for name, value in manifest["settings"].items() if name in names}
        settings = TargetSettings(**typed_options(TargetSettings, options))
        text = "".join(entry["sha256"] for entry in manifest["files"].values())
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.teacher = dict(manifest["teacher"])
        self.temperature = settings.temperature
        self.block_length = settings.block_length
        self.method = settings.method
        self.positions = int(manifest["positions"])
        self._location = location
        self._draws = settings.draws
        self._vocabulary_size = int(manifest["vocabulary"]["size"])
        self._codec = codec_of(settings, self._vocabulary_size)
        self._files = [shard.file for shard in shards]
        self._shard_of = np.repeat(np.arange(len(shards)), [len(shard.keys) for shard in shards])
        self._keys = _sortable(np.concatenate([shard.keys for shard in shards]))
        self._sizes = np.concatenate([shard.positions for shard in shards])
        self._starts = np.concatenate([shard.starts for shard in shards])
        self._ends = np.concatenate([shard.ends for shard in shards])
        self._checks = np.concatenate([shard.checks for shard in shards])
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="targets")
        self._waiting: OrderedDict[bytes, TokenBlocks] = OrderedDict()
        self._ready: OrderedDict[bytes, Future[_Arrays]] = OrderedDict()

    def targets(self, blocks: TokenBlocks, batch: Batch) -> SampledTargets | TopKTargets:
        """What the teacher said about some blocks; see ``Teacher.targets``."""
        name = _name(blocks)
        ready = self._ready.pop(name, None)
        if ready is None:
            self._waiting.pop(name, None)
            if self._ready:
                # Answers are asked for in the order of the announcements: this one was not.
                self._ready.popitem(last=False)[1].cancel()
        self._read_ahead()
        arrays = self._fetch(blocks) if ready is None else ready.result()
        ids, values, entropy = (_to_device(array, batch.ids.device) for array in arrays)
        if self.method == "top_k":
            return TopKTargets(ids, values, self._vocabulary_size, self.temperature)
        return SampledTargets(ids, values, entropy, self._vocabulary_size, self.temperature)

    def expect(self, blocks: TokenBlocks) -> None:
        """Begin to read what will be asked for next, in another thread; see ``Teacher.expect``."""
        name = _name(blocks)
        if name not in self._ready:
            self._waiting.setdefault(name, blocks)
            self._read_ahead()

    def _read_ahead(self) -> None:
        while self._waiting and len(self._ready) < _MOST_READY:
            name, blocks = self._waiting.popitem(last=False)
            self._ready[name] = self._thread.submit(self._fetch, blocks)

    def require(self, blocks: TokenBlocks, name: str = "texts") -> None:
        """Refuse text about which the teacher was not asked.

        Args:
            blocks: All blocks that will be asked for.
            name: What to call them in a message.

        Raises:
            TextError: If a piece of them is not in the folder.
        """
        pieces = find_pieces(blocks)
        self._places(pieces, name, blocks.block_length)

    def close(self) -> None:
        """Stop reading ahead."""
        self._waiting.clear()
        self._ready.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _places(self, pieces: Sequence[Piece], name: str, block_length: int) -> NDArray[np.int64]:
        """Where each piece is among all that are stored."""
        keys = np.frombuffer(b"".join(piece.key for piece in pieces), np.uint8)
        piece_keys = _sortable(keys.reshape(len(pieces), -1))
        places = np.searchsorted(self._keys, piece_keys)
        is_stored = self._keys[np.minimum(places, len(self._keys) - 1)] == piece_keys
        missing = int((~is_stored).sum())
        if missing:
            first = pieces[int(np.argmin(is_stored))]
            hint = ""
            if block_length != self.block_length:
                hint = (
                    f"; the teacher read blocks of {self.block_length} and these have "
                    f"{block_length}, and long documents were cut elsewhere"
                )
            raise TextError(
                f"{missing} of {len(pieces)} pieces of the {name} are not in the targets in "
                f"{self._location}, the first of them {first.stop - first.start} tokens of block "
                f"{first.row}{hint}; cache the targets of the same texts"
            )
        return places

    def _fetch(self, blocks: TokenBlocks) -> _Arrays:
        """Find, read, check and decode what some blocks need."""
        pieces = find_pieces(blocks)
        if not pieces:
            return np.zeros((0, 1), np.int64), np.zeros((0, 1), np.float32), np.zeros(0, np.float32)
        places = self._places(pieces, "blocks", blocks.block_length)
        files = [self._files[shard] for shard in self._shard_of[places]]
        starts, ends = self._starts[places].tolist(), self._ends[places].tolist()
        codes = self._location.read_parts(list(zip(files, starts, ends, strict=True)))
        answers: list[StoredTargets] = []
        for code, file, place in zip(codes, files, places.tolist(), strict=True):
            if zlib.crc32(code) != self._checks[place]:
                raise damaged(self._location, file)
            answers.append(self._codec.decode(code, int(self._sizes[place])))
        stored = join(answers)
        ids, values = stored.padded()
        if self.method != "top_k":
            values /= np.float32(self._draws)
        return ids, values, stored.entropy


def open_targets(
    path: str | Path,
    vocabulary: Vocabulary,
    *,
    temperature: float = 1.0,
    texts: Iterable[tuple[str, TokenBlocks]] = (),
) -> CachedTeacher:
    """Open a finished folder of targets for a student, or say why they do not fit together.

    Loads no weights; call it before anything large is read.

    Args:
        path: A folder of targets, on any location that fsspec knows.
        vocabulary: The student's.
        temperature: At which the student will be trained.
        texts: Blocks that will be asked for, by what to call them in a message, such as
            ``("texts", training), ("held_out", judged)``.

    Returns:
        The teacher, to be given to the trainer.

    Raises:
        FolderError: If the folder is missing, unfinished or damaged.
        VocabularyError: If the student has other tokens or another chat template.
        SettingsError: If the targets were drawn at another temperature.
        TextError: If a piece of the text is not in the folder.
    """
    location = location_of(path)
    manifest = read_manifest(location)
    _refuse_vocabulary(location, manifest, vocabulary)
    drawn_at = manifest["settings"]["temperature"]
    if temperature != drawn_at:
        raise SettingsError(
            f"the targets in {location} were cached at temperature {drawn_at:g} and not "
            f"{temperature:g}; train at {drawn_at:g} or cache them again"
        )
    teacher = CachedTeacher(location, manifest, _read_shards(location, manifest))
    for name, blocks in texts:
        teacher.require(blocks, name)
    return teacher


def _refuse_vocabulary(
    location: Location, manifest: Mapping[str, Any], vocabulary: Vocabulary
) -> None:
    stored, name = manifest["vocabulary"], manifest["teacher"]["name"]
    ours = {"size": vocabulary.size, "fingerprint": vocabulary.fingerprint()}
    if ours != stored:
        difference = _what_differs(location, vocabulary)
        if not difference:
            difference = f"{vocabulary.size} rows against {stored['size']}"
            if vocabulary.size == stored["size"]:
                difference = "ids stand for different tokens"
        raise VocabularyError(
            f"the student and the targets in {location}, from {name}, have different "
            f"vocabularies: {difference}; cache the targets of a teacher with the student's tokens"
        )
    if template_digest(vocabulary) != manifest["template"]:
        raise VocabularyError(
            f"the student's chat template is not that of {name}, with which the targets in "
            f"{location} were cached: conversations would be other tokens; copy "
            "chat_template.jinja from one to the other"
        )


def _what_differs(location: Location, vocabulary: Vocabulary) -> str:
    """How the tokens differ, where the teacher is still at hand; else nothing."""
    if location.remote is not None:
        return ""
    from mistill.folders.lineage import find_source, read_lineage

    steps = read_lineage(location.path)
    source = find_source(Path(location.path), steps[-1]) if steps else None
    if source is None or not (source / "tokenizer.json").is_file():
        return ""
    return "; ".join(same_vocabulary(vocabulary, load_vocabulary(source)))


def _read_shards(location: Location, manifest: Mapping[str, Any]) -> list[ShardIndex]:
    shards: list[ShardIndex] = []
    for number, (file, entry) in enumerate(manifest["files"].items()):
        if location.size(file) != entry["bytes"]:
            raise damaged(location, file)
        shard = read_index(location, file)
        if shard.facts["shard"] != number or shard.facts["plan"] != manifest["plan"]:
            raise damaged(location, file)
        shards.append(shard)
    return shards


def _sortable(keys: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Keys of shape (P, 16) as P values in the order of their bytes."""
    return np.ascontiguousarray(keys).view(f"S{keys.shape[1]}").reshape(-1)


def _name(blocks: TokenBlocks) -> bytes:
    """What tells a batch of blocks from another."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (blocks.ids, blocks.mask, blocks.documents):
        digest.update(np.ascontiguousarray(part).data)
    return digest.digest()


def _to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
