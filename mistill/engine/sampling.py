"""From logits to the next token.

The order is that of ``transformers``: repetition penalty, temperature, top-k, top-p, min-p, then
a draw. Every function takes the logits (V,) of one position. None of them sorts the whole
vocabulary, because a step of a small model takes only a few milliseconds on a laptop. It is one
file because the rules are few and short, and are read one after another as they are applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistill.engine.language_model import Choose, greedy, not_numbers
from mistill.errors import FolderError, SettingsError
from mistill.folders.schemas import optional_json
from mistill.settings import require, require_range

Logits = NDArray[np.float32]

# Number of logits of which the largest is taken first in a search for the top k.
_GROUP = 64
GENERATION_FILE = "generation_config.json"
_PENALTIES = ("repetition_penalty", "dry_multiplier", "dry_allowed_length")
OWN = ("temperature", "top_k", "top_p", "min_p", *_PENALTIES)
"""What a model says in its generation_config.json about how it is sampled."""

FOR_SMALL_MODELS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "repetition_penalty": 1.05,
    "dry_multiplier": 2.0,
    "dry_allowed_length": 3,
}
"""What an export writes for a chatbot whose model says nothing; see ``docs/experiments.md``."""

DRY_BASE = 1.75
"""By how much DRY's penalty grows with every token of a repeated run; llama.cpp's default."""

# A longer run is penalized like one of this many tokens, which no logit outweighs.
_LONGEST_RUN = 40

LEAST_TEMPERATURE = 1e-30
"""Lowest temperature above 0: logits divided by it stay finite in float32."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How the next token is drawn.

    Attributes:
        temperature: Divisor of the logits. 0 decodes greedily: it always takes the most probable
            token.
        top_k: Sample among this many of the most probable tokens; 0 keeps all.
        top_p: Sample among the fewest tokens whose probabilities reach this sum; 1 keeps all.
        min_p: Drop tokens whose probability is less than this share of the highest one; 0 keeps
            all.
        repetition_penalty: Makes tokens of the prompt and the reply less probable, the more the
            further above 1; 1 changes nothing.
        dry_multiplier: Makes tokens less probable that would go on with a run of tokens as the
            reply has gone on with it before (DRY): this times 1.75 to the power of the run's length
            beyond ``dry_allowed_length`` is taken from their logits; 0 changes nothing, 0.8 is
            usual.
        dry_allowed_length: Runs of fewer tokens are repeated without a penalty.
        seed: Seed of the random numbers. By default, replies differ from run to run.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    dry_multiplier: float = 0.0
    dry_allowed_length: int = 2
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings out of their ranges."""
        require_range("temperature", self.temperature, 0)
        require(
            self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE,
            f"temperature must be 0 or at least {LEAST_TEMPERATURE}, not {self.temperature}",
        )
        require_range("top_k", self.top_k, 0)
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        require_range("min_p", self.min_p, 0, 1)
        require_range("repetition_penalty", self.repetition_penalty, 0, exclusive=True)
        require_range("dry_multiplier", self.dry_multiplier, 0, 100)
        require_range("dry_allowed_length", self.dry_allowed_length, 1)
        require_range("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class ChosenSampling:
    """How the next token of a chatbot is drawn, where that is not left to the chatbot.

    A chatbot says in its generation_config.json how it is sampled; see ``own_sampling``.

    Attributes:
        temperature: Divisor of the logits. 0 decodes greedily: it always takes the most probable
            token. By default the chatbot's own, or 0.7.
        top_k: Sample among this many of the most probable tokens; 0 keeps all. By default the
            chatbot's own, or 40.
        top_p: Sample among the fewest tokens whose probabilities reach this sum; 1 keeps all. By
            default the chatbot's own, or 0.95.
        min_p: Drop tokens whose probability is less than this share of the highest one; 0 keeps
            all. By default the chatbot's own, or 0.05.
        repetition_penalty: Makes tokens of the prompt and the reply less probable, the more the
            further above 1; 1 changes nothing. By default the chatbot's own, or 1.
        dry_multiplier: Makes tokens less probable that would go on with a run of tokens as the
            reply has gone on with it before (DRY): this times 1.75 to the power of the run's length
            beyond ``dry_allowed_length`` is taken from their logits; 0 changes nothing, 0.8 is
            usual. By default the chatbot's own, or 0.
        dry_allowed_length: Runs of fewer tokens are repeated without a penalty. By default the
            chatbot's own, or 2.
        seed: Seed of the random numbers. By default, replies differ from run to run.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_allowed_length: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings out of their ranges."""
        self.sampling({})

    def sampling(self, own: Mapping[str, Any]) -> SamplingSettings:
        """All that sampling needs.

        Args:
            own: What ``own_sampling`` found.

        Returns:
            What was chosen, else the chatbot's own, else the defaults.
        """
        values = {name: getattr(self, name) for name in (*OWN, "seed")}
        chosen = {name: value for name, value in values.items() if value is not None}
        return SamplingSettings(**{**own, **chosen})


def own_sampling(folder: Path) -> dict[str, Any]:
    """How a model wants to be sampled, as its generation_config.json says it to transformers.

    Args:
        folder: A model folder or an ONNX folder.

    Returns:
        Fields of ``SamplingSettings``: of what is said only the penalties of repetition count where
        ``do_sample`` is not true.

    Raises:
        FolderError: If a value is out of its range.
    """
    file = folder / GENERATION_FILE
    config = optional_json(file)
    names = OWN if config.get("do_sample") else _PENALTIES
    own = {name: config[name] for name in names if config.get(name) is not None}
    try:
        SamplingSettings(**own)
    except SettingsError as error:
        raise FolderError(f"{file}: {error}") from error
    return own


class Candidates(NamedTuple):
    """The tokens that may be drawn.

    Attributes:
        ids: Token ids, shape (K,).
        probabilities: Float64, shape (K,), summing to 1; every other token has probability 0.
    """

    ids: NDArray[np.int64]
    probabilities: NDArray[np.float64]


def penalize_repetition(logits: Logits, seen: NDArray[np.int64], penalty: float) -> Logits:
    """Make tokens that were seen before less probable (Keskar et al., 2019, section 4.1).

    https://arxiv.org/abs/1909.05858; a positive logit is divided by the penalty and a negative
    one multiplied, so that both fall.

    Args:
        logits: Shape (V,).
        seen: Ids of the tokens seen, in any order.
        penalty: 1 changes nothing.

    Returns:
        New logits, shape (V,).
    """
    penalized = logits.copy()
    scores = penalized[seen]
    penalized[seen] = np.where(scores < 0, scores * penalty, scores / penalty)
    return penalized


def repeated_runs(written: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the last tokens of a text stand in it already.

    Args:
        written: Token ids, shape (T,).

    Returns:
        Places p, shape (N,), and lengths, shape (N,): as many tokens before p as the length says
        are those at the text's end, so that another ``written[p]`` would go on with them as
        before. Lengths are 1 to 40.
    """
    if written.size < 2:
        none = np.zeros(0, np.int64)
        return none, none
    places = np.flatnonzero(written[:-1] == written[-1]) + 1
    lengths = np.ones(places.size, np.int64)
    longer = np.arange(places.size)
    for length in range(1, _LONGEST_RUN):
        longer = longer[places[longer] > length]
        longer = longer[written[places[longer] - 1 - length] == written[-1 - length]]
        if longer.size == 0:
            break
        lengths[longer] += 1
    return places, lengths


