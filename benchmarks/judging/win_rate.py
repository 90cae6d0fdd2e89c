"""Two models answer the same prompts, and a third says whose replies are better."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np

from benchmarks.figures.machine import Machine, describe_machine
from benchmarks.judging.letters import LetterJudge, ModelJudge
from benchmarks.judging.replies import rendered_prompts, write_replies
from benchmarks.judging.server_judge import ServerJudge
from benchmarks.judging.verdicts import Verdicts, figures_of, judge_pairs
from benchmarks.measure.subjects import short_names
from benchmarks.settings import JudgeSettings
from mistill.cost_model.processors import usable_threads
from mistill.errors import TextError, VocabularyError
from mistill.folders.folder import FolderInfo, open_folder
from mistill.folders.lineage import file_name, fingerprint
from mistill.measures.significance import students_t
from mistill.preferences.reading import PromptRow, read_prompt_rows
from mistill.progress import track
from mistill.remote.chat_server import open_chat_server
from mistill.settings import require, settings_dict, settings_from
from mistill.sources.source import resolve_model
from mistill.text.rows import Texts, sources_of
from mistill.text.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.options import JudgeOptions

_log = logging.getLogger(__name__)

SCHEMA = "mistill-judgement-1"

ReadBy = Literal["probabilities", "letters"]

# Both orders of a judge that draws its letters at random agree about half of the pairs.
_CHANCE = 0.5


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Whose replies a judge prefers.

    Attributes:
        date: When it was finished, in UTC.
        models: Names of the two models; the win rate is the second one's.
        judge: Name of the judge.
        read_by: What was read of its answers: ``probabilities`` of the letters, or ``letters`` that
            a server wrote at temperature 0.
        fingerprints: Short names for the content of the three folders; None for a judge behind a
            server.
        prompts: Names of the prompts' files.
        settings: How many prompts, and how long the replies.
        machine: The machine it ran on.
        verdicts: What the judge said of each pair.
    """

    date: str
    models: tuple[str, str]
    judge: str
    read_by: ReadBy
    fingerprints: tuple[str, str, str | None]
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
            "read_by": self.read_by,
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
        by = "the probabilities of its letters"
        if self.read_by == "letters":
            by = "the letters that it writes at temperature 0"
        table.add_column(plain(f"judged by {self.judge}, by {by}"))
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
    judge: str | Path | None = None,
    prompts: Texts,
    settings: JudgeSettings | None = None,
    **options: Unpack[JudgeOptions],
) -> Judgement:
    """Let two models answer prompts, and a third say in both orders whose reply is better.

    Args:
        first: A chat model, such as the one that was tuned: a folder of any form, or what names a
            model.
        second: The other one, such as what tuning made of it; the win rate is its own.
        judge: A chat model; best one that is neither of the two, nor made from them. None for one
            behind the server that the settings name.
        prompts: Prompts to answer: a .txt file with a prompt on each line, or rows of prompts.
        settings: How many prompts, and how long the replies.
        **options: Fields of ``JudgeSettings``, instead of ``settings``.

    Returns:
        Every verdict, and what they come to.

    Raises:
        SettingsError: If a setting is out of range, both models are the same folder, not exactly
            one judge is given, or its server does not answer or lacks the model.
        FolderError: If a folder is missing or broken.
        TextError: If there are no prompts, one does not fit a model, or no answer of a server is a
            letter.
        VocabularyError: If a model has no chat template.
    """
    settings = settings_from(JudgeSettings, settings, options)
    students_t()  # refuse before anything is written, where scipy is missing
    require(
        (judge is None) != (settings.server is None),
        "give one judge: judge (a model) or server (the address of one); "
        f"{'none is' if judge is None else 'both are'} given",
    )
    folders = [first, second] if judge is None else [first, second, judge]
    infos = [open_folder(resolve_model(model)) for model in folders]
    models = infos[:2]
    prints = [fingerprint(info.path) for info in infos]
    require(
        prints[0] != prints[1],
        f"{first} and {second} are the same model, which wins against itself by chance alone; "
        "give two",
    )
    _require_templates(infos)
    server = None
    if settings.server is not None:
        server = open_chat_server(settings.server, settings.server_model, settings.api_key_file)
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
    judging: LetterJudge = (
        ModelJudge(infos[2].path, threads) if server is None else ServerJudge(server)
    )
    with track("judging", len(chosen), "pairs") as progress:
        pairs = zip((row.prompt for row in chosen), *replies, strict=True)
        verdicts = judge_pairs(pairs, judging, progress)
    written = isinstance(judging, ServerJudge) and judging.written
    if isinstance(judging, ServerJudge) and verdicts.unclear and not verdicts.given:
        raise TextError(
            f"{judging.server.model} at {judging.server.place} should answer with one letter, A or "
            f"B, and says {judging.last_unclear!r}; take another judge"
        )
    names = short_names([str(model) for model in (first, second)])
    judgement = Judgement(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        models=(names[0], names[1]),
        judge=infos[2].path.name if server is None else f"{server.model} at {server.place}",
        read_by="letters" if written else "probabilities",
        fingerprints=(prints[0], prints[1], prints[2] if server is None else None),
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
    if figures["unclear"]:
        _log.warning("%d pairs are left out: the judge answered with no letter", figures["unclear"])
    if figures["letters_are_rare"]:
        _log.warning(
            "the letters A and B together have a probability of %.3f: the judge would mostly say "
            "something else, and the win rate says little; give a better judge",
            figures["letters"],
        )
    interval = figures["agreement_interval"]
    if interval is not None and interval[0] <= _CHANCE:
        _log.warning(
            "both orders agree about %.0f%% of the pairs, and those of a judge that draws its "
            "letters about %.0f%%: the win rate says little; give a better judge, or more prompts",
            100 * figures["agreement"],
            100 * _CHANCE,
        )
