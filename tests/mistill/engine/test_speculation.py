"""Speculative decoding against plain decoding: the same tokens, or the same distribution."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import export
from mistill.engine import speculation
from mistill.engine.drafts import DraftModel, DraftToken, PromptLookup
from mistill.engine.language_model import LanguageModel
from mistill.engine.onnx_model import OnnxModel
from mistill.engine.pace import LONGEST, Pace
from mistill.engine.sampling import Sampler, SamplingSettings, candidates
from mistill.engine.speculation import SpeculativeModel, with_draft
from mistill.errors import SettingsError, VocabularyError
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def chatbot(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.to_onnx(model, tmp_path_factory.mktemp("onnx") / "chatbot", parity_positions=0)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer with the same tokens."""
    folder = tmp_path_factory.mktemp("draft")
    source = tiny_model(folder / "model", num_hidden_layers=1, seed=7)
    return export.to_onnx(source, folder / "draft", parity_positions=0)


class Eager(Pace):
    """Always drafts, whether it pays or not."""

    def length(self, ahead_seconds: float = 0.0) -> int:
        return 4 if self._step else 0


class Oracle:
    """Knows the text, but is wrong now and then."""

    def __init__(self, text: Sequence[int], wrong_every: int = 5) -> None:
        self.text = list(text)
        self.wrong_every = wrong_every

    def begin(self, ids: Sequence[int]) -> None:
        pass

    def seconds_behind(self, ids: Sequence[int]) -> float:
        return 0.0

    def propose(
        self, ids: Sequence[int], count: int, sampling: SamplingSettings | None
    ) -> list[DraftToken]:
        return [
            DraftToken(7 if place % self.wrong_every == 0 else self.text[place], None)
            for place in range(len(ids), min(len(ids) + count, len(self.text)))
        ]


