"""Log-probabilities against PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mistill.engine.language_model import greedy
from mistill.engine.log_probabilities import Scored, token_score
from mistill.errors import SettingsError

LOGITS = (np.random.default_rng(0).standard_normal(300) * 5).astype(np.float32)


@pytest.mark.parametrize("shift", [0.0, 80.0, -300.0])
def test_log_probabilities_are_those_of_pytorch(shift: float) -> None:
    logits = LOGITS + np.float32(shift)
    expected = torch.from_numpy(logits.astype(np.float64)).log_softmax(0)
    score = token_score(logits, 17, top=5)
    assert score.token == 17
    assert score.log_probability == pytest.approx(expected[17].item(), abs=1e-9)
    values, ids = expected.topk(5)
    assert [token for token, _ in score.top] == ids.tolist()
    assert [value for _, value in score.top] == pytest.approx(values.tolist(), abs=1e-9)


def test_tokens_that_tie_stand_in_order_and_all_can_be_asked_for() -> None:
    logits = np.array([1, 3, 3, 2], np.float32)
    score = token_score(logits, 0, top=9)
    assert [token for token, _ in score.top] == [1, 2, 3, 0]
    assert sum(np.exp(value) for _, value in score.top) == pytest.approx(1)
    assert token_score(logits, 0).top == ()


def test_a_choice_is_watched_and_not_changed() -> None:
    scored = Scored(greedy, top=2)
    assert [scored(LOGITS), scored(-LOGITS)] == [greedy(LOGITS), greedy(-LOGITS)]
    assert [score.token for score in scored.scores] == [greedy(LOGITS), greedy(-LOGITS)]
    assert [score.top[0][0] for score in scored.scores] == [greedy(LOGITS), greedy(-LOGITS)]
    with pytest.raises(SettingsError, match="top must be 0 or more"):
        Scored(greedy, top=-1)
