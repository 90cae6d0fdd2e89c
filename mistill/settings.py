"""What the settings of every step have in common.

A step's settings are one frozen, keyword-only dataclass. It holds the defaults and the checks;
its docstring's ``Attributes`` section is the help text of the command line. The Python API, the
command line and the recipe are all built from it, so that a default is written once.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from mistill.errors import FolderError, SettingsError

SettingsT = TypeVar("SettingsT")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How the rows of a text are read, in every step that reads one.

    Attributes:
        skip_bad_rows: Pass over rows that cannot be read, instead of stopping at the first; they
            are counted, and their lines and what is wrong with them are named.
    """

    skip_bad_rows: bool = False


def require(condition: bool, message: str) -> None:
    """Refuse a setting.

    Args:
        condition: Whether the setting is good.
        message: The expected value, the actual one, and the remedy.

    Raises:
        SettingsError: If the condition does not hold.
    """
    if not condition:
        raise SettingsError(message)


def require_divisor(name: str, value: int, of: str, whole: int) -> None:
    """Refuse a number that does not divide another one.

    Args:
        name: Name of the number.
        value: The number, above 0.
        of: Name of what it should divide.
        whole: That number.

    Raises:
        SettingsError: If it does not.
    """
    require(whole % value == 0, f"{name} should divide {of}, but {value} does not divide {whole}")


def require_range(
    name: str,
    value: float | None,
    low: float,
    high: float | None = None,
    *,
    exclusive: bool = False,
) -> None:
    """Refuse a number outside a range, and one that is not finite.

    Args:
        name: Name of the setting, for the message.
        value: The number; None, which leaves a choice open, is let pass.
        low: Smallest number that is allowed.
        high: Largest number that is allowed; None for no limit.
        exclusive: Whether ``low`` and ``high`` themselves are refused too.

    Raises:
        SettingsError: If the number is outside.
    """
    if value is None:
        return
    if exclusive:
        inside = low < value and (high is None or value < high)
        words = f"above {low}" if high is None else f"above {low} and below {high}"
    else:
        inside = low <= value and (high is None or value <= high)
        words = f"at least {low}" if high is None else f"from {low} to {high}"
    require(inside and math.isfinite(value), f"{name} must be {words}, not {value}")


def require_choice(name: str, value: Any, known: Sequence[Any]) -> None:
    """Refuse a value that is not one of some.

    Args:
        name: Name of the setting, for the message.
        value: The value.
        known: What there is to choose from; at least two.

    Raises:
        SettingsError: If the value is none of them.
    """
    *others, last = (str(choice) for choice in known)
    require(value in known, f"{name} must be {', '.join(others)} or {last}, not {value!r}")


def environment_number(name: str, default: int, least: int = 0) -> int:
    """A number that a launcher such as torchrun sets in the environment.

    Args:
        name: Such as RANK.
        default: Where the variable is not set.
        least: Smallest number that is allowed.

    Returns:
        The number.

    Raises:
        SettingsError: If the variable holds something else.
    """
    value = os.environ.get(name, str(default))
    require(
        value.isascii() and value.isdecimal() and int(value) >= least,
        f"the environment variable {name} should be a whole number of at least {least}, not "
        f"{value!r:.80}; a launcher such as torchrun sets it: unset it to work alone",
    )
    return int(value)


def settings_from(
    settings_class: type[SettingsT], settings: SettingsT | None, options: Mapping[str, Any]
) -> SettingsT:
    """The settings of a step, from an object or from keywords, never from both.

    Args:
        settings_class: The dataclass of the step.
        settings: An object of that class, or None.
        options: Fields of that class by name.

    Returns:
        The object given, or a new one with the options.

    Raises:
        SettingsError: If both are given, or if an option is not a field of the class.
    """
    if settings is not None and options:
        raise SettingsError(
            f"give either settings or the options {', '.join(sorted(options))}, not both"
        )
    if settings is None:
        _require_known(settings_class, options)
        settings = settings_class(**typed_options(settings_class, options))
    words = [f"{name} {value}" for name, value in settings_dict(settings).items()]
    _log.info("%s: %s", settings_class.__name__, ", ".join(words))
    return settings


