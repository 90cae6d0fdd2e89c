r"""Settings of single modules, written as text so that a recipe, a shell and Python share them.

``".*down_proj: bits=8, group_size=32"`` quantizes the modules whose names it matches otherwise than
the rest, and ``".*layers\.0\..*: keep"`` leaves them float. A pattern is a regular expression
that must match from the start of a module's name, and the first that does decides, as it is in
gptqmodel's ``dynamic``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from mistill.errors import SettingsError
from mistill.settings import require
from mistill.weights.gptq_layout import SUPPORTED_BITS, ModuleFormat

if TYPE_CHECKING:
    from quantize.settings import GptqSettings, RoundingSettings

SettingsT = TypeVar("SettingsT", "GptqSettings", "RoundingSettings")

Override = tuple[str, ModuleFormat | None]

_WORDS = {"true": True, "false": False}


def require_grid(bits: int, group_size: int, where: str = "") -> None:
    """Refuse bits or a group size that cannot be stored.

    Args:
        bits: Bits per code.
        group_size: Columns per group, -1 for the whole row.
        where: What to put before the names in the message.

    Raises:
        SettingsError: If one of the two is out of range.
    """
    require(bits in SUPPORTED_BITS, f"{where}bits must be 2, 3, 4 or 8, got {bits}")
    require(
        group_size == -1 or group_size >= 1,
        f"{where}group_size must be 1 or more, or -1 for the whole row, got {group_size}",
    )


def parse_override(text: str, default: ModuleFormat) -> Override:
    """Read one override.

    Args:
        text: ``REGEX: keep``, or ``REGEX:`` and any of ``bits=``, ``group_size=``, ``symmetric=``.
        default: What holds where the text says nothing.

    Returns:
        The regular expression and the format, None for modules left float.

    Raises:
        SettingsError: If the text is of another form, or a value is out of range.
    """
    pattern, colon, said = text.rpartition(":")
    pattern, said = pattern.strip(), said.strip()
    require(
        bool(colon and pattern and said),
        f"an override reads 'REGEX: bits=8, group_size=32' or 'REGEX: keep', got {text!r}",
    )
    try:
        re.compile(pattern)
    except re.error as error:
        raise SettingsError(
            f"{pattern!r} in an override is not a regular expression: {error}"
        ) from error
    if said == "keep":
        return pattern, None
    values: dict[str, int] = {}
    for item in said.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        require(
            name in ("bits", "group_size", "symmetric"),
            f"an override may set bits, group_size and symmetric, or say keep; got {item.strip()!r}"
            f" in {text!r}",
        )
        values[name] = _value(name, value, text)
    form = ModuleFormat(
        bits=values.get("bits", default.bits),
        group_size=values.get("group_size", default.group_size),
        symmetric=bool(values.get("symmetric", default.symmetric)),
    )
    require_grid(form.bits, form.group_size, f"in override {text!r}, ")
    return pattern, form


def module_formats(settings: GptqSettings | RoundingSettings) -> tuple[Override, ...]:
    """The overrides of some settings, read.

    Args:
        settings: How to quantize.

    Returns:
        Patterns and formats, in order.
    """
    default = default_format(settings)
    return tuple(parse_override(text, default) for text in settings.overrides)


def default_format(settings: GptqSettings | RoundingSettings) -> ModuleFormat:
    """How the modules are stored that no override matches.

    Args:
        settings: How to quantize.

    Returns:
        The format.
    """
    return ModuleFormat(
        bits=settings.bits, group_size=settings.group_size, symmetric=settings.symmetric
    )


def format_of(settings: GptqSettings | RoundingSettings, module: str) -> ModuleFormat | None:
    """How a matrix of a layer is to be stored.

    Args:
        settings: How to quantize.
        module: Its name, such as ``model.layers.0.mlp.down_proj``.

    Returns:
        Its format; None if it is left float.
    """
    for pattern, form in module_formats(settings):
        if re.match(pattern, module):
            return form
    return default_format(settings)


def with_format(settings: SettingsT, form: ModuleFormat) -> SettingsT:
    """Settings for one module.

    Args:
        settings: Those of the model.
        form: How the module is stored.

    Returns:
        The settings with its bits, groups and symmetry.
    """
    return replace(
        settings, bits=form.bits, group_size=form.group_size, symmetric=form.symmetric, overrides=()
    )


def require_matches(overrides: Sequence[Override], modules: Iterable[str]) -> None:
    """Refuse an override that no module is meant by.

    Args:
        overrides: Patterns and formats.
        modules: Names of all modules that could be quantized.

    Raises:
        SettingsError: If a pattern matches none of them.
    """
    names = list(modules)
    for pattern, _ in overrides:
        if not any(re.match(pattern, name) for name in names):
            inside = next((name for name in names if re.search(pattern, name)), None)
            hint = (
                f"it must match from the start of names such as {inside}: try '.*{pattern}'"
                if inside
                else f"names are such as {names[0]}"
            )
            raise SettingsError(f"the override of {pattern!r} matches no module; {hint}")


def _value(name: str, value: str, text: str) -> int:
    if name == "symmetric" and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    try:
        if name == "symmetric":
            raise ValueError
        return int(value)
    except ValueError as error:
        wanted = "true or false" if name == "symmetric" else "a whole number"
        raise SettingsError(
            f"{name} in an override must be {wanted}, got {value!r} in {text!r}"
        ) from error
