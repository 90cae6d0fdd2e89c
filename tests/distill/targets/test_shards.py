"""Pieces are found by what they say, and a damaged file is known for one."""

from __future__ import annotations

import numpy as np
import pytest

from distill.targets.shards import (
    Piece,
    check_codes,
    differences,
    find_pieces,
    make_plan,
    piece_document,
    read_index,
    shard_bytes,
    shard_name,
)
from mistill.errors import FolderError
from mistill.folders.location import Location
from mistill.text.blocks import Document, TokenBlocks, pack
from tests.reference import targets as reference

NOWHERE = Location("nowhere", "/nowhere")


def documents(count: int = 30, seed: int = 0) -> list[Document]:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 90, count)
    return [
        Document(generator.integers(0, 300, size), generator.random(size) < 0.6) for size in sizes
    ]


def test_pieces_are_the_runs_of_one_document_that_hold_a_position_that_counts() -> None:
    blocks = pack(documents(), 32)
    found = find_pieces(blocks)
    assert [piece[1:] for piece in found] == reference.pieces(blocks)
    assert sum(piece.positions for piece in found) == blocks.kept.sum()
    assert any(len(np.unique(row)) > 2 for row in blocks.documents)


def test_a_key_outlives_another_order_another_packing_and_a_longer_block() -> None:
    texts = [document for document in documents() if len(document.ids) <= 32]
    keys = {piece.key for piece in find_pieces(pack(texts, 32))}
    again = {piece.key for piece in find_pieces(pack(texts[::-1], 64))}
    assert keys == again
    assert len(keys) > 5


@pytest.mark.parametrize("change", ["token", "mask", "length"])
def test_a_key_tells_what_is_said_and_what_counts(change: str) -> None:
    ids, mask = np.arange(10), np.ones(10, bool)
    (before,) = find_pieces(pack([Document(ids, mask)], 16))
    if change == "token":
        ids = np.where(ids == 5, 11, ids)
    elif change == "mask":
        mask = ids != 5
    else:
        ids, mask = ids[:-1], mask[:-1]
    (after,) = find_pieces(pack([Document(ids, mask)], 16))
    assert before.key != after.key


def test_a_piece_read_alone_has_the_same_key() -> None:
    blocks = pack(documents(), 32)
    for piece in find_pieces(blocks):
        (alone,) = find_pieces(pack([piece_document(blocks, piece)], 32))
        assert (alone.key, alone.positions) == (piece.key, piece.positions)


def test_shards_are_equal_runs_of_all_different_pieces_in_the_order_of_their_keys() -> None:
    texts = documents()
    plan = make_plan(pack([*texts, *texts[:7]], 32), 200, {})
    alone = make_plan(pack(texts[::-1], 32), 200, {})
    keys = [piece.key for piece in plan.pieces]
    assert keys == sorted({piece.key for piece in find_pieces(pack(texts, 32))})
    runs = [plan.run(shard) for shard in range(plan.shards)]
    assert [piece.key for run in runs for piece in run] == keys
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
    assert plan.shards > 3
    assert (alone.name, alone.facts) == (plan.name, plan.facts)


def test_plans_differ_by_name() -> None:
    ours = {"teacher": {"fingerprint": "a"}, "settings": {"seed": 0, "draws": 50}, "text": "x"}
    theirs = {"teacher": {"fingerprint": "b"}, "settings": {"seed": 0, "draws": 9}, "text": "x"}
    assert differences(ours, theirs) == ["another teacher", "draws 9 instead of 50"]


def a_shard() -> tuple[list[Piece], list[bytes], bytes]:
    generator = np.random.default_rng(0)
    pieces = sorted(find_pieces(pack(documents(6), 32)))
    codes = [generator.bytes(5 * piece.positions) for piece in pieces]
    facts = {"plan": "p", "shard": 3, "stored_tokens": 9, "entropy": 0.5}
    return pieces, codes, shard_bytes(pieces, codes, facts)


def test_a_shard_says_where_every_piece_is() -> None:
    pieces, codes, content = a_shard()
    index = read_index(NOWHERE, shard_name(3), content)
    assert index.keys.tobytes() == b"".join(piece.key for piece in pieces)
    assert index.positions.tolist() == [piece.positions for piece in pieces]
    places = zip(index.starts.tolist(), index.ends.tolist(), strict=True)
    assert [content[start:end] for start, end in places] == codes
    assert index.facts == {"plan": "p", "shard": 3, "stored_tokens": 9, "entropy": 0.5}
    assert check_codes(index, content)
    assert a_shard()[2] == content


def test_a_shard_is_a_safetensors_file() -> None:
    from safetensors.numpy import load

    arrays = load(a_shard()[2])
    assert sorted(arrays) == ["checks", "ends", "keys", "positions", "targets"]


def test_a_changed_byte_anywhere_is_noticed() -> None:
    _, _, content = a_shard()
    whole = read_index(NOWHERE, "shard", content)
    missed = []
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x10
        try:
            index = read_index(NOWHERE, "shard", bytes(changed))
        except FolderError:
            continue
        if check_codes(index, bytes(changed)):
            missed.append(place)
            assert (index.keys == whole.keys).all()
    # What remains are spaces between the words of the header, which mean nothing.
    assert len(missed) <= 16


@pytest.mark.parametrize("length", [0, 5, 100, 300, -1])
def test_a_shard_that_is_cut_short_is_noticed(length: int) -> None:
    content = a_shard()[2][:length]
    if length == -1:
        assert not check_codes(read_index(NOWHERE, "shard", content), content)
        return
    with pytest.raises(FolderError, match="shard of the targets in nowhere is damaged"):
        read_index(NOWHERE, "shard", content)


def test_padding_is_no_piece() -> None:
    blocks = TokenBlocks(
        np.zeros((1, 4), np.int64), np.ones((1, 4), bool), np.full((1, 4), -1, np.int32)
    )
    assert find_pieces(blocks) == []