def penalize_runs(
    logits: Logits, written: NDArray[np.int64], multiplier: float, allowed_length: int
) -> Logits:
    """Make tokens less probable that would go on with a run of tokens as before: DRY.

    "Don't repeat yourself" (https://github.com/oobabooga/text-generation-webui/pull/5677), without
    sequence breakers: ``multiplier * 1.75 ** (length - allowed_length)`` is taken from the logit of
    a token that follows an earlier copy of the text's last ``length`` tokens.

    Args:
        logits: Shape (V,).
        written: Token ids of the reply so far, shape (T,).
        multiplier: 0 changes nothing.
        allowed_length: Shorter runs cost nothing, at least 1.

    Returns:
        New logits, shape (V,).
    """
    places, lengths = repeated_runs(written)
    long = lengths >= allowed_length
    penalized = logits.copy()
    if long.any():
        tokens, excess = written[places[long]], lengths[long] - allowed_length
        penalties = multiplier * DRY_BASE ** excess.astype(np.float64)
        # Of several copies of the run the longest counts.
        changed = logits[tokens] - penalties.astype(np.float32)
        np.minimum.at(penalized, tokens, changed)
    return penalized


def above_top_k(logits: Logits, k: int) -> NDArray[np.int64]:
    """The k most probable tokens, and any that tie with the last of them.

    Args:
        logits: Shape (V,).
        k: At least 1.

    Returns:
        Their ids, ascending.
    """
    if k >= logits.size:
        return np.arange(logits.size)
    groups = logits.size // _GROUP
    if groups < 4 * k:
        threshold = np.partition(logits, logits.size - k)[logits.size - k]
        return np.flatnonzero(logits >= threshold)
    # Each of the k best groups holds a token that is at least as probable as the smallest of their
    # maxima, so that the top k are not below it. Few tokens remain to be sorted.
    best = logits[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
    ids = np.flatnonzero(logits >= np.partition(best, groups - k)[groups - k])
    likely = logits[ids]
    threshold = np.partition(likely, likely.size - k)[likely.size - k]
    return ids[np.flatnonzero(likely >= threshold)]


def above_top_p(odds: NDArray[np.floating], p: float) -> NDArray[np.int64]:
    """The fewest tokens whose probabilities reach p together (Holtzman et al., 2020).

    https://arxiv.org/abs/1904.09751, section 3.1. Sorts a few of the most probable tokens, and
    more of them only when those did not reach p.

    Args:
        odds: Shape (K,), probabilities up to a common factor.
        p: Above 0 and at most 1.

    Returns:
        Indices into ``odds``, most probable first; at least one.
    """
    mass = p * odds.sum(dtype=np.float64)
    count = 128
    while True:
        if count >= odds.size:
            head = np.arange(odds.size)
        else:
            head = np.argpartition(odds, odds.size - count)[-count:]
        order = head[np.argsort(-odds[head], kind="stable")]
        reached = np.cumsum(odds[order], dtype=np.float64)
        if reached[-1] >= mass or count >= odds.size:
            return order[: int(np.searchsorted(reached, mass)) + 1]
        count *= 8


def candidates(logits: Logits, settings: SamplingSettings) -> Candidates:
    """The distribution that the next token is drawn from, without penalties of repetition.

    Args:
        logits: Shape (V,).
        settings: Temperature, top-k, top-p and min-p.

    Returns:
        The tokens that may be drawn, with their probabilities.

    Raises:
        FolderError: If the logits are not numbers.
    """
    if settings.temperature == 0:
        return Candidates(np.array([greedy(logits)]), np.ones(1))
    largest = logits.max()
    if not np.isfinite(largest):
        raise not_numbers()
    ids = above_top_k(logits, settings.top_k) if settings.top_k else np.arange(logits.size)
    selected = logits[ids] if settings.top_k else logits
    # The largest is subtracted first, so that no temperature overflows.
    odds = np.exp((selected - largest) / np.float32(settings.temperature))
    if settings.top_p < 1:
        most = above_top_p(odds, settings.top_p)
        ids, odds = ids[most], odds[most]
    if settings.min_p > 0:
        likely = np.flatnonzero(odds >= settings.min_p * odds.max())
        ids, odds = ids[likely], odds[likely]
    odds = odds.astype(np.float64)
    return Candidates(ids, odds / odds.sum())


def draw(distribution: Candidates, generator: np.random.Generator) -> int:
    """Draw one token by its probability.

    Args:
        distribution: The tokens to draw from.
        generator: Random numbers, of which one is used.

    Returns:
        Its id.
    """
    sums = np.cumsum(distribution.probabilities)
    index = int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))
    if index == sums.size:  # rounding may put the number at the very end
        index = int(np.flatnonzero(distribution.probabilities)[-1])
    return int(distribution.ids[index])


