"""Settings by the names that AutoGPTQ and gptqmodel give them.

``BaseQuantizeConfig`` of AutoGPTQ and ``QuantizeConfig`` of gptqmodel say ``sym`` for symmetric,
and with three switches what ``order`` says here:

    desc_act  static_groups  act_group_aware    order
    true      false                             dynamic   groups are formed on the way
    true      true                              static    groups stay, columns are walked in order
    false                    true               group     groups and their columns change places
    false                    false              none

What has no counterpart is refused by name and never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistill.errors import FolderError, SettingsError
from mistill.folders.folder import AUTO_GPTQ_CONFIG, read_json, weight_files
from mistill.folders.gptq_format import EMBEDDING, HEAD
from mistill.folders.publishing import write_json
from mistill.settings import require, settings_from
from quantize.options import GptqOptions
from quantize.settings import GptqSettings

AUTO_GPTQ_NAMES = frozenset(
    {
        "sym",
        "desc_act",
        "static_groups",
        "act_group_aware",
        "mse",
        "lm_head",
        "embedding",
        "dynamic",
        "quant_method",
        "checkpoint_format",
        "format",
        "is_marlin_format",
        "pack_dtype",
    }
)
# Entries of such files about their model and its maker, which are no settings.
_RECORDS = ("model_name_or_path", "meta", "method")


class AutoGptqOptions(GptqOptions, total=False):
    """Fields of ``GptqSettings``, and what AutoGPTQ calls some of them."""

    sym: bool
    desc_act: bool
    static_groups: bool
    act_group_aware: bool
    mse: float


def gptq_settings(source: Mapping[str, Any] | str | Path, **more: Any) -> GptqSettings:
    """Settings from what AutoGPTQ and gptqmodel write, or take.

    Args:
        source: A dictionary, a quantize_config.json, or a folder with one or a config.json.
        **more: Further settings, by mistill's names or by theirs; they override the source's.

    Returns:
        The settings.

    Raises:
        SettingsError: If a setting has no counterpart, or two of them contradict each other.
        FolderError: If there is no such file.
    """
    values = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    # mistill writes static_groups true and desc_act false: the model needs no index of groups.
    if values.get("static_groups") and "mistill" in str(values.get("meta")):
        values.pop("desc_act", None)
    for name in _RECORDS:
        values.pop(name, None)
    return settings_from(GptqSettings, None, translated({**values, **more}))


def translated(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with AutoGPTQ's and gptqmodel's names replaced by ours.

    Args:
        options: Settings by name; names that are neither are left for ``settings_from`` to refuse.

    Returns:
        Settings by the names of ``GptqSettings``.

    Raises:
        SettingsError: If one has no counterpart here, or contradicts another.
    """
    ours = {name: value for name, value in options.items() if name not in AUTO_GPTQ_NAMES}
    theirs = {name: value for name, value in options.items() if name in AUTO_GPTQ_NAMES}
    if not theirs:
        return ours
    _refuse_formats(theirs)
    if "sym" in theirs:
        _set_once(ours, "symmetric", _switch(theirs, "sym"), "sym")
    order = _order(theirs)
    if order is not None:
        _set_once(ours, "order", order, "desc_act, static_groups and act_group_aware")
    if theirs.get("mse") is not None:
        # Theirs is the exponent of an unweighted error, 0 for no search at all.
        searched = float(theirs["mse"]) > 0
        _set_once(ours, "scale_search", GptqSettings().scale_search if searched else 1, "mse")
    overrides, tables = _overrides(theirs.get("dynamic") or {})
    for flag, module, name in (
        ("lm_head", HEAD, "head_bits"),
        ("embedding", EMBEDDING, "embedding_bits"),
    ):
        if theirs.get(flag) is not None and _switch(theirs, flag):
            _set_once(ours, name, tables.get(module, ours.get("bits", GptqSettings().bits)), flag)
    if overrides:
        _set_once(ours, "overrides", overrides, "dynamic")
    symmetric = bool(ours.get("symmetric", True)) and "symmetric=false" not in str(overrides)
    _require_checkpoint_format(theirs, symmetric)
    return ours


