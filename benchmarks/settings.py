"""What can be set about a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistill.settings import require

if TYPE_CHECKING:
    Length = int
else:
    Length = int | str  # a command line gives several in one word, such as 0,1024

# What benchmarks.figures.conventions knows; every command imports this module, so it stays small.
QUOTED = ("gptq", "llama.cpp")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How much is measured, and with how many threads.

    Attributes:
        scored_tokens: Tokens of the text that every model has to predict, for perplexity and KL.
        context_length: Longest passage that is scored at once; longer documents are cut.
        rounds: Times that every model is asked to write, all models taking turns.
        prompt_tokens: Length of the prompt in each round.
        new_tokens: Tokens written in each round.
        turn_seconds: A slow model stops writing after this long, but never before 8 tokens.
        threads: Threads that every engine computes with; by default one for each processor that
            this process may use.
        transformers_generate: Time transformers' own generate on float folders as well.
        perplexity: Conventions in which perplexity is measured besides, as people quote it, joined
            by commas: ``gptq`` (2,048 tokens without overlap, as in the papers) and ``llama.cpp``
            (512 tokens, the second half of which is scored). They read the whole text.
        perplexity_tokens: Read no more tokens than these for the conventions; what comes out is no
            longer what others quote.
        tasks: Ask every model the questions of a small set that ships with mistill, a smoke test.
        prompts: Lengths of further prompts whose reading is timed, such as 32,512,2048; those that
            a model's context does not hold are left out.
        depths: Tokens after which writing is timed besides, such as 0,1024,4096.
        loads: Times that every model is opened with its files dropped from the page cache, and as
            often with its files in it, by processes of their own.
        against: Rivals that run the same weights in the same rounds, such as llama.cpp,genai; how
            they store weights may follow, as in llama.cpp:q4_k_m or genai:best.
        sample_prompts: What every model is asked, so that the report shows their replies side by
            side.
        sample_models: Names of the models that are asked; all if none is named.
        sample_tokens: Most tokens of such a reply.
    """

    scored_tokens: int = 4000
    context_length: int = 512
    rounds: int = 3
    prompt_tokens: int = 128
    new_tokens: int = 48
    turn_seconds: float = 5.0
    threads: int | None = None
    transformers_generate: bool = True
    perplexity: tuple[str, ...] = ()
    perplexity_tokens: int | None = None
    tasks: bool = False
    prompts: tuple[Length, ...] = ()
    depths: tuple[Length, ...] = ()
    loads: int = 0
    against: tuple[str, ...] = ()
    sample_prompts: tuple[str, ...] = ()
    sample_models: tuple[str, ...] = ()
    sample_tokens: int = 60

    def __post_init__(self) -> None:
        for name, fewest in (("prompts", 1), ("depths", 0)):
            object.__setattr__(self, name, _lengths(name, getattr(self, name), fewest))
        words = [word.strip() for given in self.against for word in given.split(",")]
        object.__setattr__(self, "against", tuple(word for word in words if word))
        require(self.loads >= 0, f"loads must be at least 0, not {self.loads}")
        require(
            self.scored_tokens >= 1, f"scored_tokens must be at least 1, not {self.scored_tokens}"
        )
        require(
            self.context_length >= 2,
            f"context_length must be at least 2, not {self.context_length}: the first token of a "
            "passage is never predicted",
        )
        require(self.rounds >= 1, f"rounds must be at least 1, not {self.rounds}")
        require(
            self.prompt_tokens >= 1, f"prompt_tokens must be at least 1, not {self.prompt_tokens}"
        )
        require(
            self.new_tokens >= 2,
            f"new_tokens must be at least 2, not {self.new_tokens}: speed is measured after the "
            "first",
        )
        require(self.turn_seconds > 0, f"turn_seconds must be above 0, not {self.turn_seconds}")
        require(
            self.threads is None or self.threads >= 1,
            f"threads must be at least 1, not {self.threads}",
        )
        names = [part.strip() for name in self.perplexity for part in name.split(",")]
        for name in names:
            require(name in QUOTED, f"perplexity is quoted by {' or '.join(QUOTED)}, not {name!r}")
        object.__setattr__(self, "perplexity", tuple(dict.fromkeys(names)))
        require(
            self.perplexity_tokens is None or self.perplexity_tokens >= 1,
            f"perplexity_tokens must be at least 1, not {self.perplexity_tokens}",
        )
        require(
            self.sample_tokens >= 1, f"sample_tokens must be at least 1, not {self.sample_tokens}"
        )


def _lengths(name: str, given: Sequence[int | str], fewest: int) -> tuple[int, ...]:
    """Lengths, each once, of numbers and of words such as ``0,1024``."""
    words = [word.strip() for entry in given for word in str(entry).split(",")]
    try:
        lengths = tuple(sorted({int(word) for word in words if word}))
    except ValueError:
        lengths = (-1,)
    require(
        not lengths or lengths[0] >= fewest,
        f"{name} must be whole numbers of at least {fewest} such as 512,2048, not "
        f"{', '.join(words)}",
    )
    return lengths
