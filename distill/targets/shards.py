"""Pieces of text, the files that hold what a teacher says about them, and how to find it again.

A piece is the run of one document inside a block. Its key is a hash of its token ids and of which
of its positions count, so that the order of the texts, the batch size and the packing may change
after the teacher was asked. All pieces are sorted by key and dealt to files (shards) in equal
runs; what is in a shard depends on the text and the settings alone, and not on who writes it
when. A shard is one safetensors file: keys, positions, where each piece's code ends, a checksum of
each code, and the codes.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistill.errors import FolderError
from mistill.folders.folder import MANIFEST_FILE
from mistill.folders.location import Location
from mistill.folders.targets_folder import FORMAT
from mistill.text.blocks import Document, TokenBlocks
from mistill.text.vocabulary import Vocabulary

KEY_BYTES = 16

_METADATA = "mistill"
_INDEX = ("keys", "positions", "ends", "checks")


# --- pieces -------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """The run of one document inside a block.

    Attributes:
        key: Names its content.
        row: Its block.
        start: Its first column.
        stop: The column after its last.
        positions: How many of its positions count.
    """

    key: bytes
    row: int
    start: int
    stop: int
    positions: int


def find_pieces(blocks: TokenBlocks) -> list[Piece]:
    """All pieces of some blocks that have a position that counts, in row-major order.

    Args:
        blocks: Packed text.

    Returns:
        The pieces; their positions, one after the other, are the kept positions of the blocks.
    """
    kept, runs = blocks.kept, blocks.runs
    begins = runs[:, 0] * blocks.block_length + runs[:, 1]
    counts = np.add.reduceat(kept.reshape(-1), begins, dtype=np.int64)
    pieces = []
    for (row, start, stop), positions in zip(runs.tolist(), counts.tolist(), strict=True):
        if positions:
            key = piece_key(blocks.ids[row, start:stop], kept[row, start:stop])
            pieces.append(Piece(key, row, start, stop, positions))
    return pieces


def piece_key(ids: NDArray[np.int64], kept: NDArray[np.bool_]) -> bytes:
    """A name for what a piece says and which of its positions count.

    Args:
        ids: Token ids, shape (T,).
        kept: Shape (T,).

    Returns:
        16 bytes.
    """
    content = ids.astype("<u4").tobytes() + kept.astype(np.uint8).tobytes()
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def piece_document(blocks: TokenBlocks, piece: Piece) -> Document:
    """A piece as a document of its own.

    Args:
        blocks: Where it was found.
        piece: The piece.

    Returns:
        Its ids and mask.
    """
    part = (piece.row, slice(piece.start, piece.stop))
    return Document(blocks.ids[part], blocks.mask[part])


# --- the plan -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a finished folder will hold, known before the teacher is asked.

    Attributes:
        facts: Teacher, vocabulary, template, settings and sums, as JSON values.
        pieces: Different pieces, sorted by key.
        shards: How many files.
    """

    facts: Mapping[str, Any]
    pieces: Sequence[Piece]
    shards: int

    @property
    def name(self) -> str:
        """A hash of all that decides the bytes of the shards."""
        text = json.dumps(self.facts, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def run(self, shard: int) -> Sequence[Piece]:
        """The pieces of a shard.

        Args:
            shard: Its number, from 0.

        Returns:
            An equal run of the pieces.
        """
        first, last = (len(self.pieces) * place // self.shards for place in (shard, shard + 1))
        return self.pieces[first:last]


def make_plan(blocks: TokenBlocks, shard_tokens: int, facts: Mapping[str, Any]) -> Plan:
    """Deal different pieces to shards.

    Args:
        blocks: The text.
        shard_tokens: Text tokens of a shard, roughly.
        facts: What else decides the bytes.

    Returns:
        The plan.
    """
    different = {piece.key: piece for piece in find_pieces(blocks)}
    pieces = [different[key] for key in sorted(different)]
    tokens = sum(piece.stop - piece.start for piece in pieces)
    text = hashlib.blake2b(b"".join(piece.key for piece in pieces), digest_size=KEY_BYTES)
    shards = max(1, min(len(pieces), round(tokens / shard_tokens)))
    sums = {
        "format": FORMAT,
        "text": text.hexdigest(),
        "pieces": len(pieces),
        "tokens": tokens,
        "positions": sum(piece.positions for piece in pieces),
        "shards": shards,
    }
    return Plan({**sums, **facts}, pieces, shards)


def shard_name(shard: int) -> str:
    """The file of a shard.

    Args:
        shard: Its number, from 0.

    Returns:
        A file name.
    """
    return f"shard-{shard:05d}.safetensors"


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What two plans do not share, in words.

    Args:
        ours: Facts of one plan.
        theirs: Facts of another.

    Returns:
        One phrase for each difference that a user can act upon.
    """
    phrases = []
    for name in ("format", "teacher", "vocabulary", "template", "text"):
        if ours.get(name) != theirs.get(name):
            phrases.append(f"another {name}")
    mine, other = ours.get("settings") or {}, theirs.get("settings") or {}
    phrases += [
        f"{name} {other.get(name)} instead of {mine.get(name)}"
        for name in sorted(mine.keys() | other.keys())
        if mine.get(name) != other.get(name)
    ]
    return phrases


def template_digest(vocabulary: Vocabulary) -> str | None:
    """A name for a chat template.

    Args:
        vocabulary: Whose template.

    Returns:
        64 hexadecimal digits; None if it has none.
    """
    template = vocabulary.chat_template
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


# --- a shard ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardIndex:
    """Where the pieces of a shard are.

    Attributes:
        file: Its name.
        keys: Shape (P, 16), sorted.
        positions: Shape (P,).
        starts: First byte of each code in the file, shape (P,).
        ends: Byte after the last, shape (P,).
        checks: CRC-32 of each code, shape (P,).
        facts: Plan, number, and sums of the shard.
    """

    file: str
    keys: NDArray[np.uint8]
    positions: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    checks: NDArray[np.int64]
    facts: Mapping[str, Any]


def shard_bytes(pieces: Sequence[Piece], codes: Sequence[bytes], facts: Mapping[str, Any]) -> bytes:
    """A shard as a safetensors file.

    Args:
        pieces: Sorted by key.
        codes: What the teacher said of each.
        facts: What to remember of the shard, as JSON values.

    Returns:
        The bytes of the file.
    """
    from safetensors.numpy import save

    arrays: dict[str, NDArray[Any]] = {
        "keys": np.frombuffer(b"".join(p.key for p in pieces), np.uint8).reshape(-1, KEY_BYTES),
        "positions": np.array([piece.positions for piece in pieces], np.uint32),
        "ends": np.cumsum([len(code) for code in codes], dtype=np.uint64).astype(np.uint32),
        "checks": np.array([zlib.crc32(code) for code in codes], np.uint32),
    }
    digest = _index_digest(arrays, facts)
    # By this name they come last in the file, so that the index is read in one go.
    arrays["targets"] = np.frombuffer(b"".join(codes), np.uint8)
    # safetensors orders several entries at random.
    metadata = {_METADATA: json.dumps({**facts, "index": digest}, sort_keys=True)}
    return bytes(save(arrays, metadata=metadata))


def read_index(location: Location, file: str, content: bytes | None = None) -> ShardIndex:
    """Read where the pieces of a shard are, and not the codes.

    Args:
        location: The folder.
        file: Name of the shard.
        content: The whole file, if it is at hand.

    Returns:
        The index.

    Raises:
        FolderError: If the shard is missing, or damaged in what was read.
    """

    def read(start: int, stop: int) -> bytes:
        part = content[start:stop] if content is not None else location.read(file, start, stop)
        if len(part) < stop - start:
            raise ValueError("it is cut short")
        return part

    try:
        begin = 8 + int.from_bytes(read(0, 8), "little")
        if begin > 2**24:
            raise ValueError("its header is")
        header = json.loads(read(8, begin))
        facts = json.loads(header["__metadata__"][_METADATA])
        codes = header["targets"]["data_offsets"]
        head = read(begin, begin + codes[0])
        arrays = {name: _array(head, header[name]) for name in _INDEX}
        if facts.pop("index") != _index_digest(arrays, facts):
            raise ValueError("its index is")
    except (ArithmeticError, LookupError, MemoryError, RecursionError) as error:
        raise damaged(location, file) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise damaged(location, file) from error
    ends = begin + codes[0] + arrays["ends"].astype(np.int64)
    return ShardIndex(
        file,
        arrays["keys"],
        arrays["positions"].astype(np.int64),
        np.append(begin + codes[0], ends[:-1]),
        ends,
        arrays["checks"].astype(np.int64),
        facts,
    )


def check_codes(index: ShardIndex, content: bytes) -> bool:
    """Whether every code of a shard is what was written.

    Args:
        index: Of the shard.
        content: The whole file.

    Returns:
        False if the file is longer, shorter or changed.
    """
    return len(content) == int(index.ends[-1]) and all(
        zlib.crc32(content[start:end]) == check
        for start, end, check in zip(
            index.starts.tolist(), index.ends.tolist(), index.checks.tolist(), strict=True
        )
    )


def damaged(location: Location, file: str) -> FolderError:
    """The error for a shard that is not what was written.

    Args:
        location: The folder.
        file: Name of the shard.

    Returns:
        The error to raise.
    """
    return FolderError(
        f"{file} of the targets in {location} is damaged; remove it and {MANIFEST_FILE}, and make "
        "the same call of distill.cache_targets again: it makes anew what is missing"
    )


def sound_shard(location: Location, shard: int, plan: Plan) -> tuple[ShardIndex, bytes] | None:
    """A shard that is already there, whole and of the same plan.

    Args:
        location: The folder.
        shard: Its number.
        plan: What it should belong to.

    Returns:
        Its index and its bytes; None if it has yet to be made, or to be made again.
    """
    file = shard_name(shard)
    if not location.exists(file):
        return None
    content = location.read(file)
    try:
        index = read_index(location, file, content)
    except FolderError:
        return None
    expected = {"plan": plan.name, "shard": shard}
    stored = {name: index.facts.get(name) for name in expected}
    return (index, content) if stored == expected and check_codes(index, content) else None


def finish(location: Location, plan: Plan, teacher: str, checksums: Mapping[int, str]) -> bool:
    """Write the manifest, if every shard is there.

    Args:
        location: The folder.
        plan: What it should hold.
        teacher: What to call the teacher.
        checksums: Checksums of shards that were just written or checked.

    Returns:
        False if a shard is missing, or was found to be damaged.
    """
    names = set(location.names())
    if not all(shard_name(shard) in names for shard in range(plan.shards)):
        return False
    files: dict[str, dict[str, Any]] = {}
    stored, nats = 0, 0.0
    for shard in range(plan.shards):
        file = shard_name(shard)
        if shard in checksums:
            index, checksum = read_index(location, file), checksums[shard]
        else:
            sound = sound_shard(location, shard, plan)
            if sound is None:
                return False
            index, content = sound
            checksum = hashlib.sha256(content).hexdigest()
        files[file] = {"bytes": int(index.ends[-1]), "sha256": checksum}
        stored += index.facts["stored_tokens"]
        nats += index.facts["entropy"]
    facts = dict(plan.facts)
    has_entropy = facts["settings"]["method"] != "top_k"
    manifest = {
        **facts,
        "teacher": {"name": teacher, **facts["teacher"]},
        "plan": plan.name,
        "stored_tokens": stored,
        "mean_entropy": nats / facts["positions"] if has_entropy else None,
        "files": files,
    }
    location.write(MANIFEST_FILE, (json.dumps(manifest, indent=0) + "\n").encode())
    return True


def _array(head: bytes, entry: Mapping[str, Any]) -> NDArray[Any]:
    begin, end = entry["data_offsets"]
    array: NDArray[Any] = np.frombuffer(head[begin:end], {"U8": "u1", "U32": "<u4"}[entry["dtype"]])
    return array.reshape(entry["shape"])


def _index_digest(arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8)
    for name in _INDEX:
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