def _read(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        return read_json(path)
    if (path / AUTO_GPTQ_CONFIG).is_file():
        return read_json(path / AUTO_GPTQ_CONFIG)
    quantization = read_json(path / "config.json").get("quantization_config")
    if not isinstance(quantization, dict):
        raise FolderError(
            f"{path} has neither a quantize_config.json nor a quantization_config in config.json"
        )
    return quantization


def _set_once(ours: dict[str, Any], name: str, value: Any, theirs: str) -> None:
    if name in ours:
        raise SettingsError(f"give either {name} or {theirs}, not both: they are one setting")
    ours[name] = value


def _switch(theirs: Mapping[str, Any], name: str) -> bool:
    value = theirs[name]
    require(isinstance(value, bool), f"{name} must be true or false, got {value!r}")
    return bool(value)


def _order(theirs: Mapping[str, Any]) -> str | None:
    switches = {
        name: _switch(theirs, name)
        for name in ("desc_act", "static_groups", "act_group_aware")
        if theirs.get(name) is not None
    }
    if not switches:
        return None
    ordered, aware = switches.get("desc_act"), switches.get("act_group_aware", False)
    if aware:
        require(
            not ordered and not switches.get("static_groups"),
            "act_group_aware sorts whole groups, and desc_act and static_groups sort single "
            "columns; give one of them",
        )
        return "group"
    if switches.get("static_groups"):
        require(
            ordered is not False,
            "static_groups needs columns that are sorted, and desc_act false says that they are "
            "not; give desc_act=True, or leave desc_act out",
        )
        return "static"
    if ordered is None:
        # AutoGPTQ's default of desc_act is true and gptqmodel's false, so mistill's own holds.
        return "none" if "act_group_aware" in switches else None
    return "dynamic" if ordered else "none"


def _overrides(dynamic: Any) -> tuple[tuple[str, ...], dict[str, int]]:
    """Overrides for the layers as our settings write them, and the bits of the tables."""
    require(isinstance(dynamic, Mapping), f"dynamic must be a dictionary, got {dynamic!r}")
    overrides = []
    tables: dict[str, int] = {}
    for key, values in dynamic.items():
        pattern = key[2:] if key.startswith(("+:", "-:")) else key
        if key.startswith("-:"):
            overrides.append(f"{pattern}: keep")
            continue
        unknown = sorted(set(values) - {"bits", "group_size", "sym"})
        require(
            not unknown and bool(values),
            f"dynamic[{key!r}] may set bits, group_size and sym, got {json.dumps(values)}",
        )
        module = pattern.replace("\\", "").strip("^$")
        if module in (HEAD, EMBEDDING) and "bits" in values:
            tables[module] = values["bits"]
            continue
        renamed = {"symmetric" if name == "sym" else name: value for name, value in values.items()}
        words = (f"{name}={str(value).lower()}" for name, value in renamed.items())
        overrides.append(f"{pattern}: {', '.join(words)}")
    return tuple(overrides), tables


def _refuse_formats(theirs: Mapping[str, Any]) -> None:
    method = theirs.get("quant_method") or "gptq"
    require(method == "gptq", f"quant_method must be gptq here, got {method!r}")
    require(
        not theirs.get("is_marlin_format"),
        "mistill writes no Marlin files; leave out is_marlin_format",
    )
    words = theirs.get("pack_dtype") or "int32"
    require(words == "int32", f"codes are packed in int32, got pack_dtype {words!r}")


def _require_checkpoint_format(theirs: Mapping[str, Any], symmetric: bool) -> None:
    requested = theirs.get("checkpoint_format") or theirs.get("format")
    stored_as = "gptq" if symmetric else "gptq_v2"
    require(
        requested in (None, stored_as),
        f"{'symmetric' if symmetric else 'asymmetric'} codes are written as {stored_as}, got "
        f"checkpoint_format {requested!r}; quantize.convert makes the other",
    )


def name_as_auto_gptq(folder: Path, base_name: str) -> None:
    """Name the weights of a folder as AutoGPTQ would, and write its quantize_config.json.

    transformers looks for ``model.safetensors`` only; AutoGPTQ, gptqmodel and mistill find these.

    Args:
        folder: A GPTQ folder being made.
        base_name: The name of the weights' file without its ending, such as
            ``gptq_model-4bit-128g``.
    """
    index = folder / "model.safetensors.index.json"
    renamed = {}
    for file in weight_files(folder):
        renamed[file.name] = base_name + file.name.removeprefix("model")
        file.rename(folder / renamed[file.name])
    if index.is_file():
        contents = read_json(index)
        contents["weight_map"] = {
            name: renamed[file] for name, file in contents["weight_map"].items()
        }
        write_json(folder / f"{base_name}.safetensors.index.json", contents)
        index.unlink()
    config = read_json(folder / "config.json")["quantization_config"]
    config["model_file_base_name"] = base_name
    write_json(folder / AUTO_GPTQ_CONFIG, config)