def settings_with(settings: SettingsT, options: Mapping[str, Any]) -> SettingsT:
    """Settings with some fields changed.

    Args:
        settings: An object of a settings dataclass.
        options: Fields of its class by name.

    Returns:
        A new object; the same if there are no options.

    Raises:
        SettingsError: If an option is not a field of the class, or its value is out of range.
    """
    if not options:
        return settings
    _require_known(type(settings), options)
    changes = typed_options(type(settings), options)
    changed: SettingsT = replace(settings, **changes)  # type: ignore[type-var]
    return changed


def _require_known(settings_class: type[Any], options: Mapping[str, Any]) -> None:
    names = [field.name for field in fields(settings_class)]
    for name in options:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(names)}"
            raise SettingsError(f"{settings_class.__name__} has no option {name}{hint}")


def typed_options(settings_class: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options whose values have the types that a settings class asks for.

    Args:
        settings_class: The dataclass of the step.
        options: Fields of that class by name, from a recipe or a caller.

    Returns:
        The same options: lists as tuples, and strings as paths where the class has those.

    Raises:
        SettingsError: If a value is of another type; it is never read as something else.
    """
    import msgspec

    hints = get_type_hints(settings_class)
    typed: dict[str, Any] = {}
    for name, value in options.items():
        try:
            typed[name] = msgspec.convert(value, hints[name], strict=True, dec_hook=_as_path)
        except msgspec.ValidationError as error:
            if "Invalid enum value" in str(error):
                typed[name] = value  # the class says what there is to choose from
                continue
            raise SettingsError(f"{name} {_in_words(str(error))}, got {value!r:.80}") from error
        except UnicodeEncodeError as error:
            raise SettingsError(f"{name} holds half of a character, in {value!a:.80}") from error
    return typed


def _as_path(kind: type[Any], value: Any) -> Any:
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    raise TypeError(f"Expected `{kind.__name__}`, got `{type(value).__name__}`")


_JSON_TYPES = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "null": "nothing",
    "Path": "a path",
    "str": "text",
}


def _in_words(complaint: str) -> str:
    """What msgspec expected, such as "should be a whole number or nothing"."""
    expected = re.search(r"Expected `([^`]*)`", complaint)
    if expected is None:
        return complaint
    words = " or ".join(_JSON_TYPES.get(word, word) for word in expected[1].split(" | "))
    place = re.search(r"at `\$\[(\d+)\]`", complaint)
    of_item = f" as item {int(place[1]) + 1}" if place else ""
    return f"should be {words}{of_item}"


def settings_dict(settings: Any) -> dict[str, Any]:
    """Settings as a JSON document would hold them: paths as strings, tuples as lists.

    Args:
        settings: An object of a settings dataclass.

    Returns:
        Field names and plain values, in the order of the class.
    """
    return {name: _plain(value) for name, value in asdict(settings).items()}


def result_settings(settings: Any, *others: str) -> dict[str, Any]:
    """The settings on which the result of a step depends, for the key of work that resumes.

    Whether bad rows are passed over decides nothing: the text that was read is in the key.

    Args:
        settings: An object of a settings dataclass.
        *others: Fields that change memory, speed or what is watched, and not the result.

    Returns:
        The other fields as ``settings_dict`` gives them.
    """
    left_out = {"skip_bad_rows", *others}
    return {name: value for name, value in settings_dict(settings).items() if name not in left_out}


def changed_settings(settings: Any) -> list[str]:
    """Which fields differ from their defaults.

    Args:
        settings: An object of a settings dataclass.

    Returns:
        Names of fields, in the order of the class; a field without a default is always among them.
    """
    default = {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in fields(settings)
    }
    return [
        name
        for name, value in default.items()
        if value is MISSING or getattr(settings, name) != value
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def refuse_object(source: object) -> None:
    """Refuse what is no name of a model, such as a model in memory.

    Args:
        source: What was given as a model.

    Raises:
        FolderError: If it is neither a text nor a path.
    """
    if isinstance(source, str | Path):
        return
    kind = type(source).__name__
    if hasattr(source, "save_pretrained"):
        raise FolderError(
            f"the model is a {kind} in memory, and models are given as folders; save model and "
            "tokenizer by their save_pretrained('folder') into one folder, and give that"
        )
    raise FolderError(
        f"the model is a {kind}; give a model folder, a Hub id such as "
        "mistralai/Mistral-7B-v0.1, or a .gguf file"
    )
