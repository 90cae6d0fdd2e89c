from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.figures.passages import Passage, cut_passages, cut_prompts, fingerprint_of
from mistill.errors import TextError
from mistill.text.blocks import Document


def document(ids: Sequence[int], mask: Sequence[int] | None = None) -> Document:
    marks = [0, *[1] * (len(ids) - 1)] if mask is None else mask
    return Document(np.array(ids, np.int64), np.array(marks, bool))


def cut(
    *documents: Document, context_length: int = 100, scored_tokens: int = 1000
) -> list[Passage]:
    return cut_passages(documents, context_length=context_length, scored_tokens=scored_tokens)


def test_only_marked_tokens_are_targets_and_their_positions_are_one_before():
    (passage,) = cut(document([7, 8, 9, 10, 11], [0, 0, 1, 0, 1]))

    assert passage.targets.tolist() == [9, 11]
    assert passage.kept.tolist() == [False, True, False, True]


def test_what_follows_the_last_target_is_not_read():
    (passage,) = cut(document([7, 8, 9, 10, 11], [0, 0, 1, 0, 0]))

    assert passage.ids.tolist() == [7, 8, 9]


def test_long_documents_are_cut_and_the_first_token_of_a_piece_is_not_scored():
    passages = cut(document(range(10)), context_length=4)

    assert [passage.ids.tolist() for passage in passages] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [passage.targets.tolist() for passage in passages] == [[1, 2, 3], [5, 6, 7], [9]]


def test_pieces_without_a_target_are_left_out():
    assert len(cut(document(range(8), [0, 1, 0, 0, 1, 0, 0, 0]), context_length=4)) == 1


def test_exactly_as_many_tokens_are_scored_as_asked_for():
    passages = cut(document(range(10)), document(range(20, 30)), scored_tokens=12)

    assert [len(passage.targets) for passage in passages] == [9, 3]
    assert passages[1].ids.tolist() == [20, 21, 22, 23]


def test_text_is_read_only_as_far_as_it_is_needed():
    def endless():
        yield document(range(10))
        raise AssertionError("more was read than was asked for")

    assert len(cut_passages(endless(), context_length=100, scored_tokens=9)) == 1


@pytest.mark.parametrize(
    "documents", [(), (document([5]),), (document([5, 6, 7], [0, 0, 0]),)], ids=str
)
def test_text_with_nothing_to_predict_is_refused(documents: tuple[Document, ...]):
    with pytest.raises(TextError, match="no token to predict"):
        cut(*documents)


def test_no_two_prompts_begin_alike():
    # Every conversation begins with the same three tokens, as templates do.
    passages = cut(*(document([1, 2, 3, 10 + n, 30 + n, 50 + n]) for n in range(9)))

    prompts = cut_prompts(passages, length=6, count=8)

    assert {len(prompt) for prompt in prompts} == {6}
    assert len({prompt[0] for prompt in prompts}) == 8


def test_prompts_are_longer_than_a_short_text_by_reading_it_again():
    prompts = cut_prompts(cut(document([4, 5, 6])), length=7, count=5)

    assert prompts[0] == [4, 5, 6, 4, 5, 6, 4]
    assert all(one[0] != two[0] for one, two in itertools.pairwise(prompts))


def test_a_text_of_one_token_repeated_still_makes_prompts():
    assert cut_prompts(cut(document([4, 4, 4])), length=2, count=2) == [[4, 4], [4, 4]]


def test_the_fingerprint_changes_with_tokens_marks_and_cuts():
    texts = [
        cut(document([1, 2, 3, 4])),
        cut(document([1, 2, 3, 5])),
        cut(document([1, 2, 3, 4], [0, 0, 1, 1])),
        cut(document([1, 2, 3, 4]), context_length=2),
    ]

    assert len({fingerprint_of(text) for text in texts}) == 4
    assert fingerprint_of(cut(document([1, 2, 3, 4]))) == fingerprint_of(texts[0])
