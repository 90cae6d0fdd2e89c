"""Two models answer the same prompts, and a third says whose replies are better."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from benchmarks.figures.machine import Machine, describe_machine
from benchmarks.judging.letters import ModelJudge
from benchmarks.judging.replies import rendered_prompts, write_replies
from benchmarks.judging.verdicts import Verdicts, figures_of, judge_pairs
from benchmarks.measure.subjects import short_names
from benchmarks.settings import JudgeSettings
from mistill.cost_model.processors import usable_threads
from mistill.errors import VocabularyError
from mistill.folders.folder import FolderInfo, open_folder
from mistill.folders.lineage import file_name, fingerprint
from mistill.measures.significance import students_t
from mistill.preferences.reading import PromptRow, read_prompt_rows
from mistill.progress import track
from mistill.settings import require, settings_dict, settings_from
from mistill.sources.source import resolve_model
from mistill.text.rows import Texts, sources_of
from mistill.text.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.options import JudgeOptions

_log = logging.getLogger(__name__)

SCHEMA = "mistill-judgement-1"

# Both orders of a judge that draws its letters at random agree about half of the pairs.
_CHANCE = 0.5


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Whose replies a judge prefers.

    Attributes:
        date: When it was finished, in UTC.
        models: Names of the two models; the win rate is the second one's.
        judge: Name of the judge.
        fingerprints: Short names for the content of the three folders.
        prompts: Names of the prompts' files.
        settings: How many prompts, and how long the replies.
        machine: The machine it ran on.
        verdicts: What the judge said of each pair.
    """

    date: str
    models: tuple[str, str]
    judge: str
    fingerprints: tuple[str, str, str]
    prompts: tuple[str, ...]
    settings: JudgeSettings
    machine: Machine
    verdicts: Verdicts

    @property
    def figures(self) -> dict[str, Any]:
        """What the verdicts come to, from ``benchmarks.judging.verdicts.figures_of``."""
        return figures_of(self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """The judgement as plain values.

        Returns:
            What a JSON document holds: the figures, and of each pair its prompt, both replies and
            by how many nats the judge preferred the second model's in each order.
        """
        return {
            "schema": SCHEMA,
            "date": self.date,
            "models": list(self.models),
            "judge": self.judge,
            "fingerprints": list(self.fingerprints),
            "prompts": list(self.prompts),
            "settings": settings_dict(self.settings),
            "machine": asdict(self.machine),
            **self.figures,
            "verdicts": [
                {
                    "messages": list(verdict.prompt.messages),
                    "replies": list(verdict.replies),
                    "gains": list(verdict.gains),
                }
                for verdict in self.verdicts.given
            ],
        }

    def table(self) -> Table:
        """The figures as a table for the terminal, the agreement of the two orders first.

        Returns:
            A table of rich.
        """
        from rich import box
        from rich.table import Table

        from mistill.shown import plain

        figures, second = self.figures, self.models[1]
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        table.add_column(plain(f"judged by {self.judge}"))
        for head in ("of", "share", "95% interval"):
            table.add_column(head, justify="right")
        rows: list[tuple[str, int | None, str, str | None]] = [
            ("both orders agree", figures["pairs"], "agreement", "agreement_interval"),
            (
                f"{second} wins, where they agree",
                figures["agreeing"],
                "win_rate",
                "win_rate_interval",
            ),
            (
                *(f"{second} wins, by the mean of both orders", figures["pairs"]),
                *("mean_win_rate", "mean_win_rate_interval"),
            ),
            ("the reply that stood first wins", 2 * figures["pairs"], "first_place", None),
            ("the longer reply wins, where they agree", None, "longer_wins", None),
            ("probability of the two letters", None, "letters", None),
        ]
        for words, count, share, interval in rows:
            value, between = figures[share], None if interval is None else figures[interval]
            table.add_row(
                plain(words),
                "" if count is None else f"{count:,}",
                "none" if value is None else f"{value:.3f}",
                "" if between is None else "{:.3f} to {:.3f}".format(*between),
            )
        return table


def judge_replies(
    first: str | Path,
    second: str | Path,
    *,
    judge: str | Path,
    prompts: Texts,
    settings: JudgeSettings | None = None,
    **options: Unpack[JudgeOptions],
) -> Judgement:
    """Let two models answer prompts, and a third say in both orders whose reply is better.

    Args:
        first: A chat model, such as the one that was tuned: a folder of any form, or what names a
            model.
        second: The other one, such as what tuning made of it; the win rate is its own.
        judge: A chat model; best one that is neither of the two, nor made from them.
        prompts: Prompts to answer: a .txt file with a prompt on each line, or rows of prompts.
        settings: How many prompts, and how long the replies.
        **options: Fields of ``JudgeSettings``, instead of ``settings``.

    Returns:
        Every verdict, and what they come to.

    Raises:
        SettingsError: If a setting is out of range, or both models are the same folder.
        FolderError: If a folder is missing or broken.
        TextError: If there are no prompts, or one does not fit a model.
        VocabularyError: If a model has no chat template.
    """
    settings = settings_from(JudgeSettings, settings, options)
    students_t()  # refuse before anything is written, where scipy is missing
    infos = [open_folder(resolve_model(model)) for model in (first, second, judge)]
    models, judging = infos[:2], infos[2]
    prints = [fingerprint(info.path) for info in infos]
    require(
        prints[0] != prints[1],
        f"{first} and {second} are the same model, which wins against itself by chance alone; "
        "give two",
    )
    _require_templates(infos)
    chosen = _evenly(
        read_prompt_rows(prompts, skip_bad_rows=settings.skip_bad_rows), settings.limit
    )
    rendered = [rendered_prompts(info.path, chosen, settings.new_tokens) for info in models]
    threads = settings.threads or usable_threads()
    machine = describe_machine(threads)
    replies = []
    with track("replying", 2 * len(chosen), "replies") as progress:
        for info, texts in zip(models, rendered, strict=True):
            replies.append(
                write_replies(
                    info.path,
                    texts,
                    new_tokens=settings.new_tokens,
                    threads=threads,
                    progress=progress,
                )
            )
    with track("judging", len(chosen), "pairs") as progress:
        pairs = zip((row.prompt for row in chosen), *replies, strict=True)
        verdicts = judge_pairs(pairs, ModelJudge(judging.path, threads), progress)
    names = short_names([str(model) for model in (first, second)])
    judgement = Judgement(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        models=(names[0], names[1]),
        judge=judging.path.name,
        fingerprints=(prints[0], prints[1], prints[2]),
        prompts=tuple(str(file_name(source)) for source in sources_of(prompts)),
        settings=settings,
        machine=machine,
        verdicts=verdicts,
    )
    _warn(judgement)
    return judgement


def _require_templates(infos: Sequence[FolderInfo]) -> None:
    for info in infos:
        if load_vocabulary(info.path).chat_template is None:
            raise VocabularyError(
                f"{info.path} has no chat template, so it can neither reply nor judge; give a chat "
                "model"
            )


def _evenly(prompts: Sequence[PromptRow], limit: int | None) -> list[PromptRow]:
    """At most so many prompts, evenly from all of them."""
    count = min(len(prompts), limit or len(prompts))
    places = np.linspace(0, len(prompts) - 1, count).round().astype(int)
    return [prompts[place] for place in places]


def _warn(judgement: Judgement) -> None:
    """Say so where a win rate means nothing."""
    figures = judgement.figures
    if figures["same"] or figures["too_long"]:
        _log.warning(
            "%d pairs of equal replies and %d that do not fit the judge's context are left out",
            figures["same"],
            figures["too_long"],
        )
    interval = figures["agreement_interval"]
    if interval is not None and interval[0] <= _CHANCE:
        _log.warning(
            "both orders agree about %.0f%% of the pairs, and those of a judge that draws its "
            "letters about %.0f%%: the win rate says little; give a better judge, or more prompts",
            100 * figures["agreement"],
            100 * _CHANCE,
        )
