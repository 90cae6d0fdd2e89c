"""Settings of comparisons, budgets, differences and evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from mistill.cost_model.processors import MOST_THREADS
from mistill.engine.language_model import Provider
from mistill.settings import TextSettings, require, require_choice, require_range

if TYPE_CHECKING:
    Length = int
else:
    Length = int | str  # a command line gives several in one word, such as 0,1024

# The conventions of benchmarks.figures.conventions, repeated because every command imports this
# module, which therefore imports nothing large.
QUOTED = ("gptq", "llama.cpp")


@dataclass(frozen=True, kw_only=True)
class BenchSettings(TextSettings):
    """How much is measured, and with how many threads.

    Attributes:
        scored_tokens: Tokens of the text that every model has to predict, for perplexity and KL.
        context_length: Longest passage that is scored in one pass; longer documents are cut.
        rounds: Number of times that every model writes, all models taking turns.
        prompt_tokens: Length of the prompt in each round.
        new_tokens: Tokens written in each round.
        turn_seconds: A slow model stops writing after this long, but never before 8 tokens.
        threads: Threads that every engine computes with; by default one for each processor that
            this process may use.
        provider: Execution provider of ONNX Runtime for the ONNX folders: cpu, cuda, tensorrt,
            coreml or directml. Models of other forms run on the processor all the same.
        transformers_generate: Also time transformers' own generate on float folders.
        perplexity: Also measure perplexity as papers and tools define it. Names joined by commas:
            ``gptq`` (windows of 2,048 tokens without overlap, as in the papers) and ``llama.cpp``
            (windows of 512 tokens, the second half of which is scored). Both read the whole text.
        perplexity_tokens: Read at most this many tokens for ``perplexity``; the result can then no
            longer be compared with published figures.
        tasks: Also let every model answer a small set of questions that ships with mistill, as a
            smoke test.
        prompts: Lengths of further prompts whose reading is timed, such as 32,512,2048; lengths
            that do not fit into a model's context are left out.
        depths: Also time writing after this many tokens of context, such as 0,1024,4096.
        loads: Number of times that every model is loaded by a new process with its files dropped
            from the page cache, and as often with its files in it.
        against: Other engines that run the same weights in the same rounds, such as
            llama.cpp,genai; a weight format may follow, as in llama.cpp:q4_k_m or genai:best.
        sample_prompts: Prompts that every model replies to; the report shows the replies side by
            side.
        sample_models: Names of the models that reply to ``sample_prompts``; all if none is named.
        sample_tokens: Most tokens of such a reply.
        task_models: Names of the models that answer the questions of ``tasks``; all if none is
            named.
        replies: Also let models reply to 40 everyday prompts that ship with mistill, with greedy
            decoding, and count how often a reply repeats itself.
        reply_models: Names of the models that do so; all if none is named, and float folders take
            minutes.
        reply_tokens: Most tokens of such a reply.
    """

    scored_tokens: int = 4000
    context_length: int = 512
    rounds: int = 3
    prompt_tokens: int = 128
    new_tokens: int = 48
    turn_seconds: float = 5.0
    threads: int | None = None
    provider: Provider = "cpu"
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
    task_models: tuple[str, ...] = ()
    replies: bool = False
    reply_models: tuple[str, ...] = ()
    reply_tokens: int = 128

    def __post_init__(self) -> None:
        for name, fewest in (("prompts", 1), ("depths", 0)):
            object.__setattr__(self, name, _lengths(name, getattr(self, name), fewest))
        rivals = [word.strip() for entry in self.against for word in entry.split(",")]
        object.__setattr__(self, "against", tuple(word for word in rivals if word))
        require_range("loads", self.loads, 0)
        require(
            self.context_length >= 2,
            f"context_length must be at least 2, not {self.context_length}: the first token of a "
            "passage is never predicted",
        )
        for name in (
            *("scored_tokens", "rounds", "prompt_tokens", "threads"),
            *("perplexity_tokens", "sample_tokens", "reply_tokens"),
        ):
            require_range(name, getattr(self, name), 1)
        for option, needed in (
            *(("task_models", "tasks"), ("reply_models", "replies")),
            ("sample_models", "sample_prompts"),
        ):
            require(
                bool(getattr(self, needed)) or not getattr(self, option),
                f"{option} names models, and nothing is asked of them; give {needed}, or leave out "
                f"{option}",
            )
        require_range("threads", self.threads, 1, MOST_THREADS)
        require(
            self.new_tokens >= 2,
            f"new_tokens must be at least 2, not {self.new_tokens}: speed is measured after the "
            "first",
        )
        require_choice("provider", self.provider, get_args(Provider))
        require_range("turn_seconds", self.turn_seconds, 0, exclusive=True)
        names = [part.strip() for name in self.perplexity for part in name.split(",")]
        for name in names:
            require(name in QUOTED, f"perplexity must be {' or '.join(QUOTED)}, not {name!r}")
        object.__setattr__(self, "perplexity", tuple(dict.fromkeys(names)))


def _lengths(name: str, values: Sequence[int | str], fewest: int) -> tuple[int, ...]:
    """Sorted lengths without duplicates, from numbers and texts such as ``0,1024``."""
    words = [word.strip() for entry in values for word in str(entry).split(",")]
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


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits that every model must meet; the command exits with 1 if one does not.

    Attributes:
        max_kl: Most KL to the reference, in nats.
        min_tps: Fewest tokens written per second.
        max_mb: Most megabytes on disk.
        max_memory_mb: Most megabytes of memory while it runs.
        budget_for: Models that must meet these limits; by default all but the reference and other
            engines.
    """

    max_kl: float | None = None
    min_tps: float | None = None
    max_mb: float | None = None
    max_memory_mb: float | None = None
    budget_for: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_kl", "min_tps", "max_mb", "max_memory_mb"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name} must be at least 0, not {value}")
        require(
            bool(self) or not self.budget_for,
            "budget_for names models but there is no limit; give max_kl, min_tps, max_mb or "
            "max_memory_mb",
        )

    def __bool__(self) -> bool:
        """Whether there is any limit."""
        limits = self.max_kl, self.min_tps, self.max_mb, self.max_memory_mb
        return any(limit is not None for limit in limits)


