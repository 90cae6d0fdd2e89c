"""What can be set about an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from mistill.settings import require

SMOKE = "smoke"


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Which tasks, and how much of them.

    Attributes:
        tasks: Names of tasks, joined by commas: ``smoke``, the small set that ships with mistill,
            and any task or pattern of lm-evaluation-harness, such as ``arc_easy``; most of those
            read their questions from a model hub.
        include_path: A folder with tasks of your own, as lm-evaluation-harness describes them.
        limit: Ask at most so many questions of each task; for a first try only.
        few_shot: Examples before every question; the task's own number if not given. The small set
            has none.
        chat_template: Ask by the model's chat template; the small set does so where a question is
            an instruction.
        threads: Threads to compute with; by default one for each processor that this process may
            use.
        seed: Of the draws, where a task samples.
    """

    tasks: tuple[str, ...] = (SMOKE,)
    include_path: str | None = None
    limit: int | None = None
    few_shot: int | None = None
    chat_template: bool = False
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        names = [part.strip() for name in self.tasks for part in name.split(",")]
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(filter(None, names))))
        require(bool(self.tasks), f"tasks must name at least one, such as {SMOKE}")
        require(
            self.limit is None or self.limit >= 1, f"limit must be at least 1, not {self.limit}"
        )
        require(
            self.few_shot is None or self.few_shot >= 0,
            f"few_shot must be at least 0, not {self.few_shot}",
        )
        require(
            self.threads is None or self.threads >= 1,
            f"threads must be at least 1, not {self.threads}",
        )
        require(self.seed >= 0, f"seed must be at least 0, not {self.seed}")
        if set(self.tasks) == {SMOKE}:
            for name in ("include_path", "few_shot", "chat_template", "seed"):
                require(
                    not getattr(self, name),
                    f"{name} is for tasks of lm-evaluation-harness, and tasks names only {SMOKE}; "
                    "name one, or leave it out",
                )
