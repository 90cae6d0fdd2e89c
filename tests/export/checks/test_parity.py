"""The figures by which a graph is judged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from export.checks.parity import Parity, mean_kl, require_parity
from mistill.errors import ExportError

GOOD = Parity(
    positions=48,
    max_difference=1e-4,
    mean_kl=1e-3,
    same_top=1.0,
    pieces_difference=1e-4,
    max_rounding=0.005,
)


def test_kl_is_that_of_torch_averaged_over_positions() -> None:
    generator = np.random.default_rng(0)
    reference, logits = 3 * generator.standard_normal((2, 7, 50)).astype(np.float32)
    expected = kl_divergence(
        Categorical(logits=torch.from_numpy(reference)),
        Categorical(logits=torch.from_numpy(logits)),
    ).mean()
    assert mean_kl(reference, logits) == pytest.approx(float(expected), rel=1e-4)
    assert mean_kl(reference, reference + 5) == pytest.approx(0, abs=1e-6)


def test_kl_of_certain_predictions_is_finite() -> None:
    reference = np.array([[0.0, -1e4]], np.float32)
    assert mean_kl(reference, np.array([[0.0, 0.0]], np.float32)) == pytest.approx(np.log(2))


@pytest.mark.parametrize(
    ("change", "exact"),
    [
        ({"max_difference": 0.0011}, True),
        ({"pieces_difference": 0.0011}, True),
        ({"mean_kl": 0.021}, False),
        ({"max_rounding": 0.021}, False),
        ({"max_rounding": 0.021}, True),
    ],
    ids=str,
)
def test_what_is_too_far_is_refused(change: dict[str, Any], exact: bool) -> None:
    require_parity(GOOD, exact=exact, bits=8)
    with pytest.raises(ExportError):
        require_parity(replace(GOOD, **change), exact=exact, bits=8)


def test_rounded_activations_are_judged_by_kl_alone() -> None:
    far = replace(GOOD, max_difference=2.0, pieces_difference=1.0)
    require_parity(far, exact=False, bits=8)
    require_parity(replace(GOOD, mean_kl=0.5), exact=True, bits=32)


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ExportError):
        require_parity(replace(GOOD, mean_kl=float("nan")), exact=False, bits=8)
    with pytest.raises(ExportError):
        require_parity(replace(GOOD, max_difference=float("nan")), exact=True, bits=32)
