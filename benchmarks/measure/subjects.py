"""The models of one comparison, checked before anything large is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.figures.answers import Answers
from benchmarks.figures.conventions import QuotedPerplexity
from benchmarks.figures.fidelity import Fidelity
from benchmarks.figures.footprint import Load
from benchmarks.figures.latency import Turn
from benchmarks.figures.replies import Replies
from benchmarks.measure.quoting import check_quotable
from benchmarks.rivals.contest import InstalledRival, RivalFiles, check_source, make_files
from benchmarks.rivals.engines import Note
from benchmarks.settings import BenchSettings
from mistill.errors import SettingsError, VocabularyError
from mistill.folders.folder import FolderInfo, open_folder
from mistill.folders.lineage import fingerprint, read_lineage
from mistill.settings import refuse_object
from mistill.text.vocabulary import load_vocabulary, same_vocabulary

Models = str | Path | Sequence[str | Path]


@dataclass
class Distance:
    """The distance of a model from another.

    Attributes:
        divergences: KL of each token, in nats, passage by passage.
        agreements: 1 where the most probable token of both is the same.
    """

    divergences: list[tuple[float, ...]] = field(default_factory=list)
    agreements: list[tuple[int, ...]] = field(default_factory=list)

    def fidelity(self) -> Fidelity:
        """The distance as a report records it.

        Returns:
            The same numbers, frozen.
        """
        return Fidelity(divergences=tuple(self.divergences), agreements=tuple(self.agreements))


@dataclass
class Subject:
    """One model and the measurements taken so far.

    Attributes:
        named_as: The path or name that the user gave.
        info: Its folder; of a rival, the folder whose weights it got.
        is_listed: Whether it is measured, and not only the reference.
        is_reference: Whether the others are compared with it.
        name: Its name in the report.
        entry: Of a rival, its files.
        answers: Answers of its child process, by request.
        turns: Its turns at the usual length.
        transformers_turns: The same with transformers' own generate.
        turns_at_lengths: Its turns at other lengths.
        loads: Its loading times.
        left_out: What was not measured although it was requested, and why.
        losses: Loss of each token, passage by passage.
        parent: The float model that it was made of.
        distances: Distance from others, by name.
        quoted: Perplexities in the requested conventions.
        question_answers: Its answers to the small offline set.
        replies: Its replies to everyday prompts.
    """

    named_as: str
    info: FolderInfo
    is_listed: bool
    is_reference: bool = False
    name: str = ""
    entry: RivalFiles | None = None
    answers: dict[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    transformers_turns: list[Turn] = field(default_factory=list)
    turns_at_lengths: dict[int, list[Turn]] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    losses: list[tuple[float, ...]] = field(default_factory=list)
    parent: Subject | None = None
    distances: dict[str, Distance] = field(default_factory=dict)
    quoted: list[QuotedPerplexity] = field(default_factory=list)
    question_answers: Answers | None = None
    replies: Replies | None = None

    @property
    def folder(self) -> Path:
        """The folder that a child process opens."""
        return self.info.path if self.entry is None else Path(self.entry.note.folder)

    @property
    def opened(self) -> Path | Note:
        """What a child process opens: the folder, or a rival's files with what runs them."""
        return self.info.path if self.entry is None else self.entry.note

    @property
    def runs_pytorch(self) -> bool:
        """Whether transformers' own generate can be timed too."""
        return self.info.form == "model" and self.entry is None


def open_subjects(models: Models, reference: str | Path | None) -> list[Subject]:
    """Open the named folders, without loading weights.

    Args:
        models: Folders of any form, or anything else that names a model.
        reference: The model that the others are compared with; None for the first.

    Returns:
        The models in the order named; the reference comes last if it is none of them.

    Raises:
        SettingsError: If there is no model, or one is given twice.
    """
    requested = as_list(models)
    if not requested:
        raise SettingsError("there is no model to measure; give at least one folder")
    subjects = [Subject(str(model), open_folder(folder_of(model)), True) for model in requested]
    paths = [subject.info.path.resolve() for subject in subjects]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise SettingsError(f"{requested[index]} is given twice; give every model once")
    reference_subject = subjects[0]
    if reference is not None:
        folder = open_folder(folder_of(reference))
        if folder.path.resolve() not in paths:
            paths.append(folder.path.resolve())
            subjects.append(Subject(str(reference), folder, False))
        reference_subject = subjects[paths.index(folder.path.resolve())]
    reference_subject.is_reference = True
    names = short_names([subject.named_as for subject in subjects])
    for subject, name in zip(subjects, names, strict=True):
        subject.name = name
    _find_parents(subjects)
    return subjects


def _find_parents(subjects: Sequence[Subject]) -> None:
    """Find the float model that every quantized or exported model was made from."""
    floats = {
        fingerprint(subject.info.path): subject
        for subject in subjects
        if subject.info.form == "model"
    }
    for subject in subjects:
        if subject.info.form != "model":
            sources = [entry.get("source_fingerprint") for entry in read_lineage(subject.info.path)]
            subject.parent = next((floats[s] for s in reversed(sources) if s in floats), None)


def rival_source_of(subjects: Sequence[Subject], named: str | Path | None) -> Subject:
    """The folder whose weights the rivals get.

    Args:
        subjects: The models.
        named: The folder that the user named, if any.

    Returns:
        That folder; else the float folder that most of the others were made from, or else the first
        folder that has such weights.
    """
    if named is not None:
        folder = open_folder(folder_of(named))
        compared = [s for s in subjects if s.info.path.resolve() == folder.path.resolve()]
        source = (
            compared[0] if compared else Subject(str(named), folder, False, name=folder.path.name)
        )
        check_source(source.info)
        return source
    parents = [subject.parent for subject in subjects if subject.parent is not None]
    by_children = sorted(subjects, key=lambda s: -sum(parent is s for parent in parents))
    floats = [subject for subject in by_children if subject.info.form == "model"]
    others = [subject for subject in subjects if subject.info.form != "onnx"]
    default = next(iter([*floats, *others]), None)
    check_source(None if default is None else default.info)
    assert default is not None, "check_source refuses None"
    return default