@dataclass(frozen=True, kw_only=True)
class ShipSettings:
    """Memory and speed that the model to ship must meet.

    Attributes:
        ship_mb: Megabytes of memory that the model to ship may take while it runs.
        ship_tps: Tokens per second that it must write at least.
    """

    ship_mb: float | None = None
    ship_tps: float | None = None

    def __post_init__(self) -> None:
        for name in ("ship_mb", "ship_tps"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name} must be at least 0, not {value}")


@dataclass(frozen=True, kw_only=True)
class DiffSettings:
    """How large and how certain a change has to be to be reported.

    Attributes:
        confidence: Probability that no change is reported between two reports of the same models.
        tolerance: Largest relative change of a quality figure that does not count as a change.
        clock_tolerance: The same for speed and memory, which differ from run to run on one machine.
        pairs: Models that have another name in the new report, each as OLD=NEW.
    """

    confidence: float = 0.95
    tolerance: float = 0.02
    clock_tolerance: float = 0.05
    pairs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(
            0.5 <= self.confidence < 1,
            f"confidence must be at least 0.5 and below 1, not {self.confidence}",
        )
        for name in ("tolerance", "clock_tolerance"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must be at least 0 and below 1, not {value}")
        for pair in self.pairs:
            old, sign, new = pair.partition("=")
            require(bool(old and sign and new), f"pairs must look like OLD=NEW, not {pair!r}")


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """How a server is loaded.

    Attributes:
        clients: Clients at once, each of which asks for one reply after another, such as 1,4,16;
            every number is measured in its turn.
        requests: Replies that each client asks for in a turn.
        rounds: Turns of every number of clients.
        prompt_tokens: Length of the prompts, no two of which begin alike.
        new_tokens: Length of the replies.
        model: Name of the server's model; by default the first that it names.
        api_key_file: A file with the key that the server wants.
        threads: Threads of a folder's server; by default one for each processor.
        seed: Seed of the prompts.
    """

    clients: tuple[Length, ...] = (1, 2, 4, 8, 16)
    requests: int = 3
    rounds: int = 3
    prompt_tokens: int = 64
    new_tokens: int = 64
    model: str | None = None
    api_key_file: Path | None = None
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "clients", _lengths("clients", self.clients, 1))
        require(bool(self.clients), "clients must name a number, such as 1,4,16")
        require(self.clients[-1] <= 1000, f"clients must be at most 1000, not {self.clients[-1]}")
        for name, least in (("requests", 1), ("rounds", 1), ("prompt_tokens", 1), ("seed", 0)):
            require_range(name, getattr(self, name), least)
        require_range("threads", self.threads, 1, MOST_THREADS)
        require(
            self.new_tokens >= 2,
            f"new_tokens must be at least 2, not {self.new_tokens}: a gap lies between two tokens",
        )


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(TextSettings):
    """How replies are compared by a judge.

    Attributes:
        limit: Answer at most this many prompts, taken evenly from all of them.
        new_tokens: Most tokens of a reply.
        threads: Threads to compute with; by default one for each processor that this process may
            use.
        server: Address of a server that speaks OpenAI's chat completions, such as
            http://127.0.0.1:8000/v1, and has the judge. Prompts and replies are sent to it.
        server_model: What the server calls the judge; if not given, the only model that it has.
        api_key_file: A file with the API key for that server.
    """

    limit: int | None = None
    new_tokens: int = 128
    threads: int | None = None
    server: str | None = None
    server_model: str | None = None
    api_key_file: Path | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "new_tokens"):
            require_range(name, getattr(self, name), 1)
        require_range("threads", self.threads, 1, MOST_THREADS)
        for name in ("server_model", "api_key_file"):
            require(
                getattr(self, name) is None or self.server is not None,
                f"{name} is for a judge behind a server; give server too",
            )


