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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from distill.remote_teacher import RemoteTeacher, remote_replies, remote_teacher
from distill.reply_filter import most_repeats, without_spelling
from distill.settings import GenerateSettings
from mistill.engine.sampling import Sampler, SamplingSettings
from mistill.errors import ContextError, TextError
from mistill.folders.folder import open_folder
from mistill.folders.lineage import fingerprint
from mistill.folders.publishing import begun_on, refuse_existing, working, write_atomically
from mistill.folders.renaming import FINISHED, remove_finished_work, remove_work
from mistill.progress import track
from mistill.settings import require, result_settings, settings_from
from mistill.sources.source import resolve_model
from mistill.text.answers import prompt_ids, refuse_unwritten, thoughts_opening
from mistill.text.conversation import SYSTEMS, Conversation
from mistill.text.documents import read_prompt_conversations
from mistill.text.rows import Texts
from mistill.text.vocabulary import Message, Vocabulary, load_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.options import GenerateOptions

_log = logging.getLogger(__name__)


# What a reply that is kept is called, and settings that change no reply.
_KEPT = "kept"
_SAME_REPLIES = (
    *("batch_size", "held_out", "held_out_share", "server", "api_key_file"),
    *("keep_unfinished", "max_repeats", "drop_duplicates"),
)


class Reply(NamedTuple):
    """What a teacher said.

    Attributes:
        ids: Token ids, without the one that ends the turn.
        finished: Whether the teacher ended its turn itself.
    """

    ids: list[int]
    finished: bool


def generate_conversations(
    teacher: str | Path,
    prompts: Texts,
    target: str | Path,
    *,
    settings: GenerateSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[GenerateOptions],
) -> Path:
    """Let a teacher answer prompts, and write the conversations as JSON lines.

    An interrupted run, given again, goes on where it stopped.

    Args:
        teacher: A folder, which may hold an ONNX graph, a Hub id, a .gguf file, or ``@smollm2``;
            with ``server`` the name of a model there.
        prompts: A .txt file with a prompt on each line, or rows of prompts (``read_prompts``).
        target: The .jsonl file to write, a conversation on each line, in the prompts' order.
        settings: How the teacher writes; or its fields as keywords.
        overwrite: Whether existing files are replaced.
        **options: Fields of ``GenerateSettings``.

    Returns:
        The target.

    Raises:
        TextError: If there are no prompts, or the teacher ended none of its replies.
        TargetExistsError: If the target exists and may not be replaced.
        ContextError: If a prompt leaves no room for a reply.
    """
    settings = settings_from(GenerateSettings, settings, options)
    target = _refuse(target, overwrite)
    held_out = None if settings.held_out is None else _refuse(settings.held_out, overwrite)
    require(held_out != target, f"held_out and the target are the same file, {target}")
    talks = read_prompt_conversations(prompts, skip_bad_rows=settings.skip_bad_rows)
    if settings.system is not None:
        talks = [_with_system(talk, settings.system) for talk in talks]
    if settings.server is not None:
        remote = remote_teacher(settings.server, str(teacher), settings.api_key_file)
        return _from_server(remote, talks, target, held_out, settings, overwrite)
    folder = resolve_model(teacher)
    info = open_folder(folder)
    vocabulary = load_vocabulary(folder, today=begun_on(target))
    ids = [_prompt_ids(number, talk, vocabulary) for number, talk in enumerate(talks, 1)]
    _check_room(ids, settings.max_new_tokens, info.context_length)

    key = {
        "step": "generate",
        "settings": result_settings(settings, *_SAME_REPLIES),
        "teacher": fingerprint(folder),
        "prompts": _digest(talks),
        **vocabulary.date_key,
    }
    if info.form != "onnx":
        from mistill.pytorch.reading import require_finite_weights

        require_finite_weights(folder)
    with working(target, key, anew=overwrite) as work:
        replies = _resumed_replies(work / "replies.jsonl", folder, vocabulary, ids, settings)
        texts = [vocabulary.decode(reply.ids).strip() for reply in replies]
        finished = [reply.finished for reply in replies]
        openings = [thoughts_opening(talk, vocabulary) for talk in talks]
        _finish(work, talks, texts, finished, openings, target, held_out, settings)
    return target


