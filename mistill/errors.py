"""Every error that a user of mistill can meet.

    MistillError
    ├── SettingsError (also ValueError)   a setting or an argument outside its range
    ├── FolderError                         a folder is missing, broken, or not what a step reads
    │   └── TargetExistsError               an output that would be overwritten
    ├── TextError                           no text, or text that cannot be read
    ├── VocabularyError                     no tokenizer or template, or two that differ
    ├── ArchitectureError                   a model of a kind that mistill does not read
    ├── ExportError                         an exported model that predicts something else
    ├── ContextError                        a conversation longer than the model's context
    ├── QueueFullError                      more requests at once than a scheduler lets wait
    ├── EngineStoppedError                  a scheduler that was closed, or whose engine crashed
    ├── ServerError                         a server that does not answer as OpenAI's does
    ├── TrainingError                       a student that got worse, or a loss that is not a number
    ├── RecipeError                         a recipe that cannot be run
    └── MissingExtraError (also ImportError)  an optional library that is not installed

The command line prints any of these as one line and exits with 2. Everything else is a bug of
ours and keeps its traceback. A message says what was expected, what was found and what to do.
"""

from __future__ import annotations


class MistillError(Exception):
    """Base of every error that a user of mistill can meet."""


class SettingsError(MistillError, ValueError):
    """A setting or an argument is outside its range."""


class FolderError(MistillError):
    """A folder is missing, broken, or not of the form that a step reads."""


class TargetExistsError(FolderError):
    """The target exists already and ``overwrite`` is False."""


class TextError(MistillError):
    """There is no text, or it cannot be read."""


class VocabularyError(MistillError):
    """A tokenizer or a chat template is missing, or two vocabularies differ."""


class ArchitectureError(MistillError):
    """The architecture of a model is not supported."""


class ExportError(MistillError):
    """An exported model does not predict what its source predicts."""


class ContextError(MistillError):
    """A conversation does not fit the model's context."""


class QueueFullError(MistillError):
    """As many requests wait as a scheduler lets wait."""


class EngineStoppedError(MistillError):
    """A scheduler was closed, or its engine crashed."""


class ServerError(MistillError):
    """A server of language models cannot be reached, or does not answer as OpenAI's does."""


class TrainingError(MistillError):
    """A student got worse, or the loss is not a number."""


class RecipeError(MistillError):
    """A recipe cannot be run."""


class MissingExtraError(MistillError, ImportError):
    """An optional library is not installed."""


def missing_extra(library: str, extra: str) -> MissingExtraError:
    """Name the extra of mistill that installs a missing library.

    Args:
        library: The library that could not be imported.
        extra: The extra of mistill that installs it.

    Returns:
        The error to raise.
    """
    return MissingExtraError(
        f"{library} is not installed; install it with: pip install 'mistill[{extra}]'"
    )