def add_rivals(
    installed: Sequence[InstalledRival],
    source: Subject | None,
    subjects: Sequence[Subject],
    scratch: Path,
) -> list[Subject]:
    """Make the files of the rivals, and add them to the models that are compared.

    Args:
        installed: The rivals.
        source: The folder whose weights they get; None where there is no rival.
        subjects: The models that are compared.
        scratch: Where to make the files.

    Returns:
        The rivals.
    """
    rivals: list[Subject] = []
    for rival_engine in installed:
        assert source is not None, "a comparison with rivals has a source"
        entry = make_files(rival_engine, source.info, source.name, scratch)
        rival = Subject(entry.rival.name, source.info, True, name=entry.rival.name, entry=entry)
        rival.parent = source if source.info.form == "model" and source in subjects else None
        rivals.append(rival)
    return rivals


def named_subjects(subjects: Sequence[Subject], option: str, names: Sequence[str]) -> list[Subject]:
    """The models that an option names.

    Args:
        subjects: The models.
        option: The option.
        names: Their names in the report; none stands for all that are measured.

    Returns:
        The models, in the order of the names.

    Raises:
        SettingsError: If a name is not among them.
    """
    listed = {subject.name: subject for subject in subjects if subject.is_listed}
    unknown = [name for name in names if name not in listed]
    if unknown:
        raise SettingsError(
            f"{option} names {', '.join(unknown)}, which is not compared; the models are "
            f"{', '.join(listed)}"
        )
    return [listed[name] for name in names or listed]


def models_to_ask(
    subjects: Sequence[Subject], option: str, names: Sequence[str]
) -> dict[str, Path]:
    """The models that reply to prompts.

    Args:
        subjects: The models.
        option: The option that names them.
        names: Their names; none stands for all.

    Returns:
        Folders by name.

    Raises:
        SettingsError: If a name is not among them.
        VocabularyError: If one has no chat template.
    """
    chosen_subjects = named_subjects(subjects, option, names)
    folders = {subject.name: subject.info.path for subject in chosen_subjects}
    for name, folder in folders.items():
        if load_vocabulary(folder).chat_template is None:
            raise VocabularyError(
                f"{name} has no chat template, so it cannot reply to prompts; leave it out of "
                f"{option}"
            )
    return folders


def as_list(models: Models) -> list[str | Path]:
    """One or several models as a list.

    Args:
        models: One or several.

    Returns:
        A list.
    """
    if isinstance(models, str | Path):
        return [models]
    if not isinstance(models, Sequence):
        refuse_object(models)
    return list(models)


def folder_of(model: str | Path) -> Path:
    """The folder of a model.

    Args:
        model: A folder, or anything else that names a model.

    Returns:
        Its folder.
    """
    refuse_object(model)
    path = Path(model).expanduser()
    if path.exists() and path.is_dir():
        return path
    from mistill.sources.source import resolve_model

    return resolve_model(model)


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest end of each path that distinguishes it from the others.

    Args:
        paths: Paths, all different.

    Returns:
        Names, all different: the last part, with as many parts before it as are needed.
    """
    parts = [Path(path).expanduser().absolute().parts for path in paths]
    names = []
    for path_parts in parts:
        length = 1
        while sum(other[-length:] == path_parts[-length:] for other in parts) > 1 and length < len(
            path_parts
        ):
            length += 1
        names.append("/".join(path_parts[-length:]))
    return names


def check_context(subjects: Sequence[Subject], settings: BenchSettings) -> None:
    """Refuse models whose context is too short for the prompts and the tokens to write.

    Args:
        subjects: The models.
        settings: How many tokens those are.

    Raises:
        SettingsError: If one has too short a context.
    """
    needed = settings.prompt_tokens + settings.new_tokens
    for subject in subjects:
        if subject.is_listed and subject.info.context_length < needed:
            raise SettingsError(
                f"{subject.named_as} has a context of {subject.info.context_length} tokens, and "
                f"prompt_tokens and new_tokens need {settings.prompt_tokens} + "
                f"{settings.new_tokens}; set smaller ones"
            )
        if subject.is_listed:
            check_quotable(settings.perplexity, subject.named_as, subject.info.context_length)


def check_vocabularies(reference: Subject, subjects: Sequence[Subject]) -> None:
    """Refuse models whose predictions cannot be compared token by token.

    Args:
        reference: The reference.
        subjects: The models.

    Raises:
        VocabularyError: If two do not share a vocabulary.
    """
    vocabulary = load_vocabulary(reference.info.path)
    for subject in subjects:
        if subject is reference:
            continue
        sizes = subject.info.vocabulary_size, reference.info.vocabulary_size
        if sizes[0] != sizes[1]:
            raise VocabularyError(
                f"{subject.named_as} has logits for {sizes[0]} tokens and {reference.named_as} for "
                f"{sizes[1]}; compare models that share a vocabulary"
            )
        differences = same_vocabulary(vocabulary, load_vocabulary(subject.info.path))
        if differences:
            raise VocabularyError(
                f"{subject.named_as} and {reference.named_as} do not share a vocabulary: "
                f"{'; '.join(differences)}"
            )