def _from_server(
    teacher: RemoteTeacher,
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
    fates = _fates(texts, finished, settings)
    conversations = [
        _beside_the_reply(talk, opening + text)
        for talk, opening, text, fate in zip(talks, openings, texts, fates, strict=True)
        if fate == _KEPT
    ]
    _report(fates, settings)
    (work / FINISHED).touch()
    _publish(conversations, target, held_out, settings.held_out_share)
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
    rows = [_beside_the_reply(talk, None) for talk in talks]
    said = [row if len(row) > 1 else row["messages"] for row in rows]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _beside_the_reply(talk: Conversation, reply: str | None) -> dict[str, Any]:
    """A row of a file: the turns, the reply, and what stands beside them."""
    last = [] if reply is None else [{"role": "assistant", "content": reply}]
    row: dict[str, Any] = {"messages": [*talk.messages, *last]}
    beside = {
        "tools": talk.tools,
        "documents": talk.documents,
        "chat_template_kwargs": talk.variables,
    }
    return row | {name: value for name, value in beside.items() if value}


def _check_room(prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int) -> None:
    longest = max(range(len(prompts)), key=lambda number: len(prompts[number]))
    needed = len(prompts[longest]) + max_new_tokens
    if needed > context:
        raise ContextError(
            f"prompt {longest + 1} and {max_new_tokens} new tokens need {needed} positions, but "
            f"the teacher has {context}; shorten the prompt or lower max_new_tokens"
        )


def _fates(texts: Sequence[str], finished: Sequence[bool], settings: GenerateSettings) -> list[str]:
    """What becomes of every reply: that it is kept, or why it is dropped."""
    fates, before = [], set()
    for text, ended in zip(texts, finished, strict=True):
        words = without_spelling(text)
        if not text:
            fate = "empty"
        elif not ended and not settings.keep_unfinished:
            fate = f"cut off after {settings.max_new_tokens} tokens"
        elif settings.max_repeats and most_repeats(text) > settings.max_repeats:
            fate = "that repeat themselves"
        elif settings.drop_duplicates and words in before:
            fate = "given before"
        else:
            fate = _KEPT
            before.add(words)
        fates.append(fate)
    return fates


def _report(fates: Sequence[str], settings: GenerateSettings) -> None:
    dropped = Counter(fate for fate in fates if fate != _KEPT)
    kept = len(fates) - dropped.total()
    reasons = ", ".join(f"{count} {fate}" for fate, count in dropped.items())
    words = f"; dropped replies: {reasons}" if reasons else ""
    _log.info("%d prompts, %d conversations kept%s", len(fates), kept, words)
    if not kept:
        raise TextError(
            f"none of the {len(fates)} replies is kept: {reasons}; raise max_new_tokens "
            f"(now {settings.max_new_tokens}), set keep_unfinished, or ask for less of the replies"
        )


def _publish(
    conversations: Sequence[Mapping[str, Any]],
    target: Path,
    held_out: Path | None,
    held_out_share: float,
) -> None:
    """Write the files, each whole or not at all."""
    rest = list(conversations)
    if held_out is not None:
        shares = [prompt_share(row["messages"]) for row in rest]
        share = [row for row, place in zip(rest, shares, strict=True) if place < held_out_share]
        rest = [row for row, place in zip(rest, shares, strict=True) if place >= held_out_share]
        held_out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(held_out, _json_lines(share))
    write_atomically(target, _json_lines(rest))


def _json_lines(conversations: Sequence[Mapping[str, Any]]) -> str:
    lines = (json.dumps(row, ensure_ascii=False) for row in conversations)
    return "".join(line + "\n" for line in lines)


def prompt_share(conversation: Sequence[Message]) -> float:
    """A number from 0 to 1 that depends on what the user says first and on nothing else.

    Args:
        conversation: Turns.

    Returns:
        The first 32 bits of the SHA-256 of the user's first turn, divided by 2 to the 32.
    """
    first_turn = str(
        next(message["content"] for message in conversation if message["role"] == "user")
    )
    return int.from_bytes(hashlib.sha256(first_turn.encode()).digest()[:4], "big") / 2**32


# --- resuming -----------------------------------------------------------------------------------


def _resumed_replies(
    record: Path,
    folder: Path,
    vocabulary: Vocabulary,
    prompts: Sequence[Sequence[int]],
    settings: GenerateSettings,
) -> list[Reply]:
    """The replies to all prompts, those in the record first, the rest written now."""
    size = settings.batch_size
    done = _recorded(record, len(prompts), size)
    with track("writing conversations", len(prompts), "prompts", done=len(done)) as progress:
        if len(done) < len(prompts):
            write = _writer(folder, vocabulary, settings)
            for start in range(len(done), len(prompts), size):
                numbers = range(start, min(start + size, len(prompts)))
                batch = [prompts[number] for number in numbers]
                replies = write(batch, numbers, progress.advance)
                _record(record, replies)
                done += replies
    return done


def _recorded(record: Path, prompts: int, batch_size: int) -> list[Reply]:
    """Replies of the batches that were written down whole; what follows them is cut off."""
    if not record.is_file():
        return []
    lines = record.read_bytes().split(b"\n")[:-1]  # the last line has an end only if it is whole
    whole = len(lines) if len(lines) == prompts else len(lines) // batch_size * batch_size
    whole_lines = lines[:whole]
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


def write_replies(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    choose: Sequence[Callable[[NDArray[np.float32]], int]],
    end_ids: Sequence[int],
    max_new_tokens: int,
    finished: Callable[[], None] = lambda: None,
) -> list[Reply]:
    """Answer several prompts at once, padded on the left.

    A prompt whose reply has ended leaves the batch, so that a long reply does not keep the short
    ones computing.

    Args:
        model: A Llama or Mistral with its head, in eval mode.
        prompts: B prompts, token ids, none empty.
        choose: One function for each prompt, from logits (V,) to a token.
        end_ids: Tokens at which a reply ends.
        max_new_tokens: Most tokens of a reply.
        finished: Called once for each reply that ends.

    Returns:
        B replies.
    """
    replies: list[Reply] = [Reply([], False) for _ in prompts]
    going = list(range(len(prompts)))
    for logits, leave in _steps(model, prompts, max_new_tokens):
        tokens = [choose[row](scores) for row, scores in zip(going, logits, strict=True)]
        stay = []
        for place, (row, token) in enumerate(zip(going, tokens, strict=True)):
            if token in end_ids:
                replies[row] = Reply(replies[row].ids, True)
                continue
            replies[row].ids.append(token)
            if len(replies[row].ids) < max_new_tokens:
                stay.append(place)
        for _ in range(len(going) - len(stay)):
            finished()
        going = [going[place] for place in stay]
        leave(stay, [tokens[place] for place in stay])
    return replies


_Leave = Callable[[Sequence[int], Sequence[int]], None]


def _steps(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Iterator[tuple[NDArray[np.float32], _Leave]]:
    """Yield the logits (B, V) of the rows still going, and how to say which go on with what."""
    import torch
    from transformers import DynamicCache

    width = max(map(len, prompts))
    device = model.device
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = DynamicCache(config=model.config)

    def leave(stay: Sequence[int], tokens: Sequence[int]) -> None:
        nonlocal ids, seen
        if len(stay) < len(ids):
            rows = torch.tensor(stay, dtype=torch.long, device=device)
            cache.batch_select_indices(rows)
            seen = seen[rows]
        ids = torch.tensor(tokens, dtype=torch.long, device=device)[:, None]
        seen = torch.cat([seen, torch.ones_like(ids)], dim=1)

    while len(ids):
        positions = (seen.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        # Entered anew for each step: across a yield it would leak into the caller.
        with torch.inference_mode():
            scores = model(
                ids,
                attention_mask=seen,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            logits = scores.float().cpu().numpy()
        yield logits, leave