def accept_or_redraw(
    ours: Candidates, token: int, theirs: Candidates, generator: np.random.Generator
) -> int:
    """Speculative sampling: accept a token that was drawn from q, or replace it by a draw from p.

    The token is accepted with probability min(1, p / q), and otherwise replaced by a draw from
    max(0, p - q), normalized (Leviathan et al., 2022, section 2.3,
    https://arxiv.org/abs/2211.17192). The result is distributed as p, whatever q is.

    Args:
        ours: p, the distribution of the result.
        token: The token that was drawn from ``theirs``.
        theirs: q, the distribution of the draft model.
        generator: Random numbers.

    Returns:
        The token, or its replacement.
    """
    p, q = (_probability_of(token, distribution) for distribution in (ours, theirs))
    if generator.random() * q < p:
        return token
    ids, odds = theirs
    over = ours.probabilities.copy()
    _, at_ours, at_theirs = np.intersect1d(ours.ids, ids, True, return_indices=True)
    over[at_ours] = np.maximum(over[at_ours] - odds[at_theirs], 0)
    # Two distributions that are equal up to rounding may leave nothing.
    return draw(Candidates(ours.ids, over) if over.any() else ours, generator)


def _probability_of(token: int, distribution: Candidates) -> float:
    return float(distribution.probabilities[distribution.ids == token].sum())