def some_ids(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(5, 300, count).tolist()
    return ids


def eager(model: OnnxModel, draft: Any) -> SpeculativeModel:
    speculative = SpeculativeModel(model, draft)
    speculative.pace = Eager()
    return speculative


def counted_runs(model: OnnxModel) -> list[int]:
    """Positions of each run of the graph from now on."""
    runs: list[int] = []
    read = model._read

    def noted(tokens: list[int], scores: Any) -> None:
        runs.append(len(tokens))
        read(tokens, scores)

    model._read = noted  # type: ignore[method-assign]
    return runs


@pytest.mark.parametrize("draft", ["lookup", "model", "oracle"])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_text_is_the_same_to_the_token(
    chatbot: Path, small: Path, draft: str, seed: int
) -> None:
    prompt = some_ids(25, seed) * 2
    model = OnnxModel(chatbot, threads=1)
    expected = list(islice(model.stream(prompt), 120))
    drafts: dict[str, Callable[[], Any]] = {
        "lookup": PromptLookup,
        "model": lambda: DraftModel.open(small, model),
        "oracle": lambda: Oracle(prompt + expected),
    }
    source = drafts[draft]()
    speculative = eager(model, source)
    runs = counted_runs(model)
    assert list(islice(speculative.stream(prompt), 120)) == expected
    assert speculative.pace.tried > 0
    if draft == "oracle":  # four of five draft tokens are right: far fewer runs than tokens
        assert len(runs) < 70
        assert speculative.pace.right > 60


def test_a_wrong_draft_token_costs_time_and_nothing_else(chatbot: Path) -> None:
    prompt = some_ids(20)
    model = OnnxModel(chatbot, threads=1)
    expected = list(islice(model.stream(prompt), 40))
    speculative = eager(model, Oracle([7] * 400, wrong_every=1))
    assert list(islice(speculative.stream(prompt), 40)) == expected
    assert speculative.pace.right == 0
    assert model._cache.ids[: 20 + 39] == prompt + expected[:-1]


def test_a_seed_draws_the_same_text_with_draft_that_were_not_drawn(chatbot: Path) -> None:
    prompt = some_ids(20) * 2
    settings = SamplingSettings(temperature=1.3, top_k=20, repetition_penalty=1.1)
    model = OnnxModel(chatbot, threads=1)
    for seed in range(3):
        samplers = [Sampler(settings, np.random.default_rng(seed), seen=prompt) for _ in range(2)]
        expected = list(islice(model.stream(prompt, samplers[0]), 80))
        speculative = eager(model, Oracle(prompt + expected))
        assert list(islice(speculative.stream(prompt, samplers[1]), 80)) == expected
        assert speculative.pace.right > 30


def test_text_with_a_draft_that_samples_is_distributed_as_without(
    chatbot: Path, small: Path
) -> None:
    """Every text of three tokens, counted, against its probability by the model alone."""
    prompt = some_ids(12, 3)
    settings = SamplingSettings(temperature=3.0, top_k=3, top_p=1, min_p=0)
    model = OnnxModel(chatbot, threads=1)
    exact: dict[tuple[int, ...], float] = {}
    among = candidates(model.read(prompt)[0], settings)
    for first, p in zip(among.ids, among.probabilities, strict=True):
        second = candidates(model.read([*prompt, int(first)])[0], settings)
        for next_, q in zip(second.ids, second.probabilities, strict=True):
            third = candidates(model.read([*prompt, int(first), int(next_)])[0], settings)
            for last, r in zip(third.ids, third.probabilities, strict=True):
                exact[int(first), int(next_), int(last)] = float(p * q * r)
    speculative = eager(
        model, DraftModel(OnnxModel(small, threads=1), generator=np.random.default_rng(1))
    )
    generator = np.random.default_rng(2)
    draws = 1200
    counts = dict.fromkeys(exact, 0)
    for _ in range(draws):
        sampler = Sampler(settings, generator)
        counts[tuple(islice(speculative.stream(prompt, sampler), 3))] += 1
    assert speculative.pace.tried > draws
    statistic = sum((counts[text] - draws * p) ** 2 / (draws * p) for text, p in exact.items())
    # Chi-square with 26 degrees of freedom: 54.05 in one of a thousand.
    assert len(exact) == 27
    assert statistic < 54.05


def test_leaving_at_any_token_leaves_the_model_usable(chatbot: Path) -> None:
    prompt = some_ids(20)
    model = OnnxModel(chatbot, threads=1)
    expected = list(islice(model.stream(prompt), 30))
    speculative = eager(model, Oracle(prompt + expected))
    for count in range(1, 15):
        stream = speculative.stream(prompt)
        assert list(islice(stream, count)) == expected[:count]
        stream.close()  # type: ignore[attr-defined]
        assert list(islice(model.stream(prompt), 30)) == expected


def test_two_texts_with_drafts_may_take_turns(chatbot: Path) -> None:
    prompts = [some_ids(20, 5), some_ids(31, 6)]
    model = OnnxModel(chatbot, threads=1)
    alone = [list(islice(model.stream(prompt), 40)) for prompt in prompts]
    streams = [
        eager(model, Oracle(prompt + text)).stream(prompt)
        for prompt, text in zip(prompts, alone, strict=True)
    ]
    together: list[list[int]] = [[], []]
    for turn in range(40):
        for which in (0, 1) if turn % 3 else (1, 0):
            together[which].append(next(streams[which]))
    assert together == alone


def test_draft_tokens_stay_within_the_context(chatbot: Path, small: Path) -> None:
    model = OnnxModel(chatbot, threads=1, context=50)
    prompt = some_ids(42)
    expected = list(model.stream(prompt))
    for draft in (
        PromptLookup(),
        Oracle(prompt + expected + [9] * 9),
        DraftModel.open(small, model),
    ):
        assert list(eager(model, draft).stream(prompt)) == expected
    assert list(eager(model, PromptLookup()).stream(some_ids(50))) == []


def test_a_draft_goes_on_when_its_own_context_is_full(chatbot: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", num_hidden_layers=1, max_position_embeddings=64)
    short = export.to_onnx(source, tmp_path / "short", parity_positions=0, context_length=64)
    model = OnnxModel(chatbot, threads=1)
    prompt = some_ids(100)
    expected = list(islice(model.stream(prompt), 150))
    speculative = eager(model, DraftModel.open(short, model))
    assert list(islice(speculative.stream(prompt), 150)) == expected
    assert speculative.pace.tried > 100


def test_looking_up_finds_what_followed_last_time() -> None:
    draft = PromptLookup()
    text = [1, 2, 3, 4, 5, 9, 2, 3, 8, 8, 7, 2, 3]
    draft.begin(text)
    assert [drafted.token for drafted in draft.propose(text, 3, None)] == [8, 8, 7]
    text += [4, 6]
    assert draft.propose(text, 3, None) == []
    text += [9, 1, 2, 3]  # three tokens say more than two
    assert [drafted.token for drafted in draft.propose(text, 2, None)] == [4, 5]
    draft.begin([5, 6, 7])
    assert draft.propose([5, 6, 7], 3, None) == []
    assert draft.propose([5], 3, None) == []


def test_a_model_that_rounds_speculates_only_where_nobody_expects_the_same_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, chatbot: Path
) -> None:
    # Large enough, and in blocks of more than 64, that one bit of a sum moves rounded inputs. It
    # drafts for itself, so that there always is a draft.
    prompt = some_ids(20) * 3
    for seed in range(8):
        source = tiny_model(
            tmp_path / f"model-{seed}",
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            seed=seed,
        )
        made = export.to_onnx(
            source, tmp_path / f"int4-{seed}", precision="int4", block_size=128, parity_positions=0
        )
        rounding = OnnxModel(made, threads=1)
        careful = SpeculativeModel(rounding, DraftModel.open(made, rounding, 1))
        if careful.rounding > speculation.SAME:
            break
    assert careful.rounding > speculation.SAME, "no model of eight rounds"
    assert not careful.speculates
    expected = list(islice(rounding.stream(prompt), 40))
    careful.pace = Eager()
    assert list(islice(careful.stream(prompt), 40)) == expected
    assert careful.pace.tried == 0
    assert "set exact=False" in caplog.text
    # Replies that are drawn without a seed differ from run to run, so that nothing is lost.
    caplog.clear()
    list(islice(careful.stream(prompt, Sampler(SamplingSettings(temperature=0.01, seed=1))), 40))
    assert careful.pace.tried == 0
    careful.pace = Eager()
    list(islice(careful.stream(prompt, Sampler(SamplingSettings(temperature=0.01))), 40))
    assert careful.pace.tried > 0
    careful.pace = Eager()
    list(islice(careful.stream(prompt, repeatable=True), 40))
    assert careful.pace.tried == 0
    assert caplog.text == ""
    assert SpeculativeModel(rounding, PromptLookup(), exact=False).speculates
    plain = SpeculativeModel(OnnxModel(chatbot, threads=1), PromptLookup())
    assert plain.speculates
    assert plain.rounding < 1e-4


def test_blocks_of_32_and_an_int8_cache_stay_the_same_to_the_token(
    tmp_path: Path, chats: Path
) -> None:
    source = tiny_model(
        tmp_path / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=4
    )
    made = export.to_onnx(
        source,
        tmp_path / "int4",
        precision="int4",
        block_size=32,
        cache="int8",
        cache_texts=(str(chats),),
        float_columns=4,
        parity_positions=0,
    )
    model = OnnxModel(made, threads=1)
    prompt = some_ids(30)
    expected = list(islice(model.stream(prompt), 60))
    speculative = eager(model, Oracle(prompt + expected))
    if not speculative.speculates:
        pytest.skip(f"the kernels of this processor differ by {speculative.rounding:.2g}")
    assert list(islice(speculative.stream(prompt), 60)) == expected
    assert speculative.pace.right > 20


def test_what_cannot_speculate_is_refused_in_one_line(chatbot: Path, tmp_path: Path) -> None:
    model = OnnxModel(chatbot, threads=1)
    other = tiny_model(tmp_path / "model", vocab_size=400)
    draft = export.to_onnx(other, tmp_path / "other", parity_positions=0)
    with pytest.raises(VocabularyError, match=r"vocabularies differ: 400 rows against"):
        with_draft(model, draft)

    class Foreign:
        vocabulary_size = 3
        context_length = 3

    foreign: LanguageModel = Foreign()  # type: ignore[assignment]
    with pytest.raises(SettingsError, match="speculative decoding needs an ONNX folder"):
        with_draft(foreign, "lookup")


def test_it_meets_the_protocol(chatbot: Path) -> None:
    model = OnnxModel(chatbot, threads=1)
    speculative: LanguageModel = with_draft(model, "lookup")
    assert speculative.vocabulary_size == model.vocabulary_size
    assert speculative.context_length == 512
    ids = np.array([some_ids(9)])
    np.testing.assert_array_equal(speculative.logits(ids), model.logits(ids))


# --- when drafting pays -------------------------------------------------------------------------


def pretend(
    hit: float,
    draft_token_cost: float,
    tokens: int,
    seed: int = 0,
    behind: float = 0.0,
    noise: float = 0.1,
) -> tuple[float, Pace]:
    """Write with a share of draft tokens accepted; the time relative to plain decoding."""
    generator = np.random.default_rng(seed)
    pace, spent, written = Pace(), 0.0, 0
    while written < tokens:
        drafted = pace.length(behind)
        right = 0
        while right < drafted and generator.random() < hit:
            right += 1
        takes = 1 + draft_token_cost * drafted + (behind if drafted else 0)
        # Other processes slow a step now and then.
        disturbed = generator.uniform(1 - noise, 1 + noise) * (
            3 if generator.random() < noise else 1
        )
        pace.note(drafted, right, takes * disturbed)
        spent += takes
        written += 1 + right
    return spent / written, pace


class Timed:
    """A model whose steps take a known time, by a clock of its own."""

    folder = Path("timed")
    vocabulary_size = 100
    context_length = 5000

    def __init__(self, cost: Callable[[int], float]) -> None:
        self.now = 0.0
        self.cost = cost

    def clock(self) -> float:
        return self.now

    def checked(self, ids: Sequence[int]) -> list[int]:
        return list(ids)

    def read(self, ids: Sequence[int], positions: int = 1) -> Any:
        self.now += self.cost(positions)
        return np.eye(1, 100, 1, dtype=np.float32).repeat(positions, 0)

    def follow(self, reader: object, tokens: list[int], positions: int = 1) -> Any:
        return self.read(tokens, positions)


COSTS: dict[str, Callable[[int], float]] = {
    "cheap": lambda positions: 1 + 0.05 * (positions - 1),
    "usual": lambda positions: 1 + 0.15 * (positions - 1),
    "dear": lambda positions: 1 + 0.5 * (positions - 1),
    "no use": lambda positions: float(positions),
    "another kernel": lambda positions: 1 + 0.6 * (positions > 1) + 0.05 * (positions - 1),
    "slow beyond four": lambda positions: positions * (0.3 if positions < 5 else 0.8) + 0.7,
}


@pytest.mark.parametrize("name", COSTS)
def test_draft_tokens_that_are_never_right_take_two_percent_of_any_reply(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Timed(COSTS[name])
    monkeypatch.setattr(time, "perf_counter", model.clock)
    speculative = SpeculativeModel(model, Oracle([7] * 5000, wrong_every=1))  # type: ignore[arg-type]
    stream = speculative.stream([5, 6, 7])
    next(stream)
    began, plain = model.now, COSTS[name](1)
    for tokens in range(1, 3000):
        assert next(stream) == 1
        # At every token, since a reply may end there.
        assert model.now - began <= plain * tokens / 0.98 + 1e-6
    assert speculative.pace.right == 0
    assert speculative.pace.tried > 0


def test_the_cost_of_a_draft_token_is_known_before_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    firsts: dict[str, int] = {}
    for name in ("cheap", "usual", "no use"):
        model = Timed(COSTS[name])
        monkeypatch.setattr(time, "perf_counter", model.clock)
        speculative = SpeculativeModel(model, Oracle([1] * 500, wrong_every=1000))  # type: ignore[arg-type]
        stream = speculative.stream([5, 6, 7])
        while not speculative.pace.tried:
            next(stream)
            firsts[name] = firsts.get(name, 0) + 1
    assert firsts["cheap"] < firsts["usual"] < 12
    assert 45 < firsts["no use"] < 56


@pytest.mark.parametrize("hit", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("cost", [0.12, 0.5, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2])
def test_draft_tokens_that_are_wrong_never_cost_three_percent(
    hit: float, cost: float, noise: float
) -> None:
    for tokens in (100, 400):
        spent = [pretend(hit, cost, tokens, seed, noise=noise)[0] for seed in range(8)]
        assert np.mean(spent) < 1 / 0.97
        # The first draft token is risked before its cost is known.
        assert max(spent) < 1 / 0.97 + (0.01 if noise < 0.2 else 0.04)


def test_draft_tokens_that_are_right_are_used() -> None:
    for hit, cost, speed in ((0.9, 0.15, 2.2), (0.7, 0.15, 1.5), (0.8, 0.3, 1.3)):
        spent, pace = pretend(hit, cost, 1000)
        assert 1 / spent > speed
        assert pace.tried > 300
        assert pace.right / pace.tried > 0.3


def test_a_draft_that_is_far_behind_is_not_risked() -> None:
    spent, pace = pretend(0.9, 0.1, 200, behind=30.0)
    assert pace.tried == 0
    assert spent < 1.02


def test_drafting_is_taken_up_again_where_it_pays() -> None:
    pace = Pace(0.15)

    def write(hit: float, tokens: int) -> float:
        spent, written = 0.0, 0
        while written < tokens:
            drafted = pace.length()
            right = drafted if hit else 0
            pace.note(drafted, right, 1 + 0.15 * drafted)
            spent += 1 + 0.15 * drafted
            written += 1 + right
        return written / spent

    assert write(1, 200) > 3
    assert write(0, 400) > 0.95
    tried = pace.tried
    assert write(0, 400) > 0.97
    # It gave up, but for a look now and then.
    assert 0 < pace.tried - tried < 20
    assert write(1, 1500) > 1.5


def test_no_more_is_drafted_than_processors_read_at_once() -> None:
    _, pace = pretend(1.0, 0.01, 300)
    assert all(0 <= pace.length() <= LONGEST for _, _ in product(range(3), range(3)))
    assert pace.right == pace.tried
