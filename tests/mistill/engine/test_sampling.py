"""The sampler against the definitions written out, and against transformers."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mistill.engine.sampling import (
    DRY_BASE,
    FOR_SMALL_MODELS,
    Candidates,
    ChangedLogits,
    ChosenSampling,
    Sampler,
    SamplingSettings,
    above_top_k,
    above_top_p,
    accept_or_redraw,
    candidates,
    draw,
    own_sampling,
    penalize_repetition,
    penalize_runs,
)
from mistill.errors import FolderError, SettingsError
from tests.reference import sampling as slow

V = 300
SEEN = [3, 8, 21, 150, 299]
GRID: list[dict[str, Any]] = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature, top_k, top_p, min_p in product(
        (0.3, 1.0, 2.5), (0, 1, 7, 400), (0.2, 0.9, 1.0), (0.0, 0.1, 1.0)
    )
]


def some_logits(seed: int = 0, size: int = V) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=size) * 3).astype(np.float32)


def dense(
    logits: NDArray[np.float32], penalty: float = 1.0, seen: list[int] | None = None, **options: Any
) -> NDArray[np.float64]:
    """Our distribution, spread over the whole vocabulary."""
    settings = SamplingSettings(repetition_penalty=penalty, **options)
    if penalty != 1:
        logits = penalize_repetition(logits, np.array(seen), penalty)
    ids, probabilities = candidates(logits, settings)
    spread = np.zeros(logits.size)
    spread[ids] = probabilities
    return spread


def of_transformers(
    logits: NDArray[np.float32], penalty: float, seen: list[int], options: dict[str, Any]
) -> NDArray[np.float64]:
    steps: list[Any] = [
        RepetitionPenaltyLogitsProcessor(penalty),
        TemperatureLogitsWarper(options["temperature"]),
    ]
    if options["top_k"]:
        steps.append(TopKLogitsWarper(options["top_k"]))
    if options["top_p"] < 1:
        steps.append(TopPLogitsWarper(options["top_p"]))
    steps.append(MinPLogitsWarper(options["min_p"]))
    processors: Any = LogitsProcessorList(steps)
    scores = processors(torch.tensor([seen]), torch.from_numpy(logits.copy())[None])
    return torch.softmax(scores[0].double(), dim=-1).numpy()


@pytest.mark.parametrize("options", GRID, ids=str)
def test_the_distribution_is_the_one_of_the_definitions(options: dict[str, Any]) -> None:
    logits = some_logits()
    for penalty in (1.0, 1.3, 0.7):
        ours = dense(logits, penalty, SEEN, **options)
        by_hand = slow.distribution(
            logits.tolist(), repetition_penalty=penalty, seen=SEEN, **options
        )
        # Logits are float32 in one and Python floats in the other: 1e-7 of numbers up to 40.
        np.testing.assert_allclose(ours, by_hand, atol=2e-6)


@pytest.mark.parametrize("options", GRID, ids=str)
def test_the_distribution_is_the_one_of_transformers(options: dict[str, Any]) -> None:
    logits = some_logits(1)
    for penalty in (1.0, 1.3):
        ours = dense(logits, penalty, SEEN, **options)
        theirs = of_transformers(logits, penalty, SEEN, options)
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_logits_that_tie_at_the_edge_of_top_k_are_all_kept_as_in_transformers() -> None:
    logits = np.array([1, 5, 3, 3, 3, 0], np.float32)
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 2, "top_p": 1.0, "min_p": 0.0}
    ours = dense(logits, **options)
    assert np.flatnonzero(ours).tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(ours, of_transformers(logits, 1.0, [0], options), atol=1e-7)


def test_top_p_needs_no_sort_of_the_vocabulary_and_finds_the_same_tokens() -> None:
    """A flat distribution reaches far beyond the first tokens that are looked at."""
    for seed, spread in ((0, 0.01), (1, 1.0), (2, 6.0)):
        generator = np.random.default_rng(seed)
        odds = np.exp(generator.normal(size=30_000) * spread)
        probabilities = odds / odds.sum()
        order = np.argsort(-probabilities)
        reached = np.cumsum(probabilities[order])
        for p in (0.001, 0.5, 0.97, 1.0):
            expected = order[: int((reached < p).sum()) + 1]
            assert above_top_p(probabilities, p).tolist() == expected.tolist()


def test_temperature_zero_takes_the_most_probable_token() -> None:
    choose = Sampler(SamplingSettings(temperature=0))
    for seed in range(20):
        logits = some_logits(seed)
        assert choose(logits) == logits.argmax()


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    logits = some_logits() * 1000
    for smallest in (1e-3, 1e-30):
        spread = dense(logits, temperature=smallest, top_k=0, top_p=1.0, min_p=0.0)
        assert spread[logits.argmax()] == 1.0


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = some_logits()
    allowed = [5, 17, 203]
    masked = np.full(V, -np.inf, np.float32)
    masked[allowed] = logits[allowed]
    for options in GRID[:12]:
        choose = Sampler(SamplingSettings(seed=0, **options))
        assert {choose(masked) for _ in range(30)} <= set(allowed)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits = some_logits(4, 12)
    settings = SamplingSettings(temperature=1.5, top_k=8, top_p=0.95, min_p=0.02)
    expected = np.array(
        slow.distribution(logits.tolist(), temperature=1.5, top_k=8, top_p=0.95, min_p=0.02)
    )
    generator = np.random.default_rng(0)
    among = candidates(logits, settings)
    draws = 20_000
    counts = np.bincount([draw(among, generator) for _ in range(draws)], minlength=12)
    # Five standard deviations of a binomial count.
    assert np.all(np.abs(counts - draws * expected) <= 5 * np.sqrt(draws * expected) + 1e-9)
    assert counts[expected == 0].sum() == 0


def test_the_ends_of_the_random_numbers_stay_within_the_candidates() -> None:
    class Fixed:
        def __init__(self, value: float) -> None:
            self.value = value

        def random(self) -> float:
            return self.value

    among = candidates(some_logits(), SamplingSettings(top_k=5, top_p=1.0, min_p=0.0))
    assert draw(among, Fixed(0.0)) == among.ids[0]  # type: ignore[arg-type]
    assert draw(among, Fixed(np.nextafter(1, 0))) == among.ids[-1]  # type: ignore[arg-type]
    barred = np.array([-np.inf, 1.0, -np.inf], np.float32)
    among = candidates(barred, SamplingSettings(top_k=0, top_p=1.0, min_p=0.0))
    assert draw(among, Fixed(0.0)) == 1  # type: ignore[arg-type]
    assert draw(among, Fixed(np.nextafter(1, 0))) == 1  # type: ignore[arg-type]


def test_a_seed_repeats_a_reply_and_another_seed_does_not() -> None:
    logits = [some_logits(step) for step in range(40)]

    def reply(seed: int | None) -> list[int]:
        choose = Sampler(SamplingSettings(temperature=1.5, top_k=0, top_p=1, min_p=0, seed=seed))
        return [choose(step) for step in logits]

    assert reply(7) == reply(7)
    assert reply(7) != reply(8)
    assert reply(None) != reply(None)


def test_the_penalty_counts_the_prompt_and_what_the_sampler_chose_itself() -> None:
    logits = np.array([4.0, 3.9, 3.8, -1.0], np.float32)
    choose = Sampler(SamplingSettings(temperature=0, repetition_penalty=1.5), seen=[1])
    assert [choose(logits) for _ in range(4)] == [0, 2, 0, 0]
    assert choose(np.array([-1.0, -1.2, -1.3, -1.4], np.float32)) == 3
    plain = Sampler(SamplingSettings(temperature=0), seen=[0])
    assert [plain(logits) for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("seed", range(30))
def test_a_run_that_was_written_before_costs_what_its_definition_says(seed: int) -> None:
    generator = np.random.default_rng(seed)
    written = generator.integers(0, generator.integers(1, 5), generator.integers(0, 38))
    allowed = int(generator.integers(1, 5))
    logits = some_logits(seed)
    logits[1] = -np.inf
    expected = logits.astype(np.float64)
    for token, penalty in slow.dry_penalties(written.tolist(), 0.8, DRY_BASE, allowed).items():
        expected[token] -= penalty
    ours = penalize_runs(logits, written, 0.8, allowed)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_run_longer_than_forty_tokens_costs_no_more() -> None:
    logits = np.zeros(2, np.float32)
    long, longer = (penalize_runs(logits, np.zeros(n, np.int64), 0.8, 2)[0] for n in (41, 400))
    assert long == longer == np.float32(-0.8 * DRY_BASE**38)


def test_dry_counts_what_the_sampler_chose_and_not_the_prompt() -> None:
    wishes = np.array([[3.0, 2, 0, 0], [0, 3, 2, 0], [0, 0, 3, 2]], np.float32)

    def reply(**options: Any) -> list[int]:
        sampler = Sampler(SamplingSettings(temperature=0, **options), seen=[0, 1, 2] * 5)
        return [sampler(wishes[number % 3]) for number in range(9)]

    assert reply() == [0, 1, 2] * 3
    # The fifth token is the first that would be the third of a run.
    assert reply(dry_multiplier=2) == [0, 1, 2, 0, 1, 3, 0, 1, 2]
    assert reply(dry_multiplier=2, dry_allowed_length=4) == [0, 1, 2, 0, 1, 2, 0, 2, 2]


def test_the_sampler_leaves_the_logits_as_they_are() -> None:
    logits = some_logits()
    before = logits.copy()
    settings = SamplingSettings(repetition_penalty=1.2, dry_multiplier=1, top_k=1, seed=0)
    choose = Sampler(settings, seen=range(V))
    for _ in range(5):
        choose(logits)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("dry_multiplier", -1.0),
        ("dry_multiplier", float("inf")),
        ("dry_allowed_length", 0),
        ("seed", -3),
    ],
)
def test_settings_out_of_range_are_refused_by_name(option: str, value: float) -> None:
    with pytest.raises(SettingsError, match=option):
        SamplingSettings(**{option: value})  # type: ignore[arg-type]


# --- tokens that another model has drawn ----------------------------------------------------------


@pytest.mark.parametrize(
    "theirs",
    [
        {1: 0.5, 2: 0.3, 9: 0.2},
        {1: 0.05, 4: 0.15, 7: 0.8},
        {8: 1.0},
        {1: 0.1, 4: 0.2, 7: 0.3, 9: 0.4},
    ],
    ids=["some shared", "other odds", "nothing shared", "the same"],
)
def test_a_token_drawn_by_others_becomes_one_of_ours(theirs: dict[int, float]) -> None:
    p = {1: 0.1, 4: 0.2, 7: 0.3, 9: 0.4}
    ours, others = (
        Candidates(np.array(list(odds)), np.array(list(odds.values()))) for odds in (p, theirs)
    )
    generator = np.random.default_rng(0)
    draws = 20_000
    kept = 0
    counts = dict.fromkeys(p, 0)
    for _ in range(draws):
        token = draw(others, generator)
        result = accept_or_redraw(ours, token, others, generator)
        counts[result] += 1
        kept += result == token
    statistic = sum((counts[token] - draws * p[token]) ** 2 / (draws * p[token]) for token in p)
    assert statistic < 16.27  # chi-square with 3 degrees of freedom: one of a thousand
    # A token stays as often as the two distributions overlap.
    overlap = sum(min(p.get(token, 0), odds) for token, odds in theirs.items())
    assert kept / draws == pytest.approx(overlap, abs=4 * 0.5 / draws**0.5)


def test_a_judged_token_counts_as_seen() -> None:
    logits = np.zeros(5, np.float32)
    settings = SamplingSettings(
        temperature=1, top_k=0, top_p=1, min_p=0, repetition_penalty=1e6, seed=0
    )
    sampler = Sampler(settings)
    logits[3] = 40
    theirs = Candidates(np.array([3]), np.ones(1))
    assert sampler.accept_or_replace(logits, 3, theirs) == 3
    assert sampler.distribution(logits).probabilities == pytest.approx(np.full(5, 0.2), abs=1e-3)


def test_a_token_without_probability_is_never_drawn() -> None:
    class AtTheEnd:
        def random(self) -> float:
            return 1.0

    among = Candidates(np.array([5, 6, 7]), np.array([0.5, 0.5, 0.0]))
    assert draw(among, AtTheEnd()) == 6  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [30, 64 * 12, 4096, 50_001])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_top_k_is_that_of_a_sort(size: int, k: int) -> None:
    generator = np.random.default_rng(size + k)
    spread = generator.standard_normal(size).astype(np.float32)
    bunched = np.sort(spread)  # the best stand side by side, as in no vocabulary
    ties = np.round(spread)
    forbidden = np.where(generator.random(size) < 0.999, -np.inf, spread).astype(np.float32)
    for logits in (spread, bunched, bunched[::-1].copy(), ties, forbidden):
        threshold = np.sort(logits)[::-1][min(k, size) - 1]
        expected = [token for token in range(size) if logits[token] >= threshold]
        assert above_top_k(logits, k).tolist() == expected


def test_biases_and_penalties_are_those_of_openai() -> None:
    chance = np.random.default_rng(0)
    written: list[int] = []
    seen: list[NDArray[np.float32]] = []

    def choose(logits: NDArray[np.float32]) -> int:
        seen.append(logits)
        return int(chance.integers(5))

    changed = ChangedLogits(
        choose, bias={1: 2.5, 7: -100.0}, presence_penalty=0.5, frequency_penalty=0.25
    )
    for _ in range(30):
        logits = chance.normal(size=9).astype(np.float32)
        before = logits.copy()
        token = changed(logits)
        assert np.array_equal(logits, before)
        for other in range(9):
            count = written.count(other)
            expected = before[other] - 0.5 * (count > 0) - 0.25 * count
            expected += {1: 2.5, 7: -100.0}.get(other, 0.0)
            assert seen[-1][other] == pytest.approx(expected, abs=1e-5)
        written.append(token)


# --- what a model says of itself ------------------------------------------------------------------


def said(folder: Path, **values: Any) -> dict[str, Any]:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return own_sampling(folder)


def test_a_models_own_sampling_is_what_transformers_would_use(tmp_path: Path) -> None:
    assert own_sampling(tmp_path) == {}
    own = {"temperature": 0.6, "top_k": 20, "top_p": 0.8, "min_p": 0.0, "repetition_penalty": 1.05}
    assert said(tmp_path, do_sample=True, eos_token_id=2, **own) == own
    own |= {"dry_multiplier": 0.8, "dry_allowed_length": 3}
    assert said(tmp_path, do_sample=True, **own) == own
    kept = {"repetition_penalty": 1.05, "dry_multiplier": 0.8, "dry_allowed_length": 3}
    assert said(tmp_path, **own) == kept
    assert said(tmp_path, do_sample=True, top_k=None) == {}


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"top_p": 1.5}, {"min_p": 7}])
def test_a_model_that_says_nonsense_of_itself_is_refused_by_file(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    with pytest.raises(FolderError, match=f"generation_config.json.*{next(iter(values))}"):
        said(tmp_path, do_sample=True, **values)


def test_what_was_chosen_comes_before_the_models_own_and_that_before_the_defaults() -> None:
    own = {"temperature": 0.6, "repetition_penalty": 1.05}
    chosen = ChosenSampling(temperature=0, seed=3).sampling(own)
    assert chosen == SamplingSettings(temperature=0, repetition_penalty=1.05, seed=3)
    assert ChosenSampling().sampling({}) == SamplingSettings()
    with pytest.raises(SettingsError, match="top_p"):
        ChosenSampling(top_p=0)


def test_what_an_export_says_for_a_model_is_in_range(tmp_path: Path) -> None:
    assert len(said(tmp_path, **FOR_SMALL_MODELS)) == len(FOR_SMALL_MODELS) - 1
