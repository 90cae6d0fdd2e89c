"""Which rivals there are, what they are called on a command line, and who runs them.

A rival's files lie in a folder of their own with a note, ``rival.json``, that says which engine
opens it. The child process that is given such a folder opens it with that engine's adapter.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mistill.engine.language_model import LanguageModel
from mistill.errors import MissingExtraError, SettingsError

NOTE_FILE = "rival.json"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine of others.

    Attributes:
        name: What it is called.
        adapter: The module that makes a ``LanguageModel`` of it: its ``describe()`` says what it
            is, its ``open_rival(folder, note, threads)`` opens a file.
        maker: The module whose ``make(...)`` makes its file.
        variable: The environment variable that names where it is installed.
        install: The command that installs it.
        default: How it stores weights if nothing is said.
    """

    name: str
    adapter: str
    maker: str
    variable: str
    install: str
    default: str


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            name="llama.cpp",
            adapter="benchmarks.rivals.llama_cpp",
            maker="benchmarks.rivals.llama_cpp_files",
            variable="MISTILL_LLAMA_CPP",
            install="pip install xllamacpp numpy",
            default="q4_0",
        ),
        Engine(
            name="genai",
            adapter="benchmarks.rivals.genai",
            maker="benchmarks.rivals.genai_files",
            variable="MISTILL_GENAI",
            install="pip install onnxruntime-genai numpy",
            default="default",
        ),
        Engine(
            name="ctranslate2",
            adapter="benchmarks.rivals.ctranslate2",
            maker="benchmarks.rivals.ctranslate2_files",
            variable="MISTILL_CTRANSLATE2",
            install="pip install ctranslate2 numpy",
            default="int8",
        ),
        Engine(
            name="openvino",
            adapter="benchmarks.rivals.openvino_model",
            maker="benchmarks.rivals.openvino_files",
            variable="MISTILL_OPENVINO_VENV",
            install="pip install openvino-genai 'optimum-intel[openvino]'",
            default="int4",
        ),
        Engine(
            name="optimum",
            adapter="benchmarks.rivals.optimum_model",
            maker="benchmarks.rivals.optimum_files",
            variable="MISTILL_OPTIMUM_VENV",
            install="pip install 'optimum-onnx[onnxruntime]'",
            default="fp32",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A rival that was asked for.

    Attributes:
        engine: The engine.
        variant: How it shall store the weights.
    """

    engine: Engine
    variant: str

    @property
    def name(self) -> str:
        """What its row is called."""
        return f"{self.engine.name} {self.variant}"


@dataclass(frozen=True, kw_only=True)
class Note:
    """What lies beside a rival's file.

    Attributes:
        engine: Name of the engine.
        variant: How it stores the weights.
        python: The Python that runs it.
        library: The engine's own library, where it is named and not imported; else empty.
        made: How the file came to be.
        source: Name of the folder that it was made of.
        context_length: Most positions of the model.
        vocabulary_size: Number of logits of the model, V.
        settings: What the engine is told, by name.
    """

    engine: str
    variant: str
    python: str
    library: str
    made: str
    source: str
    context_length: int
    vocabulary_size: int
    settings: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Leave the note in a folder.

        Args:
            folder: The folder of the rival's file.
        """
        (folder / NOTE_FILE).write_text(json.dumps(asdict(self)), "utf-8")


def read_note(folder: Path) -> Note | None:
    """The note in a folder.

    Args:
        folder: Any folder.

    Returns:
        The note; None where there is none, and the folder is one of ours.
    """
    file = folder / NOTE_FILE
    return Note(**json.loads(file.read_text("utf-8"))) if file.is_file() else None


def choices(words: Iterable[str]) -> tuple[Choice, ...]:
    """Read what rivals were asked for.

    Args:
        words: Each ``ENGINE`` or ``ENGINE:VARIANT``.

    Returns:
        The choices, in order.

    Raises:
        SettingsError: If an engine is not known, or one is asked for twice in the same way.
    """
    found: list[Choice] = []
    for word in words:
        name, _, variant = word.strip().partition(":")
        if name not in ENGINES:
            raise SettingsError(
                f"against names {name!r}, which is no rival that is known; known are "
                f"{', '.join(ENGINES)}"
            )
        choice = Choice(engine=ENGINES[name], variant=variant or ENGINES[name].default)
        if choice in found:
            raise SettingsError(f"against names {word} twice; name every rival once")
        maker(choice.engine).check_variant(choice.variant)
        found.append(choice)
    return tuple(found)


def maker(engine: Engine) -> Any:
    """The module that makes an engine's files; it needs no rival to be installed.

    Args:
        engine: The engine.

    Returns:
        The module.
    """
    return importlib.import_module(engine.maker)


def import_library(module: str, package: str) -> Any:
    """In a rival's own environment: its library.

    Args:
        module: What is imported.
        package: What is installed.

    Returns:
        The module.

    Raises:
        MissingExtraError: If it is not installed, or does not work.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise MissingExtraError(
            f"{package} cannot be imported here ({reason}); install it with: pip install {package}"
        ) from error


def describe(engine: str, library: str) -> dict[str, str]:
    """In a rival's own environment: what is installed there.

    Args:
        engine: Name of the engine.
        library: The engine's own library, or empty.

    Returns:
        ``version`` and ``system``.
    """
    described: dict[str, str] = importlib.import_module(ENGINES[engine].adapter).describe(library)
    return described


def open_rival(folder: Path, note: Note, threads: int) -> LanguageModel:
    """In a rival's own environment: open its file.

    Args:
        folder: The folder of the file.
        note: What lies beside it.
        threads: Threads to compute with.

    Returns:
        The running model.
    """
    opened: LanguageModel = importlib.import_module(ENGINES[note.engine].adapter).open_rival(
        folder, note, threads
    )
    return opened