SMOKE = "smoke"


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Which tasks, and how much of them.

    Attributes:
        tasks: Names of tasks, joined by commas: ``smoke``, the small set that ships with mistill,
            and any task or pattern of lm-evaluation-harness, such as ``arc_easy``; most of those
            read their questions from a model hub.
        include_path: A folder with tasks of your own, as lm-evaluation-harness describes them.
        task_data: Local files with the questions of tasks that would read them from a hub, each as
            TASK=FILE, such as ifeval=input_data.jsonl: JSON lines or a JSON list, with the columns
            that the task reads. Examples before a question come from the same file.
        limit: Answer at most this many questions of each task, for a quick test.
        few_shot: Number of examples before every question; by default the task's own number. The
            small set has none.
        chat_template: Render questions with the model's chat template; the small set does so for
            questions that are instructions.
        threads: Threads to compute with; by default one for each processor that this process may
            use.
        seed: Random seed for tasks that sample text.
    """

    tasks: tuple[str, ...] = (SMOKE,)
    include_path: str | None = None
    task_data: tuple[str, ...] = ()
    limit: int | None = None
    few_shot: int | None = None
    chat_template: bool = False
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        names = [part.strip() for name in self.tasks for part in name.split(",")]
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(filter(None, names))))
        require(bool(self.tasks), f"tasks must name at least one, such as {SMOKE}")
        for name, least in (("limit", 1), ("few_shot", 0), ("threads", 1), ("seed", 0)):
            require_range(name, getattr(self, name), least)
        require_range("threads", self.threads, 1, MOST_THREADS)
        for entry in self.task_data:
            task, sign, file = entry.partition("=")
            require(bool(task and sign and file), f"task_data must be TASK=FILE, not {entry!r:.80}")
            require(
                task in self.tasks and task != SMOKE,
                f"task_data names the task {task:.80}, which is none of tasks ("
                f"{', '.join(self.tasks)}); name it there too",
            )
        require(
            len(self.data_files) == len(self.task_data),
            "task_data names a task twice; leave one out",
        )
        if set(self.tasks) == {SMOKE}:
            for name in ("include_path", "few_shot", "chat_template", "seed"):
                require(
                    not getattr(self, name),
                    f"{name} applies to tasks of lm-evaluation-harness, and tasks names only "
                    f"{SMOKE}; name such a task, or leave out {name}",
                )

    @property
    def data_files(self) -> dict[str, Path]:
        """The local files with the questions of tasks, by task."""
        pairs = (entry.partition("=") for entry in self.task_data)
        return {task: Path(file).expanduser() for task, _, file in pairs}