class Sampler:
    """Chooses one token after another, and remembers the tokens for the penalties of repetition.

    One sampler serves one reply; the repetition penalty counts the tokens of the prompt and the
    reply, DRY those of the reply.

    Attributes:
        settings: Sampling settings.
    """

    settings: SamplingSettings

    def __init__(
        self,
        settings: SamplingSettings,
        generator: np.random.Generator | None = None,
        *,
        seen: Iterable[int] = (),
    ) -> None:
        """Make a sampler.

        Args:
            settings: Sampling settings.
            generator: Random numbers; None makes a generator from ``settings.seed``.
            seen: Tokens that count as seen already, such as the prompt.
        """
        self.settings = settings
        self._generator = np.random.default_rng(settings.seed) if generator is None else generator
        self._penalizes = settings.repetition_penalty != 1
        self._seen = set(seen) if self._penalizes else set()
        self._seen_ids = np.fromiter(self._seen, np.int64)
        self._written = np.zeros(0, np.int64)

    def __call__(self, logits: Logits) -> int:
        """Choose the next token.

        Args:
            logits: Shape (V,); left as they are.

        Returns:
            The id of the token, which counts as seen from now on.
        """
        if self.settings.temperature == 0:
            return self._record(greedy(self._penalized(logits)))
        return self._record(draw(self.distribution(logits), self._generator))

    def distribution(self, logits: Logits) -> Candidates:
        """What the next token would be drawn from.

        Args:
            logits: Shape (V,); left as they are.

        Returns:
            The tokens that may be drawn, with their probabilities.
        """
        return candidates(self._penalized(logits), self.settings)

    def accept_or_replace(self, logits: Logits, token: int, theirs: Candidates) -> int:
        """Choose the next token where a draft model has drawn one already.

        Args:
            logits: Shape (V,), those of the model; left as they are.
            token: The draft token.
            theirs: The distribution that it was drawn from.

        Returns:
            A token that is distributed as if the sampler had drawn it; as often as possible the
            draft token.
        """
        ours = self.distribution(logits)
        return self._record(accept_or_redraw(ours, token, theirs, self._generator))

    def _penalized(self, logits: Logits) -> Logits:
        settings = self.settings
        if self._penalizes:
            logits = penalize_repetition(logits, self._seen_ids, settings.repetition_penalty)
        if settings.dry_multiplier:
            logits = penalize_runs(
                logits, self._written, settings.dry_multiplier, settings.dry_allowed_length
            )
        return logits

    def _record(self, token: int) -> int:
        if self._penalizes and token not in self._seen:
            self._seen.add(token)
            self._seen_ids = np.append(self._seen_ids, token)
        if self.settings.dry_multiplier:
            self._written = np.append(self._written, token)
        return token


class ChangedLogits:
    """Wraps a function that picks tokens, and changes the logits that it picks from.

    A bias is added to the logit of a token; the frequency penalty is taken from it once for each
    time that the reply holds the token, and the presence penalty once if it does at all. The prompt
    does not count (https://platform.openai.com/docs/api-reference/chat/create).
    """

    def __init__(
        self,
        choose: Choose,
        *,
        bias: Mapping[int, float] | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
    ) -> None:
        """Wrap a function.

        Args:
            choose: Picks a token from the changed logits.
            bias: What is added to the logits of tokens, by their ids.
            presence_penalty: Taken from the logit of every token that was written.
            frequency_penalty: Taken from it once for each time.
        """
        self._choose = choose
        self._bias_ids = np.array(list(bias or {}), np.int64)
        self._bias = np.array(list((bias or {}).values()), np.float32)
        self._presence = np.float32(presence_penalty)
        self._frequency = np.float32(frequency_penalty)
        self._counts: dict[int, int] = {}

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """Choose the next token.

        Args:
            logits: Shape (V,); left as they are.

        Returns:
            Its id, which counts as written from now on.
        """
        changed = logits.copy()
        changed[self._bias_ids] += self._bias
        if self._presence or self._frequency:
            ids = np.fromiter(self._counts, np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            changed[ids] -= self._presence + self._frequency * counts
        token = self._choose(changed)
        self._counts[token] = self._counts.get(token, 0) + 1
        return token
