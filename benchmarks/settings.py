"""What can be set about a comparison."""

from __future__ import annotations

from dataclasses import dataclass

from mistill.settings import require

# What benchmarks.conventions knows; this module is imported by every command, and stays small.
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
    sample_prompts: tuple[str, ...] = ()
    sample_models: tuple[str, ...] = ()
    sample_tokens: int = 60

    def __post_init__(self) -> None:
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
