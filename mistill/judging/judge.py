"""A judge of answers: what says with one number how good each is.

A judge is a reward model in a folder, a check that a machine can make, or a function of the user's.
Whatever it is, it is asked about one batch of answers and gives back one finite number for each, or
the work ends with a sentence that says which answer it failed at.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from mistill.errors import SettingsError, TextError, TrainingError
from mistill.judging.checks import (
    check_pattern,
    code_passes,
    fits_schema,
    matches,
    read_schema,
)
from mistill.judging.instructions import instructions_of, share_followed
from mistill.preferences.reading import PromptRow
from mistill.settings import require

Check = Literal["json", "regex", "code", "instructions"]

RewardFunction = Callable[..., Any]
"""Called with a prompt's turns, an answer and the other columns of the row by name, as
``function(messages, answer, **columns)``; gives back a number."""

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Judge(Protocol):
    """Says how good answers are.

    Attributes:
        name: What it is called in reports.
    """

    name: str

    def check(self, prompt: PromptRow) -> None:
        """Refuse a prompt whose answers it cannot judge, before anything is generated.

        Args:
            prompt: The prompt.

        Raises:
            TextError: If it lacks a column that the judge reads.
        """

    def __call__(self, prompts: Sequence[PromptRow], answers: Sequence[str]) -> list[float]:
        """Judge a batch of answers.

        Args:
            prompts: Their prompts.
            answers: As many answers.

        Returns:
            A finite number for each; a higher one is better.
        """


class CheckJudge:
    """1 for an answer that passes a check and 0 for another; of instructions the share."""

    def __init__(
        self, check: Check, *, schema: str | Path | None = None, pattern: str | None = None
    ) -> None:
        """Prepare the check.

        Args:
            check: Which one.
            schema: For ``json``.
            pattern: For ``regex``.

        Raises:
            SettingsError: If the schema or the pattern is missing or none.
        """
        self.name: str = check
        self._schema = read_schema(schema) if check == "json" and schema is not None else {}
        self._pattern = pattern or ""
        require(check != "json" or schema is not None, "the check json needs a schema; give schema")
        require(
            check != "regex" or pattern is not None, "the check regex needs a pattern; give pattern"
        )
        if check == "regex":
            check_pattern(self._pattern)

    def check(self, prompt: PromptRow) -> None:
        """Refuse a prompt without the column that the check reads."""
        if self.name == "instructions":
            instructions_of(prompt.columns, prompt.origin)
        if self.name == "code" and not isinstance(prompt.columns.get("tests"), str):
            raise TextError(
                f"{prompt.origin} has no tests; the check code needs a column tests of Python code "
                "with assertions"
            )

    def __call__(self, prompts: Sequence[PromptRow], answers: Sequence[str]) -> list[float]:
        """Check answers one by one."""
        return [self._one(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _one(self, prompt: PromptRow, answer: str) -> float:
        if self.name == "json":
            return float(fits_schema(self._schema, answer))
        if self.name == "regex":
            return float(matches(self._pattern, answer))
        if self.name == "code":
            return float(code_passes(answer, prompt.columns["tests"]))
        return share_followed(instructions_of(prompt.columns, prompt.origin), answer)


class FunctionJudge:
    """A function of the user's, held to what it gives back."""

    def __init__(self, function: RewardFunction, name: str | None = None) -> None:
        """Take a function.

        Args:
            function: Called with turns, an answer and the other columns.
            name: What it is called in reports.
        """
        self.name: str = name or str(getattr(function, "__name__", type(function).__name__))
        self._function = function

    def check(self, prompt: PromptRow) -> None:
        """Take every prompt: only the function knows what it reads."""

    def __call__(self, prompts: Sequence[PromptRow], answers: Sequence[str]) -> list[float]:
        """Judge answers one by one."""
        return [self._one(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _one(self, prompt: PromptRow, answer: str) -> float:
        told = {name: value for name, value in prompt.columns.items() if name.isidentifier()}
        for taken in ("messages", "answer"):
            told.pop(taken, None)
        where = f"the reward function {self.name}, on an answer to {prompt.origin},"
        try:
            value = self._function(list(prompt.prompt.messages), answer, **told)
        except Exception as error:  # whatever a function of the user's may raise
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(f"{where} raised {type(error).__name__}: {reason}") from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise TrainingError(f"{where} gave {value!r:.80}; it should give a finite number")
        return number


class ModelJudge:
    """A reward model, which scores each answer behind its prompt."""

    def __init__(self, folder: str | Path) -> None:
        """Load the model.

        Args:
            folder: As ``mistill tune reward`` makes it.

        Raises:
            FolderError: If it is no reward model.
        """
        import torch

        from mistill.pytorch.reward_model import load_reward_model
        from mistill.text.vocabulary import load_vocabulary

        self.name = Path(folder).name
        model: Any = load_reward_model(folder)
        self._model = model.to("cuda") if torch.cuda.is_available() else model
        self._vocabulary = load_vocabulary(folder)
        self._longest = int(model.config.max_position_embeddings)

    def check(self, prompt: PromptRow) -> None:
        """Take every prompt."""

    def __call__(self, prompts: Sequence[PromptRow], answers: Sequence[str]) -> list[float]:
        """Score answers in batches."""
        from mistill.pytorch.reward_model import scores

        rows = [self._row(*both) for both in zip(prompts, answers, strict=True)]
        return [float(score) for score in scores(self._model, rows)]

    def _row(self, prompt: PromptRow, answer: str) -> list[int]:
        from mistill.preferences.tokens import answer_tokens
        from mistill.text.answers import prompt_ids

        if answer.strip():
            turn = {"role": "assistant", "content": answer}
            ids = list(answer_tokens(prompt.prompt, turn, self._vocabulary, prompt.origin).ids)
        else:
            ids = [*prompt_ids(prompt.prompt, self._vocabulary), self._vocabulary.end_ids[0]]
        if len(ids) > self._longest:
            raise TextError(
                f"an answer to {prompt.origin} has {len(ids)} tokens with its prompt, and the "
                f"reward model {self.name} has a context of {self._longest}; lower max_new_tokens"
            )
        return ids


def named_function(name: str) -> RewardFunction:
    """Import a function of the user's.

    Args:
        name: Module and function, such as ``rewards.brevity:score``.

    Returns:
        The function.

    Raises:
        SettingsError: If there is none of that name.
    """
    require(
        _FUNCTION.fullmatch(name) is not None,
        f"a reward function is named package.module:function, not {name!r:.80}",
    )
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"the reward function {name} cannot be imported: {error}") from error
    require(callable(found), f"{name} is no function")
    reward_function: RewardFunction = found
    return reward_function


def judge_of(
    *,
    reward: str | Path | RewardFunction | None,
    check: Check | None,
    schema: str | Path | None,
    pattern: str | None,
    function: str | None,
) -> Callable[[], Judge]:
    """The judge that settings ask for, checked now and loaded when it is called.

    Args:
        reward: The folder of a reward model, or a function.
        check: A check that a machine can make.
        schema: For the check ``json``.
        pattern: For the check ``regex``.
        function: The name of a function, such as ``package.module:function``.

    Returns:
        What makes the judge.

    Raises:
        SettingsError: If not exactly one is asked for, or it is none.
        FolderError: If the folder is no reward model.
    """
    given = [name for name, value in (("reward", reward), ("check", check)) if value is not None]
    given += ["function"] if function is not None else []
    require(
        len(given) == 1,
        "give one judge: reward (the folder of a reward model), check or function; "
        f"{' and '.join(given) if given else 'none'} {'are' if len(given) > 1 else 'is'} given",
    )
    require(schema is None or check == "json", "schema is for the check json; leave it out")
    require(pattern is None or check == "regex", "pattern is for the check regex; leave it out")
    if check is not None:
        judge: Judge = CheckJudge(check, schema=schema, pattern=pattern)
        return lambda: judge
    if function is not None:
        by_name = FunctionJudge(named_function(function), function)
        return lambda: by_name
    if isinstance(reward, str | Path):
        from mistill.folders.folder import REWARD_HEAD, is_reward_folder, open_folder

        info = open_folder(reward, rewards=True)
        require(
            info.form == "model" and is_reward_folder(info.path),
            f"{reward} is no reward model: it has no {REWARD_HEAD}; make one with mistill tune "
            "reward",
        )
        return lambda: ModelJudge(info.path)
    assert reward is not None, "one is given"
    by_hand = FunctionJudge(reward)
    return lambda: by_hand
