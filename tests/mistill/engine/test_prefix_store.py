"""What is kept of texts that were read, and what is forgotten."""

from __future__ import annotations

import random

import numpy as np

from mistill.engine.key_value_cache import common_prefix
from mistill.engine.prefix_store import LEAST_TOKENS, PrefixStore

BYTES = 8
"""Of one position here."""


def values(ids: list[int]) -> dict[str, np.ndarray]:
    """Keys and values that tell which tokens they are of."""
    rows = np.array(ids, np.float32)[None, :, None]
    return {"0.key": rows, "0.value": -rows}


def add(store: PrefixStore, ids: list[int], owner: str = "", together: int = 0) -> None:
    store.add(owner, ids, together, values(ids))


def text(seed: int, count: int = 20) -> list[int]:
    return [1000 * seed + place for place in range(count)]


def test_the_longest_common_prefix_is_that_of_a_slow_search() -> None:
    rng = random.Random(0)
    for _ in range(200):
        store, texts = PrefixStore(10**6), []
        for _ in range(6):
            ids = [rng.randrange(2) for _ in range(rng.randrange(LEAST_TOKENS, 25))]
            owner = rng.choice("ab")
            add(store, ids, owner)
            texts.append((owner, ids))
        wanted = [rng.randrange(2) for _ in range(20)]
        match = store.longest("a", wanted)
        lengths = [common_prefix(ids, wanted) for owner, ids in texts if owner == "a"]
        assert match.positions == max(lengths, default=0)
        if match.text is not None:
            shared = match.text.values["0.key"][0, : match.positions, 0]
            assert shared.tolist() == wanted[: match.positions]
            np.testing.assert_array_equal(match.text.values["0.value"], -match.text.values["0.key"])


def test_the_least_recently_used_text_is_forgotten_first() -> None:
    store = PrefixStore(3 * 20 * BYTES)
    for seed in (1, 2, 3):
        add(store, text(seed))
    used = store.longest("", text(1)).text
    assert used is not None
    store.use(used)
    add(store, text(4))
    assert [store.longest("", text(seed)).positions for seed in (1, 2, 3, 4)] == [20, 0, 20, 20]
    assert store.size_bytes == 3 * 20 * BYTES
    store.clear()
    assert (len(store), store.size_bytes) == (0, 0)


def test_a_text_that_another_one_begins_with_is_kept_once() -> None:
    store = PrefixStore(10**6)
    add(store, text(1, 20))
    add(store, text(1, 30))
    assert len(store) == 1
    add(store, text(1, 25))
    assert len(store) == 1
    add(store, text(1, 25), owner="b")
    assert len(store) == 2
    add(store, text(1, 25), together=25)  # the longer one has nothing that was read together
    assert len(store) == 3
    assert store.longest("", text(1, 40), together=True).positions == 25
    assert store.longest("", text(1, 40)).positions == 30


def test_what_is_short_or_larger_than_the_store_is_not_kept() -> None:
    store = PrefixStore(30 * BYTES)
    add(store, text(1, LEAST_TOKENS - 1))
    add(store, text(2, 31))
    assert (len(store), store.size_bytes) == (0, 0)
    add(store, text(3, 30))
    assert (len(store), store.size_bytes) == (1, 30 * BYTES)


def test_a_stored_text_is_a_copy() -> None:
    store, ids = PrefixStore(10**6), text(1)
    arrays = values(ids)
    store.add("", ids, 0, arrays)
    arrays["0.key"][:] = 0
    ids[0] = -1
    match = store.longest("", text(1))
    assert match.text is not None
    assert match.positions == 20
    assert match.text.values["0.key"][0, :, 0].tolist() == text(1)
