"""The models of one comparison, and what is refused before anything large is loaded."""

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
from benchmarks.measure.quoting import check_quotable
from benchmarks.rivals.contest import Contestant, Entry, check_source, enter
from benchmarks.settings import BenchSettings
from mistill.errors import SettingsError, VocabularyError
from mistill.folders.folder import FolderInfo, open_folder
from mistill.folders.lineage import fingerprint, read_lineage
from mistill.text.vocabulary import load_vocabulary, same_vocabulary

Models = str | Path | Sequence[str | Path]


@dataclass
class Distance:
    """How far a model is from another.

    Attributes:
        divergences: Of each token, passage by passage.
        agreements: 1 where both hold the same token for the most probable.
    """

    divergences: list[tuple[float, ...]] = field(default_factory=list)
    agreements: list[tuple[int, ...]] = field(default_factory=list)

    def fidelity(self) -> Fidelity:
        """What is derived from it.

        Returns:
            The distance as a report holds it.
        """
        return Fidelity(divergences=tuple(self.divergences), agreements=tuple(self.agreements))


@dataclass
class Subject:
    """One model and what has been found about it so far.

    Attributes:
        given: How it was named.
        info: Its folder; of a rival, the folder whose weights it got.
        is_listed: Whether it is measured, and not only a reference.
        is_reference: Whether the others are held against it.
        name: What it is called in the report.
        entry: Its files, of a rival.
        answers: What its child process answered.
        turns: Its turns at the usual length.
        transformers_turns: The same in transformers' own loop.
        at: Its turns at other lengths.
        loads: Its loadings.
        left_out: What was asked for and not measured, and why.
        losses: Loss of each token, passage by passage.
        parent: The float model that it was made of.
        distances: Distance from others, by name.
        quoted: Perplexities as others quote them.
        questioned: What it answered to the small offline set.
    """

    given: str
    info: FolderInfo
    is_listed: bool
    is_reference: bool = False
    name: str = ""
    entry: Entry | None = None
    answers: dict[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    transformers_turns: list[Turn] = field(default_factory=list)
    at: dict[int, list[Turn]] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    losses: list[tuple[float, ...]] = field(default_factory=list)
    parent: Subject | None = None
    distances: dict[str, Distance] = field(default_factory=dict)
    quoted: list[QuotedPerplexity] = field(default_factory=list)
    questioned: Answers | None = None

    @property
    def folder(self) -> Path:
        """What a child process opens."""
        return self.info.path if self.entry is None else self.entry.folder

    @property
    def runs_pytorch(self) -> bool:
        """Whether transformers' own loop can be let write too."""
        return self.info.form == "model" and self.entry is None


def open_subjects(models: Models, reference: str | Path | None) -> list[Subject]:
    """Open the folders that were given, without loading weights.

    Args:
        models: Folders of any form, or anything else that names a model.
        reference: The model that the others are held against; None for the first.

    Returns:
        The models in the order given, the reference behind them if it is none of them.

    Raises:
        SettingsError: If there is no model, or one is given twice.
    """
    given = as_list(models)
    if not given:
        raise SettingsError("there is no model to measure; give at least one folder")
    subjects = [Subject(str(model), open_folder(folder_of(model)), True) for model in given]
    paths = [subject.info.path.resolve() for subject in subjects]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise SettingsError(f"{given[place]} is given twice; give every model once")
    judge = subjects[0]
    if reference is not None:
        folder = open_folder(folder_of(reference))
        if folder.path.resolve() not in paths:
            paths.append(folder.path.resolve())
            subjects.append(Subject(str(reference), folder, False))
        judge = subjects[paths.index(folder.path.resolve())]
    judge.is_reference = True
    names = short_names([subject.given for subject in subjects])
    for subject, name in zip(subjects, names, strict=True):
        subject.name = name
    _find_parents(subjects)
    return subjects


def _find_parents(subjects: Sequence[Subject]) -> None:
    """Find for every quantized or exported model the float model that it was made of."""
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
        named: The folder that was named, if any.

    Returns:
        That folder; else the float folder that most of the others were made of, or else the first
        folder that has such weights.
    """
    if named is not None:
        folder = open_folder(folder_of(named))
        known = [s for s in subjects if s.info.path.resolve() == folder.path.resolve()]
        found = known[0] if known else Subject(str(named), folder, False, name=folder.path.name)
        check_source(found.info)
        return found
    parents = [subject.parent for subject in subjects if subject.parent is not None]
    made = sorted(subjects, key=lambda s: -sum(parent is s for parent in parents))
    floats = [subject for subject in made if subject.info.form == "model"]
    others = [subject for subject in subjects if subject.info.form != "onnx"]
    chosen = next(iter([*floats, *others]), None)
    check_source(None if chosen is None else chosen.info)
    assert chosen is not None, "check_source refuses None"
    return chosen


def enter_rivals(
    contestants: Sequence[Contestant],
    source: Subject | None,
    subjects: Sequence[Subject],
    scratch: Path,
) -> list[Subject]:
    """Give the rivals their files, and let them take part like the models.

    Args:
        contestants: The rivals.
        source: The folder whose weights they get; None where there is no rival.
        subjects: The models that are compared.
        scratch: Where to make the files.

    Returns:
        The rivals.
    """
    entered: list[Subject] = []
    for contestant in contestants:
        assert source is not None, "found with the contestants"
        entry = enter(contestant, source.info, source.name, scratch)
        rival = Subject(entry.rival.name, source.info, True, name=entry.rival.name, entry=entry)
        rival.parent = source if source.info.form == "model" and source in subjects else None
        entered.append(rival)
    return entered


def asked_of(subjects: Sequence[Subject], settings: BenchSettings) -> dict[str, Path]:
    """The models whose replies the report shows.

    Args:
        subjects: The models.
        settings: Who is asked what.

    Returns:
        Folders by name.

    Raises:
        SettingsError: If a name is not among them.
        VocabularyError: If one has no chat template.
    """
    if not settings.sample_prompts:
        return {}
    listed = {subject.name: subject.info.path for subject in subjects if subject.is_listed}
    unknown = [name for name in settings.sample_models if name not in listed]
    if unknown:
        raise SettingsError(
            f"sample_models names {', '.join(unknown)}, which is not compared; compared are "
            f"{', '.join(listed)}"
        )
    asked = {name: listed[name] for name in settings.sample_models or listed}
    for name, folder in asked.items():
        if load_vocabulary(folder).chat_template is None:
            raise VocabularyError(f"{name} has no chat template, so it cannot be asked anything")
    return asked


def as_list(given: Models) -> list[str | Path]:
    """Several of what may be given alone.

    Args:
        given: One or several.

    Returns:
        A list.
    """
    return [given] if isinstance(given, str | Path) else list(given)


def folder_of(model: str | Path) -> Path:
    """The folder of a model.

    Args:
        model: A folder, or anything else that names a model.

    Returns:
        Its folder.
    """
    path = Path(model).expanduser()
    if path.exists() and path.is_dir():
        return path
    from mistill.sources.source import resolve_model

    return resolve_model(model)


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest end of each path that tells it from the others.

    Args:
        paths: Paths, all different.

    Returns:
        Names, all different: the last part, with as many parts before it as are needed.
    """
    parts = [Path(path).expanduser().absolute().parts for path in paths]
    names = []
    for own in parts:
        length = 1
        while sum(other[-length:] == own[-length:] for other in parts) > 1 and length < len(own):
            length += 1
        names.append("/".join(own[-length:]))
    return names


def check_context(subjects: Sequence[Subject], settings: BenchSettings) -> None:
    """Refuse models that do not hold what they are to read and write.

    Args:
        subjects: The models.
        settings: How much that is.

    Raises:
        SettingsError: If one has too short a context.
    """
    needed = settings.prompt_tokens + settings.new_tokens
    for subject in subjects:
        if subject.is_listed and subject.info.context_length < needed:
            raise SettingsError(
                f"{subject.given} holds {subject.info.context_length} positions, and prompt_tokens "
                f"and new_tokens ask for {settings.prompt_tokens} + {settings.new_tokens}; ask for "
                "fewer"
            )
        if subject.is_listed:
            check_quotable(settings.perplexity, subject.given, subject.info.context_length)


def check_vocabularies(judge: Subject, subjects: Sequence[Subject]) -> None:
    """Refuse models whose predictions cannot be compared token by token.

    Args:
        judge: The reference.
        subjects: The models.

    Raises:
        VocabularyError: If two do not share a vocabulary.
    """
    known = load_vocabulary(judge.info.path)
    for subject in subjects:
        if subject is judge:
            continue
        sizes = subject.info.vocabulary_size, judge.info.vocabulary_size
        if sizes[0] != sizes[1]:
            raise VocabularyError(
                f"{subject.given} predicts {sizes[0]} tokens and {judge.given} {sizes[1]}; compare "
                "models that share a vocabulary"
            )
        differences = same_vocabulary(known, load_vocabulary(subject.info.path))
        if differences:
            raise VocabularyError(
                f"{subject.given} and {judge.given} do not share a vocabulary: "
                f"{'; '.join(differences)}"
            )
