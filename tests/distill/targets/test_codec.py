"""Targets come back from bytes as they went in, in as few bytes as are promised."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distill.settings import TargetSettings
from distill.targets.codec import (
    CodedDraws,
    PlainDraws,
    StoredTargets,
    TopKCode,
    codec_of,
    count_draws,
    id_bits,
    join,
    pack_entropy,
    read_bits,
    unpack_entropy,
    write_bits,
)
from tests.reference import targets as reference


def some_targets(positions: int, vocabulary: int, draws: int, seed: int = 0) -> StoredTargets:
    """Draws from distributions between nearly certain and nearly even."""
    generator = np.random.default_rng(seed)
    rows = []
    for row in range(positions):
        logits = generator.choice([0.1, 1, 4, 12]) * generator.normal(size=vocabulary)
        p = np.exp(logits - logits.max())
        rows.append(np.sort(generator.choice(vocabulary, draws, p=p / p.sum())))
        if row % 5 == 0:  # both ends of the vocabulary
            rows[-1][0], rows[-1][-1] = 0, vocabulary - 1
            rows[-1].sort()
    entropy = generator.uniform(0, math.log(vocabulary), positions).astype(np.float32)
    entropy[0] = 0
    return count_draws(np.array(rows, np.int64), entropy)


def slow(targets: StoredTargets) -> list[reference.Position]:
    found = []
    for part in targets.split(np.ones(len(targets), np.int64)):
        counts = dict(zip(part.ids.tolist(), part.values.tolist(), strict=True))
        found.append(reference.Position(counts, float(part.entropy[0])))
    return found


def assert_same(found: StoredTargets, given: StoredTargets, vocabulary: int) -> None:
    assert found.sizes.tolist() == given.sizes.tolist()
    assert found.ids.tolist() == given.ids.tolist()
    assert found.values.tolist() == given.values.tolist()
    highest = math.log(vocabulary)
    np.testing.assert_allclose(found.entropy, given.entropy, rtol=0, atol=highest / 65535)


@pytest.mark.parametrize("draws", [1, 2, 50, 255])
@pytest.mark.parametrize("vocabulary", [2, 3, 300, 32_000, 131_072])
@pytest.mark.parametrize("kind", [PlainDraws, CodedDraws])
def test_draws_come_back_as_they_went_in(
    kind: type[PlainDraws] | type[CodedDraws], vocabulary: int, draws: int
) -> None:
    codec = kind(vocabulary, draws)
    for positions in (1, 7, 40):
        given = some_targets(positions, vocabulary, draws)
        assert_same(codec.decode(codec.encode(given), positions), given, vocabulary)


def test_counting_keeps_every_draw() -> None:
    draws = np.array([[3, 3, 3, 9], [0, 1, 2, 3], [7, 7, 7, 7]])
    told = count_draws(draws, np.zeros(3, np.float32))
    assert told.sizes.tolist() == [2, 4, 1]
    assert told.ids.tolist() == [3, 9, 0, 1, 2, 3, 7]
    assert told.values.tolist() == [3, 1, 1, 1, 1, 1, 4]
    ids, counts = told.padded()
    assert ids.tolist() == [[3, 9, 0, 0], [0, 1, 2, 3], [7, 0, 0, 0]]
    assert counts.tolist() == [[3, 1, 0, 0], [1, 1, 1, 1], [4, 0, 0, 0]]


def test_plain_bytes_are_those_of_the_slow_writer() -> None:
    given = some_targets(13, 300, 50)
    assert PlainDraws(300, 50).encode(given) == reference.plain_code(slow(given), 300)


def test_coded_bytes_mean_the_same_to_the_slow_reader() -> None:
    given = some_targets(13, 300, 50)
    found = reference.read_coded(CodedDraws(300, 50).encode(given), 13, 300, 50)
    for told, expected in zip(found, slow(given), strict=True):
        assert told.counts == expected.counts
        assert told.entropy == pytest.approx(expected.entropy, abs=math.log(300) / 65535)


def test_a_position_takes_the_bytes_that_are_promised() -> None:
    # 8 positions of 12 different tokens: 50 bits, 12 times 15 bits and 2 bytes each
    draws = np.sort(np.arange(50) % 12)[None].repeat(8, axis=0)
    given = count_draws(draws, np.ones(8, np.float32))
    assert len(PlainDraws(32_000, 50).encode(given)) == 8 * (50 + 12 * 15 + 16) // 8


def test_the_coded_form_is_a_quarter_smaller() -> None:
    rows = []
    for seed in range(400):
        p = reference.zipf(32_000, seed)
        heights = (np.random.default_rng(seed).random() + np.arange(50)) / 50
        rows.append(np.minimum(np.searchsorted(p.cumsum(), heights, side="right"), 31_999))
    given = count_draws(np.array(rows), np.full(400, 2.0, np.float32))
    sizes = [len(kind(32_000, 50).encode(given)) for kind in (PlainDraws, CodedDraws)]
    assert sizes[1] < 0.78 * sizes[0]


def test_the_most_probable_tokens_keep_eleven_bits_of_their_probabilities() -> None:
    generator = np.random.default_rng(0)
    p = np.sort(generator.dirichlet(np.full(500, 0.05), 20).astype(np.float32), axis=1)[:, ::-1]
    ids = np.stack([generator.permutation(500)[:12] for _ in range(20)])
    given = StoredTargets(
        np.full(20, 12), ids.reshape(-1), p[:, :12].reshape(-1), np.zeros(20, np.float32)
    )
    codec = codec_of(TargetSettings(method="top_k", top_k=12), 500)
    assert codec == TopKCode(500, 12)
    code = codec.encode(given)
    assert len(code) == 20 * 12 * 2 + 20 * 12 * 9 // 8
    found = codec.decode(code, 20)
    assert found.ids.tolist() == given.ids.tolist()
    np.testing.assert_allclose(found.values, given.values, rtol=2**-11, atol=2**-25)


def test_ids_have_as_many_bits_as_the_vocabulary_needs() -> None:
    sizes = {2: 1, 3: 2, 32_000: 15, 32_768: 15, 32_769: 16, 49_152: 16, 128_256: 17}
    assert {size: id_bits(size) for size in sizes} == sizes


def test_bits_of_any_width_come_back() -> None:
    generator = np.random.default_rng(0)
    widths = generator.integers(0, 25, 500)
    values = generator.integers(0, 2**24, 500) & ((1 << widths) - 1)
    code = np.frombuffer(write_bits(values, widths), np.uint8)
    assert len(code) == -(-widths.sum() // 8)
    assert read_bits(code, widths).tolist() == values.tolist()
    # what follows does not matter
    assert read_bits(np.append(code, [255, 255]), widths).tolist() == values.tolist()


def test_entropies_are_off_by_a_step_at_most_and_not_on_average() -> None:
    entropy = np.linspace(0, math.log(32_000), 100_001, dtype=np.float32)
    found = unpack_entropy(pack_entropy(entropy, 32_000), 32_000).astype(np.float64)
    assert np.abs(found - entropy).max() < 1.01 * math.log(32_000) / 65_535
    assert np.abs((found - entropy).mean()) < 1e-6
    assert pack_entropy(np.array([0, 99], np.float32), 32_000).tolist() == [0, 65_535]


def test_pieces_are_cut_and_joined() -> None:
    given = some_targets(10, 300, 50)
    parts = given.split([3, 1, 6])
    assert [len(part) for part in parts] == [3, 1, 6]
    assert parts[1].ids.tolist() == given.ids[given.sizes[:3].sum() :][: given.sizes[3]].tolist()
    assert_same(join(parts), given, 300)
