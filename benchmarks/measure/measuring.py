"""Compare models: each in a process of its own, all in one run, in alternation.

First every model is opened. Then they write, round after round, each once in a round: a machine
that slows down slows all of them down, and the ratios stay the same. Last they are scored on the
same text, passage by passage: the reference stores its logits of a passage in a file, the others
are compared with it, and the next passage overwrites it, so that disk and memory stay bounded
however long the text is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from benchmarks.figures.comparison import ScoredText
from benchmarks.figures.conventions import spelled_bytes
from benchmarks.figures.latency import FEWEST_TOKENS, Latency, Turn
from benchmarks.figures.machine import describe_machine
from benchmarks.figures.passages import Passage, cut_passages, cut_prompts, fingerprint_of
from benchmarks.measure.asking import collect_replies, collect_samples
from benchmarks.measure.children import Child, start_children
from benchmarks.measure.lengths import TimedModel, lengths_left_out, new_tokens_at, take_turns
from benchmarks.measure.loading import NOT_DROPPED, time_load
from benchmarks.measure.questions import (
    answer_questions,
    read_questions,
)
from benchmarks.measure.quoting import QuotedText, bytes_in, cut_texts, quote
from benchmarks.measure.recording import result_of, rounded
from benchmarks.measure.subjects import (
    Distance,
    Models,
    Subject,
    add_rivals,
    check_context,
    check_vocabularies,
    models_to_ask,
    named_subjects,
    open_subjects,
    rival_source_of,
)
from benchmarks.report.report import Report
from benchmarks.rivals.contest import find_rivals
from benchmarks.settings import BenchSettings
from mistill.cost_model.processors import usable_threads, warn_if_busy
from mistill.errors import VocabularyError
from mistill.folders.lineage import file_name, fingerprint
from mistill.folders.locking import temporary_folder
from mistill.measures.significance import students_t
from mistill.progress import Tracker, track
from mistill.settings import settings_from
from mistill.text.rows import Texts, sources_of
from mistill.text.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from benchmarks.options import BenchOptions

_log = logging.getLogger(__name__)


def compare(
    models: Models,
    *,
    texts: Texts,
    reference: str | Path | None = None,
    rivals: Mapping[str, str | Path] | None = None,
    rival_source: str | Path | None = None,
    settings: BenchSettings | None = None,
    **options: Unpack[BenchOptions],
) -> Report:
    """Measure size, memory, speed and quality of several models in one run.

    Quality is perplexity and the distance from a reference, token by token, on the same text.
    Speed and memory are those of a process that runs only that model.

    Args:
        models: Folders of any form, or anything else that names a model, such as a Hub id.
        texts: Held-out text: files, Hub data sets, ``@demo-held-out``.
        reference: The model that the others are compared with; by default the first. It need not
            be among them.
        rivals: Where the rivals that the settings name are installed: the path of a Python, of its
            environment or, of llama.cpp, of a folder of its libraries, by name. Missing ones
            are looked up in MISTILL_LLAMA_CPP, MISTILL_LLAMA_CPP_PROGRAMS, MISTILL_GENAI,
            MISTILL_CTRANSLATE2, MISTILL_OPENVINO_VENV and MISTILL_OPTIMUM_VENV.
        rival_source: The float, GPTQ or NF4 folder whose weights the rivals get; by default the
            compared float folder that most of the others were made of, or else the first folder
            that has such weights.
        settings: How much is measured, and with how many threads.
        **options: Fields of ``BenchSettings``, instead of ``settings``.

    Returns:
        All samples and the figures computed from them.

    Raises:
        SettingsError: If there is no model, one is given twice, or one has too short a context.
        VocabularyError: If two models do not share a vocabulary.
        FolderError: If a folder is missing or broken.
        TextError: If there is nothing to predict in the text.
        MissingExtraError: If a rival, scipy or the execution provider is not installed.
    """
    start = time.monotonic()
    settings = settings_from(BenchSettings, settings, options)
    students_t()  # the confidence intervals of the report need scipy: refuse before measuring
    subjects = open_subjects(models, reference)
    if settings.provider != "cpu":
        from mistill.engine.onnx_session import check_provider

        check_provider(settings.provider)
    reference_subject = next(subject for subject in subjects if subject.is_reference)
    check_context(subjects, settings)
    check_vocabularies(reference_subject, subjects)
    installed_rivals = find_rivals(settings.against, rivals or {})
    source = rival_source_of(subjects, rival_source) if installed_rivals else None
    check_vocabularies(reference_subject, [] if source is None else [source])
    sampling = replying = {}
    if settings.sample_prompts:
        sampling = models_to_ask(subjects, "sample_models", settings.sample_models)
    if settings.replies:
        replying = models_to_ask(subjects, "reply_models", settings.reply_models)
    named_subjects(subjects, "task_models", settings.task_models)
    passages = read_passages(texts, reference_subject.info.path, settings, subjects)
    vocabulary = load_vocabulary(reference_subject.info.path)
    quoted = cut_texts(
        texts,
        vocabulary,
        settings.perplexity,
        settings.perplexity_tokens,
        skip_bad_rows=settings.skip_bad_rows,
    )
    threads = settings.threads or usable_threads()
    machine = describe_machine(threads)
    warn_if_busy(threads)
    with temporary_folder() as scratch:
        subjects += add_rivals(installed_rivals, source, subjects, scratch)
        _measure(subjects, passages, quoted, settings, threads)
    samples = collect_samples(sampling, settings.sample_prompts, settings.sample_tokens, threads)
    everyday = collect_replies(replying, settings.reply_tokens, threads)
    for subject in subjects:
        if subject.entry is None:
            subject.replies = everyday.get(subject.name)
    passage_bytes = spelled_bytes(passages, bytes_in(vocabulary))
    for subject in subjects:
        for reason in subject.left_out:
            _log.warning("%s, not measured: %s", subject.name, reason)
    results = tuple(
        result_of(subject, reference_subject, passage_bytes, settings, threads)
        for subject in subjects
        if subject.is_listed
    )
    return Report(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        duration_seconds=time.monotonic() - start,
        settings=settings,
        machine=machine,
        text=ScoredText(
            sources=tuple(map(file_name, sources_of(texts))),
            fingerprint=fingerprint_of(passages),
            passages=len(passages),
            tokens_read=sum(len(passage.ids) for passage in passages),
            tokens_scored=sum(len(passage.targets) for passage in passages),
        ),
        reference=reference_subject.name,
        models=results,
        samples=samples,
        reference_fingerprint=fingerprint(reference_subject.info.path),
    )


def read_passages(
    texts: Texts, folder: Path, settings: BenchSettings, subjects: Sequence[Subject] = ()
) -> list[Passage]:
    """Read text and cut it into passages that are scored in one pass.

    Args:
        texts: Files, Hub data sets, ``@demo-held-out``.
        folder: The model folder whose vocabulary and chat template are used.
        settings: How much to read.
        subjects: Models; no passage is longer than their context.

    Returns:
        Passages.
    """
    from mistill.text.documents import read_documents

    contexts = [subject.info.context_length for subject in subjects]
    context_length = min([settings.context_length, *contexts])
    return cut_passages(
        read_documents(
            texts,
            load_vocabulary(folder),
            skip_bad_rows=settings.skip_bad_rows,
            block_length=context_length,
        ),
        context_length=context_length,
        scored_tokens=settings.scored_tokens,
    )


# --- measuring ----------------------------------------------------------------------------------


def _measure(
    subjects: Sequence[Subject],
    passages: Sequence[Passage],
    quoted: Sequence[QuotedText],
    settings: BenchSettings,
    threads: int,
) -> None:
    _time_loads(subjects, passages, settings, threads)
    opened = [subject.opened for subject in subjects]
    measured_models = sum(subject.is_listed for subject in subjects)
    steps = len(subjects) * (1 + len(passages)) + measured_models * (1 + settings.rounds)
    questions = read_questions() if settings.tasks else []
    answering = [
        subject.name
        for subject in (named_subjects(subjects, "task_models", settings.task_models))
        if questions
    ]
    steps += measured_models * sum(len(text.windows) for text in quoted)
    steps += len(answering) * len(questions)
    with (
        track("comparing", steps, "step") as tracker,
        start_children(opened, threads, settings.provider) as children,
    ):
        pairs = list(zip(subjects, children, strict=True))
        for subject, child in pairs:
            subject.answers["open"] = child.ask("open")
            tracker.advance(note=f"open {subject.name}")
        _check_widths(subjects)
        _take_turns([pair for pair in pairs if pair[0].is_listed], passages, settings, tracker)
        _take_turns_at_lengths(pairs, passages, settings)
        _score(pairs, passages, tracker)
        for subject, child in pairs:
            if subject.is_listed:
                step = partial(tracker.advance, note=f"quote {subject.name}")
                subject.quoted = [quote(child, text, step) for text in quoted]
                if subject.name in answering:
                    vocabulary = load_vocabulary(subject.info.path)
                    step = partial(tracker.advance, note=f"question {subject.name}")
                    subject.question_answers = answer_questions(child, questions, vocabulary, step)


def _time_loads(
    subjects: Sequence[Subject], passages: Sequence[Passage], settings: BenchSettings, threads: int
) -> None:
    """Time opening every model in new processes, while no process has its files mapped."""
    prompts = cut_prompts(passages, length=settings.prompt_tokens, count=max(1, settings.loads))
    for prompt in prompts[: settings.loads]:
        for cold in (True, False):
            for subject in subjects:
                if not subject.is_listed or (cold and NOT_DROPPED in subject.left_out):
                    continue
                load = time_load(
                    subject.opened,
                    cold=cold,
                    prompt=prompt,
                    threads=threads,
                    provider=settings.provider,
                )
                if load is None:
                    subject.left_out.append(NOT_DROPPED)
                else:
                    first = rounded(load.first_token_seconds)
                    load = replace(load, seconds=rounded(load.seconds), first_token_seconds=first)
                    subject.loads.append(load)


def _take_turns_at_lengths(
    pairs: Sequence[tuple[Subject, Child]], passages: Sequence[Passage], settings: BenchSettings
) -> None:
    """Let every model write at the further lengths that were requested."""

    def writer(child: Child) -> Callable[[list[int], int, float], Turn]:
        return lambda prompt, new_tokens, seconds: _turn(
            child.ask("turn", prompt=prompt, new_tokens=new_tokens, seconds=seconds)
        )

    models = []
    for subject, child in pairs:
        if subject.is_listed and new_tokens_at(settings):
            subject.left_out += lengths_left_out(settings, subject.info.context_length)
            timed = TimedModel(
                name=subject.name,
                context_length=subject.info.context_length,
                take_turn=writer(child),
                prompt_tokens_per_second=Latency(
                    turns=tuple(subject.turns)
                ).prompt_tokens_per_second,
                turns=subject.turns_at_lengths,
            )
            models.append(timed)
    take_turns(models, passages, settings)


def _check_widths(subjects: Sequence[Subject]) -> None:
    widths = {subject.named_as: subject.answers["open"]["vocabulary_size"] for subject in subjects}
    if len(set(widths.values())) > 1:
        sizes = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise VocabularyError(f"the models have different numbers of logits: {sizes}")


def _take_turns(
    pairs: Sequence[tuple[Subject, Child]],
    passages: Sequence[Passage],
    settings: BenchSettings,
    tracker: Tracker,
) -> None:
    """Let every model write once in each round; a first, short round warms them up.

    Memory is read after the first round, before transformers' own loop has run in the process.
    """
    warm_up, *prompts = cut_prompts(
        passages, length=settings.prompt_tokens, count=1 + settings.rounds
    )
    request = {"new_tokens": settings.new_tokens, "seconds": settings.turn_seconds}
    few = {**request, "new_tokens": min(FEWEST_TOKENS, settings.new_tokens)}
    for subject, child in pairs:
        child.ask("turn", prompt=warm_up, **few)
        tracker.advance(note=f"warm up {subject.name}")
    for number, prompt in enumerate(prompts):
        for subject, child in _rotated(pairs, number):
            subject.turns.append(_turn(child.ask("turn", prompt=prompt, **request)))
            if number == 0:
                subject.answers["memory"] = child.ask("memory")
            if settings.transformers_generate and subject.runs_pytorch:
                if number == 0:
                    child.ask("turn", prompt=warm_up, transformers=True, **few)
                answer = child.ask("turn", prompt=prompt, transformers=True, **request)
                subject.transformers_turns.append(_turn(answer))
            tracker.advance(note=f"round {number + 1}, {subject.name}")


def _rotated(
    pairs: Sequence[tuple[Subject, Child]], number: int
) -> Sequence[tuple[Subject, Child]]:
    """Begin each round with another model, so that none always runs after the same one."""
    start = number % len(pairs)
    return [*pairs[start:], *pairs[:start]]


def _turn(answer: Mapping[str, Any]) -> Turn:
    return Turn(
        prompt_tokens=answer["prompt_tokens"],
        first_token_seconds=rounded(answer["first_token_seconds"]),
        token_seconds=tuple(map(rounded, answer["token_seconds"])),
        decode_joules=answer.get("decode_joules"),
    )


def _score(
    pairs: Sequence[tuple[Subject, Child]], passages: Sequence[Passage], tracker: Tracker
) -> None:
    """Score every passage with every model, those that others are compared with first."""
    references = {subject.name for subject, _ in pairs if subject.is_reference}
    parents = {subject.parent.name for subject, _ in pairs if subject.parent is not None}
    ordered = sorted(pairs, key=lambda pair: _rank(pair[0].name, references, parents))
    with temporary_folder() as folder:
        logits_files = {
            name: str(folder / f"{number}.npy")
            for number, name in enumerate(sorted(references | parents))
        }
        for number, passage in enumerate(passages):
            request = {"ids": passage.ids.tolist(), "kept": passage.kept.tolist()}
            for subject, child in ordered:
                others = [
                    name for name in logits_files if _is_compared_with(subject, name, references)
                ]
                answer = child.ask(
                    "score",
                    **request,
                    write=logits_files.get(subject.name),
                    against=[logits_files[name] for name in others],
                )
                subject.losses.append(tuple(map(rounded, answer["losses"])))
                for index, name in enumerate(others):
                    distance = subject.distances.setdefault(name, Distance())
                    distance.divergences.append(tuple(map(rounded, answer["divergences"][index])))
                    distance.agreements.append(tuple(answer["agreements"][index]))
                tracker.advance(note=f"passage {number + 1}/{len(passages)}, {subject.name}")


def _rank(name: str, references: set[str], parents: set[str]) -> int:
    return 0 if name in references else 1 if name in parents else 2


def _is_compared_with(subject: Subject, name: str, references: set[str]) -> bool:
    if subject.name == name:
        return False
    return name in references or (subject.parent is not None and subject.parent.name == name)
