r"""Settings of single modules, written as text so that a recipe, a shell and Python share them.

``".*down_proj: bits=8, group_size=32"`` quantizes the modules whose names it matches otherwise than
the rest, and ``".*layers\.0\..*: keep"`` leaves them float. A pattern is a regular expression
that must match from the start of a module's name, and the first that does decides, as it is in
gptqmodel's ``dynamic``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mistill.errors import SettingsError
from mistill.settings import require
from mistill.weights.gptq_layout import SUPPORTED_BITS, ModuleFormat

Override = tuple[str, ModuleFormat | None]

_WORDS = {"true": True, "false": False}


def require_grid(bits: int, group_size: int, where: str = "") -> None:
    """Refuse bits or a group size that cannot be stored.

    Args:
        bits: Bits per code.
        group_size: Columns per group, -1 for the whole row.
        where: Text before the name of the value in the message.

    Raises:
        SettingsError: If one of the two is out of range.
    """
    require(bits in SUPPORTED_BITS, f"{where}bits must be 2, 3, 4 or 8, not {bits}")
    require(
        group_size == -1 or group_size >= 1,
        f"{where}group_size must be 1 or more, or -1 for the whole row, not {group_size}",
    )


def parse_override(text: str, default: ModuleFormat) -> Override:
    """Read one override.

    Args:
        text: ``REGEX: keep``, or ``REGEX:`` and any of ``bits=``, ``group_size=``, ``symmetric=``.
        default: The format where the text names no other value.

    Returns:
        The regular expression and the format, None for modules left float.

    Raises:
        SettingsError: If the text is of another form, or a value is out of range.
    """
    pattern, colon, values_text = text.rpartition(":")
    pattern, values_text = pattern.strip(), values_text.strip()
    require(
        bool(colon and pattern and values_text),
        f"an override reads 'REGEX: bits=8, group_size=32' or 'REGEX: keep', got {text!r}",
    )
    try:
        re.compile(pattern)
    except re.error as error:
        raise SettingsError(
            f"{pattern!r} in an override is not a regular expression: {error}"
        ) from error
    if values_text == "keep":
        return pattern, None
    values: dict[str, int] = {}
    for item in values_text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        require(
            name in ("bits", "group_size", "symmetric"),
            f"an override may set bits, group_size and symmetric, or be keep; got {item.strip()!r} "
            f"in {text!r}",
        )
        values[name] = _value(name, value, text)
    form = ModuleFormat(
        bits=values.get("bits", default.bits),
        group_size=values.get("group_size", default.group_size),
        symmetric=bool(values.get("symmetric", default.symmetric)),
    )
    require_grid(form.bits, form.group_size, f"in override {text!r}, ")
    return pattern, form


def parse_overrides(texts: Iterable[str], default: ModuleFormat) -> tuple[Override, ...]:
    """Read several overrides.

    Args:
        texts: Each as ``parse_override`` reads it.
        default: The format where a text names no other value.

    Returns:
        Patterns and formats, in order.
    """
    return tuple(parse_override(text, default) for text in texts)


def format_of(
    module: str, overrides: Iterable[Override], default: ModuleFormat
) -> ModuleFormat | None:
    """The format that a matrix of a layer is stored in.

    Args:
        module: Its name, such as ``model.layers.0.mlp.down_proj``.
        overrides: Patterns and formats.
        default: The format where no pattern matches.

    Returns:
        Its format; None if it stays float.
    """
    for pattern, form in overrides:
        if re.match(pattern, module):
            return form
    return default


def require_matches(overrides: Sequence[Override], modules: Iterable[str]) -> None:
    """Refuse an override that matches no module.

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
                f"it must match from the start of a name such as {inside}; try '.*{pattern}'"
                if inside
                else f"module names look like {names[0]}"
            )
            raise SettingsError(f"the override {pattern!r} matches no module; {hint}")


def _value(name: str, value: str, text: str) -> int:
    if name == "symmetric" and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    try:
        if name == "symmetric":
            raise ValueError
        return int(value)
    except ValueError as error:
        expected = "true or false" if name == "symmetric" else "a whole number"
        raise SettingsError(
            f"{name} in an override must be {expected}, not {value!r} in {text!r}"
        ) from error
