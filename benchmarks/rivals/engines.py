"""The rivals that exist, their names on the command line, and their adapters.

A rival's files lie in a folder of their own. A note says which engine and which Python run them; it
goes to the child process as an argument, and is never read from a folder: no file of a folder that
is compared decides what runs.
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
from mistill.shown import one_line


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Another engine.

    Attributes:
        name: Its name.
        adapter: The module that wraps it as a ``LanguageModel``: its ``describe()`` gives the
            version, its ``open_rival(folder, note, threads)`` opens a file.
        maker: The module whose ``make(...)`` makes its file.
        variable: The environment variable that names where it is installed.
        install: The command that installs it.
        default: Its weight format if the user names none.
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
    """A requested rival.

    Attributes:
        engine: The engine.
        variant: Its weight format.
    """

    engine: Engine
    variant: str

    @property
    def name(self) -> str:
        """Name of its row in the report."""
        return f"{self.engine.name} {self.variant}"


@dataclass(frozen=True, kw_only=True)
class Note:
    """A rival's files, and what runs them.

    Attributes:
        folder: The folder of the files.
        engine: Name of the engine.
        variant: Its weight format.
        python: The Python that runs it.
        library: The engine's own library, where it is named and not imported; else empty.
        made: How the file was made.
        source: Name of the folder that it was made from.
        context_length: Context of the model in tokens.
        vocabulary_size: Number of logits of the model, V.
        settings: Settings of the engine by name.
    """

    folder: str
    engine: str
    variant: str
    python: str
    library: str
    made: str
    source: str
    context_length: int
    vocabulary_size: int
    settings: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The note as the argument of a child process.

        Returns:
            A JSON object.
        """
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Note:
        """Read what ``to_json`` wrote.

        Args:
            text: A JSON object.

        Returns:
            The note.
        """
        return cls(**json.loads(text))


def choices(requests: Iterable[str]) -> tuple[Choice, ...]:
    """Parse the requested rivals.

    Args:
        requests: Each ``ENGINE`` or ``ENGINE:VARIANT``.

    Returns:
        The choices, in order.

    Raises:
        SettingsError: If an engine is not known, or a rival is named twice.
    """
    requested: list[Choice] = []
    for word in requests:
        name, _, variant = word.strip().partition(":")
        if name not in ENGINES:
            raise SettingsError(
                f"against names {name!r}, which is not a known engine; known are "
                f"{', '.join(ENGINES)}"
            )
        choice = Choice(engine=ENGINES[name], variant=variant or ENGINES[name].default)
        if choice in requested:
            raise SettingsError(f"against names {word} twice; name every rival once")
        maker(choice.engine).check_variant(choice.variant)
        requested.append(choice)
    return tuple(requested)


def maker(engine: Engine) -> Any:
    """The module that makes an engine's files, which imports nothing of the engine.

    Args:
        engine: The engine.

    Returns:
        The module.
    """
    return importlib.import_module(engine.maker)


def import_library(module: str, package: str) -> Any:
    """Import a rival's library, in the rival's own environment.

    Args:
        module: Name of the module.
        package: Name of the package to install.

    Returns:
        The module.

    Raises:
        MissingExtraError: If it is not installed, or does not work.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise MissingExtraError(
            f"{package} cannot be imported here ({one_line(error)}); install it with: "
            f"pip install {package}"
        ) from error


def describe(engine: str, library: str) -> dict[str, str]:
    """Version of an engine, in the rival's own environment.

    Args:
        engine: Name of the engine.
        library: The engine's own library, or empty.

    Returns:
        ``version`` and ``system``.
    """
    described: dict[str, str] = importlib.import_module(ENGINES[engine].adapter).describe(library)
    return described


def open_rival(note: Note, threads: int) -> LanguageModel:
    """Open a rival's files, in the rival's own environment.

    Args:
        note: The files, and what runs them.
        threads: Threads to compute with.

    Returns:
        The running model.
    """
    opened: LanguageModel = importlib.import_module(ENGINES[note.engine].adapter).open_rival(
        Path(note.folder), note, threads
    )
    return opened
