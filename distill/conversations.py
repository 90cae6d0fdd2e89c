"""Let a teacher write the conversations that its student learns from.

A student learns best on what its teacher would say itself (sequence-level distillation, Kim and
Rush, 2016, https://arxiv.org/abs/1606.07947). Prompts are answered in batches. Each prompt draws
from its own generator, and a batch is written down whole, so that an interrupted run goes on
where it stopped and ends with the file that an undisturbed one would have written.

It is one file because a run is one line of steps, from prompts to the files, whoever answers them.

B is batch, T positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np

from distill.choosing import Score, scorer
from distill.conversation_file import (
    beside_the_reply,
    chosen_lines,
    instruction_lines,
    publish_lines,
)
from distill.own_prompts import OWN_PROMPTS, own_prompts, turn_of_the_user
from distill.remote_teacher import remote_replies
from distill.replies import Reply as Reply
from distill.replies import text_of
from distill.replies import write_replies as write_replies
from distill.reply_filter import without_spelling
from distill.reversing import REVERSED_PROMPT, gains, read_texts
from distill.settings import GenerateSettings
from mistill.engine.sampling import Sampler, SamplingSettings
from mistill.errors import ContextError, TextError
from mistill.folders.folder import open_folder
from mistill.folders.lineage import fingerprint
from mistill.folders.publishing import begun_on, refuse_existing, working
from mistill.folders.renaming import FINISHED, remove_finished_work, remove_work
from mistill.measures.repetition import most_repeats
from mistill.preferences.reading import PromptRow, read_prompt_rows
from mistill.progress import track
from mistill.remote.chat_server import ChatServer, open_chat_server
from mistill.settings import require, result_settings, settings_from
from mistill.sources.source import resolve_model
from mistill.text.answers import prompt_ids, refuse_unwritten, thoughts_opening
from mistill.text.conversation import SYSTEMS, Conversation
from mistill.text.documents import read_prompt_conversations
from mistill.text.rows import Texts
from mistill.text.vocabulary import Vocabulary, load_vocabulary

if TYPE_CHECKING:
    from distill.options import GenerateOptions

_log = logging.getLogger(__name__)


# What a reply that is kept is called, and settings that change no reply.
_KEPT = "kept"
_SAME_REPLIES = (
    *("batch_size", "held_out", "held_out_share", "server", "api_key_file"),
    *("keep_unfinished", "max_repeats", "drop_duplicates"),
    *("by", "schema", "pattern", "pairs", "keep_share"),
)
# Sets the random numbers of prompts that a teacher writes itself apart from those of its replies.
_OWN = 1 << 32


def generate_conversations(
    teacher: str | Path,
    prompts: Texts,
    target: str | Path,
    *,
    reward: str | Path | None = None,
    forward: str | Path | None = None,
    settings: GenerateSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[GenerateOptions],
) -> Path:
    """Let a teacher answer prompts, and write the conversations as JSON lines.

    Of several replies to a prompt a judge takes the best, or the best and the worst as a pair of
    preferences. The teacher may also write the prompts itself, or the instructions to which given
    texts are the answers. An interrupted run, given again, goes on where it stopped.

    Args:
        teacher: A folder, which may hold an ONNX graph, a Hub id, a .gguf file, or ``@smollm2``;
            with ``server`` the name of a model there.
        prompts: A .txt file with a prompt on each line, or rows of prompts (``read_prompts``);
            ``@teacher`` with ``without_prompts``, and texts with ``reverse``.
        target: The .jsonl file to write, a conversation on each line, in the prompts' order.
        reward: The folder of a reward model that chooses among several replies.
        forward: With ``reverse``, a model that grades each instruction by how much likelier it
            makes its text, a folder; the best of several instructions is kept.
        settings: How the teacher writes; or its fields as keywords.
        overwrite: Whether existing files are replaced.
        **options: Fields of ``GenerateSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range, or several replies have not exactly one judge.
        TextError: If there are no prompts, or the teacher ended none of its replies.
        TargetExistsError: If the target exists and may not be replaced.
        ContextError: If a prompt leaves no room for a reply.
    """
    settings = settings_from(GenerateSettings, settings, options)
    target = _refuse(target, overwrite)
    held_out = None if settings.held_out is None else _refuse(settings.held_out, overwrite)
    require(held_out != target, f"held_out and the target are the same file, {target}")
    _refuse_missing_sides(prompts, reward, forward, settings)
    rows = _rows_of(prompts, settings)
    if settings.system is not None and not settings.without_prompts:
        rows = [replace(row, prompt=_with_system(row.prompt, settings.system)) for row in rows]
    if settings.server is not None:
        remote = open_chat_server(settings.server, str(teacher), settings.api_key_file)
        talks = [row.prompt for row in rows]
        return _from_server(remote, talks, target, held_out, settings, overwrite)
    folder = resolve_model(teacher)
    info = open_folder(folder)
    vocabulary = load_vocabulary(folder, today=begun_on(target))
    choice = None
    if settings.best_of > 1 and not settings.reverse:
        choice = scorer(settings, reward, folder, vocabulary)
        for row in rows:
            choice[0](row)
    ids = [_prompt_ids(number, row.prompt, vocabulary) for number, row in enumerate(rows, 1)]
    begin, after = turn_of_the_user(settings.system, vocabulary) if not rows else ([], "")
    _check_room(ids or [begin], settings.max_new_tokens, info.context_length)

    key = {
        "step": "generate",
        "settings": result_settings(settings, *_SAME_REPLIES),
        "teacher": fingerprint(folder),
        "prompts": _digest([row.prompt for row in rows]),
        **vocabulary.date_key,
    }
    if info.form != "onnx":
        from mistill.pytorch.reading import require_finite_weights

        require_finite_weights(folder)
    with working(target, key, anew=overwrite) as work:
        if settings.without_prompts:
            beginnings = [begin] * settings.without_prompts
            record = work / "prompts.jsonl"
            turns = _resumed_replies(record, folder, vocabulary, beginnings, settings, _OWN)
            own_talks = own_prompts(turns, after, vocabulary, settings.system)
            rows = [
                PromptRow(talk, {}, f"prompt {number} of the teacher")
                for number, talk in enumerate(own_talks, 1)
            ]
            ids = [
                _prompt_ids(number, row.prompt, vocabulary) for number, row in enumerate(rows, 1)
            ]
            _check_room(ids, settings.max_new_tokens, info.context_length)
        repeated = [one for one in ids for _ in range(settings.best_of)]
        replies = _resumed_replies(work / "replies.jsonl", folder, vocabulary, repeated, settings)
        _write(
            work, rows, repeated, replies, choice, forward, vocabulary, target, held_out, settings
        )
    return target


def _refuse_missing_sides(
    prompts: Texts,
    reward: str | Path | None,
    forward: str | Path | None,
    settings: GenerateSettings,
) -> None:
    """Refuse options that need one another."""
    writes_prompts = str(prompts) == OWN_PROMPTS
    require(
        writes_prompts == (settings.without_prompts > 0),
        f"without_prompts and the prompts {OWN_PROMPTS} belong together; give both, or a file of "
        "prompts",
    )
    require(
        reward is None or (settings.best_of > 1 and not settings.reverse),
        "a reward model chooses among several replies; give best_of of at least 2",
    )
    require(
        forward is None or settings.reverse,
        "a forward model grades instructions; give reverse, or leave it out",
    )
    require(
        forward is not None or not settings.reverse or settings.best_of == 1,
        "the best of several instructions is chosen by a forward model; give forward",
    )
    require(
        forward is not None or settings.keep_share == 1,
        "keep_share is of what a forward model graded; give forward, or leave it out",
    )
    if forward is not None:
        info = open_folder(resolve_model(forward))
        require(
            info.form != "onnx", f"the forward model {forward} is an ONNX folder; give its source"
        )


def _rows_of(prompts: Texts, settings: GenerateSettings) -> list[PromptRow]:
    """The prompts, none where the teacher writes them itself."""
    if settings.without_prompts:
        return []
    if settings.reverse:
        return [
            PromptRow(
                Conversation(({"role": "user", "content": REVERSED_PROMPT.format(text=text)},)),
                {"text": text},
                f"text {number}",
            )
            for number, text in enumerate(read_texts(prompts), 1)
        ]
    if settings.best_of > 1:
        return read_prompt_rows(prompts, skip_bad_rows=settings.skip_bad_rows)
    talks = read_prompt_conversations(prompts, skip_bad_rows=settings.skip_bad_rows)
    return [PromptRow(talk, {}, f"prompt {number}") for number, talk in enumerate(talks, 1)]


def _write(
    work: Path,
    rows: Sequence[PromptRow],
    ids: Sequence[Sequence[int]],
    replies: Sequence[Reply],
    choice: tuple[Any, Score] | None,
    forward: str | Path | None,
    vocabulary: Vocabulary,
    target: Path,
    held_out: Path | None,
    settings: GenerateSettings,
) -> None:
    """Choose among the replies where there are several, and write what is kept."""
    texts = [text_of(reply, vocabulary) for reply in replies]
    finished = [reply.finished for reply in replies]
    if choice is None and not settings.reverse:
        talks = [row.prompt for row in rows]
        openings = [thoughts_opening(talk, vocabulary) for talk in talks]
        _finish(work, talks, texts, finished, openings, target, held_out, settings)
        return
    outcomes = _outcomes(texts, finished, settings)
    good = [outcome == _KEPT for outcome in outcomes]
    row_of_reply = [row for row in rows for _ in range(settings.best_of)]
    _report(outcomes, settings)
    if settings.reverse:
        graded = None
        if forward is not None:
            source_texts = [row.columns["text"] for row in row_of_reply]
            graded = gains(resolve_model(forward), texts, source_texts)
        lines = instruction_lines(rows, texts, good, graded, settings)
    else:
        assert choice is not None, "several replies have a judge"
        scores = choice[1](row_of_reply, ids, replies)
        lines = chosen_lines(rows, texts, good, scores, vocabulary, settings)
    if not lines:
        raise TextError(
            "all replies to every prompt tie, so that there is no pair; raise best_of or "
            "temperature, or choose by another judge"
        )
    (work / FINISHED).touch()
    publish_lines(lines, target, held_out, settings.held_out_share)
    remove_work(work)


def _from_server(
    teacher: ChatServer,
    talks: Sequence[Conversation],
    target: Path,
    held_out: Path | None,
    settings: GenerateSettings,
    overwrite: bool,
) -> Path:
    """The same with a teacher behind a server, which renders the conversations itself."""
    key = {
        "step": "generate",
        "settings": result_settings(settings, *_SAME_REPLIES),
        "teacher": teacher.model,
        "prompts": _digest(talks),
    }

    def fields(number: int) -> dict[str, Any]:
        return {
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "seed": (settings.seed * 1_000_003 + number) % 2**31,
        }

    with working(target, key, anew=overwrite) as work:
        replies = remote_replies(
            teacher,
            talks,
            work / "replies.jsonl",
            at_once=min(settings.batch_size, len(talks)),
            settings_of=fields,
        )
        texts = [reply.text.strip() for reply in replies]
        finished = [reply.finished for reply in replies]
        _finish(work, talks, texts, finished, [""] * len(talks), target, held_out, settings)
    return target


def _finish(
    work: Path,
    talks: Sequence[Conversation],
    texts: Sequence[str],
    finished: Sequence[bool],
    openings: Sequence[str],
    target: Path,
    held_out: Path | None,
    settings: GenerateSettings,
) -> None:
    """Write the conversations whose replies are kept, and remove what the work has left."""
    outcomes = _outcomes(texts, finished, settings)
    conversations = [
        beside_the_reply(talk, opening + text)
        for talk, opening, text, outcome in zip(talks, openings, texts, outcomes, strict=True)
        if outcome == _KEPT
    ]
    _report(outcomes, settings)
    (work / FINISHED).touch()
    publish_lines(conversations, target, held_out, settings.held_out_share)
    remove_work(work)


def _refuse(target: str | Path, overwrite: bool) -> Path:
    path = Path(target).expanduser().absolute()
    require(path.suffix.lower() == ".jsonl", f"the target must end in .jsonl, not {target}")
    if overwrite and path.is_file():
        remove_finished_work(path)
        return path
    return refuse_existing(path)


def _with_system(talk: Conversation, system: str) -> Conversation:
    turn = {"role": "system", "content": system}
    others = (message for message in talk.messages if message["role"] not in SYSTEMS)
    return replace(talk, messages=(turn, *others))


def _prompt_ids(number: int, talk: Conversation, vocabulary: Vocabulary) -> list[int]:
    try:
        refuse_unwritten(talk, vocabulary)
        return prompt_ids(talk, vocabulary)
    except TextError as error:
        raise TextError(f"prompt {number}: {error}") from error


def _digest(talks: Sequence[Conversation]) -> str:
    rows = [beside_the_reply(talk, None) for talk in talks]
    contents = [row if len(row) > 1 else row["messages"] for row in rows]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _check_room(prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int) -> None:
    longest = max(range(len(prompts)), key=lambda number: len(prompts[number]))
    needed = len(prompts[longest]) + max_new_tokens
    if needed > context:
        raise ContextError(
            f"prompt {longest + 1} and {max_new_tokens} new tokens need {needed} positions, but "
            f"the teacher has {context}; shorten the prompt or lower max_new_tokens"
        )


def _outcomes(
    texts: Sequence[str], finished: Sequence[bool], settings: GenerateSettings
) -> list[str]:
    """What becomes of every reply: that it is kept, or why it is dropped."""
    outcomes, before = [], set()
    for text, ended in zip(texts, finished, strict=True):
        words = without_spelling(text)
        if not ended and not settings.keep_unfinished:
            outcome = f"cut off after {settings.max_new_tokens} tokens"
        elif not text:
            outcome = "empty"
        elif settings.max_repeats and most_repeats(text) > settings.max_repeats:
            outcome = "that repeat themselves"
        elif settings.drop_duplicates and words in before:
            outcome = "given before"
        else:
            outcome = _KEPT
            before.add(words)
        outcomes.append(outcome)
    return outcomes


def _report(outcomes: Sequence[str], settings: GenerateSettings) -> None:
    dropped = Counter(outcome for outcome in outcomes if outcome != _KEPT)
    kept = len(outcomes) - dropped.total()
    reasons = ", ".join(f"{count} {outcome}" for outcome, count in dropped.items())
    words = f"; dropped replies: {reasons}" if reasons else ""
    _log.info("%d prompts, %d conversations kept%s", len(outcomes), kept, words)
    if not kept:
        raise TextError(
            f"none of the {len(outcomes)} replies is kept: {reasons}; raise max_new_tokens "
            f"(now {settings.max_new_tokens}), set keep_unfinished, or ask for less of the replies"
        )


# --- resuming -----------------------------------------------------------------------------------


def _resumed_replies(
    record: Path,
    folder: Path,
    vocabulary: Vocabulary,
    prompts: Sequence[Sequence[int]],
    settings: GenerateSettings,
    first: int = 0,
) -> list[Reply]:
    """The replies to all prompts, those in the record first, the rest written now.

    The number of a prompt, counted from ``first``, seeds its random numbers.
    """
    size = settings.batch_size
    all_replies = _recorded(record, len(prompts), size)
    with track("writing conversations", len(prompts), "prompts", done=len(all_replies)) as progress:
        if len(all_replies) < len(prompts):
            write = _writer(folder, vocabulary, settings)
            for start in range(len(all_replies), len(prompts), size):
                batch = prompts[start : start + size]
                numbers = range(first + start, first + start + len(batch))
                replies = write(batch, numbers, progress.advance)
                _record(record, replies)
                all_replies += replies
    return all_replies


def _recorded(record: Path, prompts: int, batch_size: int) -> list[Reply]:
    """Replies of the batches that were written down whole; what follows them is cut off."""
    if not record.is_file():
        return []
    lines = record.read_bytes().split(b"\n")[:-1]  # the last line has an end only if it is whole
    count = len(lines) if len(lines) == prompts else len(lines) // batch_size * batch_size
    whole_lines = lines[:count]
    with record.open("r+b") as opened:
        opened.truncate(sum(len(line) + 1 for line in whole_lines))
    return [Reply(**json.loads(line)) for line in whole_lines]


def _record(record: Path, replies: Sequence[Reply]) -> None:
    lines = "".join(json.dumps(reply._asdict()) + "\n" for reply in replies)
    with record.open("ab") as opened:
        opened.write(lines.encode())
        opened.flush()
        os.fsync(opened.fileno())


# --- writing ------------------------------------------------------------------------------------

_Write = Callable[[Sequence[Sequence[int]], Sequence[int], Callable[[], None]], list[Reply]]


def _writer(folder: Path, vocabulary: Vocabulary, settings: GenerateSettings) -> _Write:
    """Load a teacher, and return what answers a batch of prompts by their numbers."""
    sampling = SamplingSettings(
        temperature=settings.temperature, top_p=settings.top_p, top_k=0, min_p=0.0
    )

    def samplers(numbers: Sequence[int]) -> list[Sampler]:
        return [
            Sampler(sampling, np.random.default_rng([settings.seed, number])) for number in numbers
        ]

    if open_folder(folder).form == "onnx":
        from distill.onnx_teacher import onnx_writer

        answer = onnx_writer(folder, vocabulary.end_ids, settings.max_new_tokens)
        return lambda prompts, numbers, finished: [
            Reply(*reply) for reply in answer(prompts, samplers(numbers), finished)
        ]
    import torch

    from mistill.pytorch.loading import load_pytorch

    on_gpu = torch.cuda.is_available()
    model = load_pytorch(folder, torch.bfloat16 if on_gpu else torch.float32)
    if on_gpu:
        cast(torch.nn.Module, model).to("cuda")

    def write(
        prompts: Sequence[Sequence[int]], numbers: Sequence[int], finished: Callable[[], None]
    ) -> list[Reply]:
        return write_replies(
            model, prompts, samplers(numbers), vocabulary.end_ids, settings.max_new_tokens, finished
        )

    return write
