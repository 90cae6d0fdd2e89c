"""Merge a LoRA adapter into its base, before or after quantization, whichever text costs less.

Two orders lead from a base and an adapter to a small merged model: merge into the float base and
quantize the sum, or quantize the base first, turn its codes back into floats, merge there, and
quantize again, as it is where an adapter was trained on a quantized base (QLoRA, Dettmers et al.,
2023, https://arxiv.org/abs/2305.14314). The second rounds twice, but starts from the weights that
the adapter was trained to correct. Which is better is measured, by the cross-entropy of held-out
text (``quantize.conversions.merge_measuring``); so is the same choice between two float models.
"""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch

from mistill.errors import FolderError, missing_extra
from mistill.folders.folder import (
    FolderInfo,
    copy_companions,
    open_folder,
    read_config,
    read_json,
)
from mistill.folders.lineage import (
    add_lineage,
    file_name,
    find_source,
    fingerprint,
    read_lineage,
)
from mistill.folders.publishing import (
    creating,
    refuse_existing,
    scratch_beside,
    write_json,
)
from mistill.folders.safetensors_file import read_header
from mistill.pytorch.loading import (
    check_weights,
    empty_model,
    load_pytorch,
    plain_config,
    require_readable,
    stored_tensors,
)
from mistill.settings import require, settings_dict
from mistill.shown import one_line
from mistill.sources.source import open_weights, resolve_model
from mistill.text.rows import Texts, check_texts
from mistill.text.tokenizer_settings import TEMPLATE_FILE, read_template
from mistill.weights.gptq_layout import EMBEDDING, HEAD, read_quantization
from mistill.weights.tensor_writer import TensorWriter
from quantize.conversions.dequantization import dequantize
from quantize.conversions.merge_measuring import (
    better_way,
    measure,
    require_kept,
    share_kept,
)
from quantize.folders.auto_gptq_names import gptq_settings
from quantize.folders.gptq_folder import to_gptq
from quantize.settings import GptqSettings

MERGE_FILE = "merge_report.json"
ORDERS = ("merge_then_quantize", "quantize_then_merge")

_log = logging.getLogger(__name__)


def merge_lora(
    base: str | Path,
    adapter: str | Path,
    target: str | Path,
    *,
    texts: Texts | None = None,
    held_out: Texts | None = None,
    settings: GptqSettings | None = None,
    float_base: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Merge a peft LoRA adapter into its base.

    A float base becomes the float merged model; a GPTQ or NF4 base is turned back into floats
    first. With held-out text the adapter of such a base is also merged into the float original, and
    the target is whichever the text costs less. With texts the merged model is quantized by GPTQ,
    in both orders, and the same decides; a result that has lost more than half of what the adapter
    has learnt is refused. ``merge_report.json`` in the target holds the figures of both.

    Args:
        base: A float, GPTQ or NF4 folder: what the adapter was trained on, or its float original.
        adapter: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        target: The folder to make.
        texts: Text to calibrate GPTQ on; without it the target stays float.
        held_out: Text of the kind that the adapter was trained on, to compare both ways on; the
            calibration text if not given.
        settings: How to quantize; those of a GPTQ base, or the defaults, if not given.
        float_base: The float original of a quantized base; the one that its lineage names if not
            given. Only used with texts or held-out text.
        overwrite: Whether an existing target is replaced.

    Returns:
        The target.

    Raises:
        SettingsError: If there are settings but no text to calibrate on.
        TrainingError: If quantizing loses more than half of what the adapter has learnt.
        FolderError: If a folder is broken, the adapter is not a LoRA or does not fit the base, or
            the float original of a quantized base is not there.
        MissingExtraError: If peft is not installed.
    """
    target = refuse_existing(target, overwrite, [base, adapter])
    info = open_weights(base)
    require_readable(info)
    check_weights(info.path, plain_config(info.path))
    _check_adapter(Path(adapter), info.path)
    require(
        texts is not None or settings is None,
        "settings are for quantizing the merged model, which needs calibration text: give texts",
    )
    if held_out is not None:
        check_texts(held_out, skip_bad_rows=settings is not None and settings.skip_bad_rows)
    with scratch_beside(target) as folders:
        if texts is None:
            merged, facts = _merge_to_floats(info, Path(adapter), folders, held_out, float_base)
            _publish(merged, target, overwrite, info.path, Path(adapter), facts)
            return target
        settings = settings or _settings_of(info.path)
        check_texts(texts, skip_bad_rows=settings.skip_bad_rows)
        original = info.path if info.form == "model" else _original(info.path, float_base)
        reference = _merge(original, Path(adapter), folders / "merged")
        quantized = info.path
        if info.form == "model":
            quantized = to_gptq(info.path, folders / "base", texts=texts, settings=settings)
        after = _merge(dequantize(quantized, folders / "plain"), Path(adapter), folders / "after")
        quantized_folders = {
            name: to_gptq(source, folders / name, texts=texts, settings=settings)
            for name, source in zip(ORDERS, (reference, after), strict=True)
        }
        trained = reference if info.form == "model" else after
        compared = {"base": info.path, "trained": trained, "quantized": quantized}
        measured = measure(
            reference,
            {**quantized_folders, **compared},
            held_out or texts,
            settings.skip_bad_rows,
        )
        base_said, trained_said, quantized_said = map(measured.pop, compared)
        best, facts = better_way(measured, base_said, trained_said)
        if facts["chosen_by"] == "cross_entropy":
            share = share_kept(base_said, trained_said, quantized_said, measured[best])
            require_kept(share)
            facts["share_kept"] = share
        facts = {
            "orders": {name: asdict(one.fidelity) for name, one in measured.items()},
            **facts,
            "quantization": settings_dict(settings),
            "float_base": file_name(original),
        }
        for name, one in measured.items():
            _log.info(
                "%s: cross-entropy %.4f, KL %.5f to the float merged model",
                name,
                one.cross_entropy,
                one.fidelity.kl,
            )
        _publish(quantized_folders[best], target, overwrite, info.path, Path(adapter), facts)
    return target


def _merge_to_floats(
    info: FolderInfo,
    adapter: Path,
    folders: Path,
    held_out: Texts | None,
    float_base: str | Path | None,
) -> tuple[Path, dict[str, Any]]:
    """The float merged model, and how it compares with the other one that there may be."""
    if info.form == "model":
        return _merge(info.path, adapter, folders / "merged"), {}
    original = None if held_out is None else _original(info.path, float_base)
    plain = dequantize(info.path, folders / "plain")
    faithful = _merge(plain, adapter, folders / "dequantized")
    if held_out is None or original is None:
        return faithful, {}
    ways = {"dequantized": faithful, "float": _merge(original, adapter, folders / "float")}
    measured = measure(faithful, {**ways, "base": info.path}, held_out, skip_bad_rows=False)
    base_said = measured.pop("base")
    chosen, facts = better_way(measured, base_said, measured["dequantized"])
    figures = {name: asdict(one.fidelity) for name, one in measured.items()}
    return ways[chosen], {"ways": figures, **facts, "float_base": file_name(original)}


def _check_adapter(adapter: Path, base: Path) -> None:
    """Refuse an adapter that is not a LoRA, or one of another model, before anything is loaded."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise FolderError(
                f"{adapter} is not a peft adapter: it has no {name}; give the folder that "
                "save_pretrained wrote"
            )
    adapter_config = read_json(adapter / "adapter_config.json")
    peft_type = adapter_config.get("peft_type")
    if peft_type != "LORA":
        raise FolderError(
            f"{adapter} is an adapter of type {peft_type}; mistill merges type LORA only"
        )
    _check_options(adapter, adapter_config)
    config = plain_config(base)
    modules = {name for name, _ in empty_model(config).named_modules()}
    last = re.compile(r"\.lora_.*|\.base_layer\..*|\.token_adapter\..*|\.(?:weight|bias)$")
    changed = {
        last.sub("", name.removeprefix("base_model.model."))
        for name in read_header(adapter / "adapter_model.safetensors").tensors
    }
    strange = sorted(changed - modules)
    if strange:
        raise FolderError(
            f"{adapter} changes {strange[0]}, which {base} does not have; it belongs to another "
            "model"
        )
    if config.tie_word_embeddings and changed & {HEAD, EMBEDDING}:
        raise FolderError(
            f"{adapter} changes the head or the embedding of {base}, which are one table, so that "
            "merging into one would change the other; train an adapter without them"
        )


def _check_options(adapter: Path, adapter_config: Mapping[str, Any]) -> None:
    """Refuse an adapter that uses what this version of peft does not know, and would leave out."""
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise missing_extra("peft", "tune") from error
    names = {field.name for field in fields(LoraConfig)}
    used = {name for name, value in adapter_config.items() if value}
    unknown = sorted(used - names)
    if unknown:
        raise FolderError(
            f"{adapter} was made by a newer version of peft: the one that is installed does not "
            f"know {unknown[0]} in its adapter_config.json; install that version of peft"
        )
    if adapter_config.get("layer_replication"):
        raise FolderError(
            f"{adapter} repeats layers of its base (layer_replication), which cannot be merged"
        )


def _settings_of(folder: Path) -> GptqSettings:
    """How a GPTQ folder was quantized, or the defaults for a folder of another form."""
    config = read_config(folder)
    if read_quantization(config) is None:
        return GptqSettings()
    quantization = config["quantization_config"]
    known = (
        "bits",
        "group_size",
        "sym",
        "desc_act",
        "static_groups",
        "act_group_aware",
        "dynamic",
        "lm_head",
        "embedding",
        "damp_percent",
        "true_sequential",
        "meta",
    )
    return gptq_settings({name: quantization[name] for name in known if name in quantization})


def _original(folder: Path, float_base: str | Path | None) -> Path:
    """The float model that a quantized folder was made from."""
    if float_base is None:
        steps = [
            step for step in read_lineage(folder) if step["step"] in ("gptq", "nf4", "rounding")
        ]
        name = steps[-1].get("source") if steps else None
        source = find_source(folder, steps[-1]) if steps else None
        if source is None:
            raise FolderError(
                f"the float original of {folder} was not found"
                + (f" as {name} beside it" if name else "")
                + "; give it as float_base, or leave out texts and held_out to merge without "
                "comparing"
            )
        if fingerprint(source) != steps[-1].get("source_fingerprint"):
            raise FolderError(
                f"{source} is no longer the folder that {folder} was made from; give the float "
                "original as float_base"
            )
        float_base = source
    info = open_folder(resolve_model(float_base))
    if info.form != "model":
        raise FolderError(f"{float_base} is {info.kind}; give a float folder as float_base")
    return info.path


def _merge(base: Path, adapter: Path, target: Path) -> Path:
    """Merge an adapter into a float folder, in float32, and store it in the folder's own type."""
    try:
        from peft import PeftModel
    except ModuleNotFoundError as error:
        raise missing_extra("peft", "tune") from error
    types = {name: tensor.dtype for name, tensor in stored_tensors(base)}
    model = load_pytorch(base, torch.float32)
    names = {name for name, _ in model.named_parameters()}
    try:
        with warnings.catch_warnings():
            # They concern training; what is left out of the adapter is refused below.
            warnings.simplefilter("ignore")
            adapted = cast(Any, PeftModel.from_pretrained(model, str(adapter)))
            _check_used(adapter, adapted)
            merged = adapted.merge_and_unload(safe_merge=True)
    except FolderError:
        raise
    except Exception as error:  # an option of a stranger's adapter may lead anywhere in peft
        raise FolderError(
            f"{adapter} cannot be merged, or does not fit {base}: {one_line(error, 300)}"
        ) from error
    with creating(target) as partial:
        with TensorWriter(partial) as writer:
            for name, parameter in merged.named_parameters():
                if name in names:
                    writer.add(name, parameter.detach().to(types.get(name, torch.float32)))
        write_json(partial / "config.json", read_config(base))
        _copy_companions(base, adapter, partial)
    check_weights(target, plain_config(target))
    return target


def _check_used(adapter: Path, adapted: Any) -> None:
    """Refuse an adapter with tensors that peft left out, or without some that it expected."""
    from peft import get_peft_model_state_dict

    stored = set(read_header(adapter / "adapter_model.safetensors").tensors)
    used = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    for names, words in ((stored - used, "also holds"), (used - stored, "lacks")):
        if names:
            raise FolderError(
                f"{adapter} {words} {min(names)}, which contradicts its adapter_config.json"
            )


def _copy_companions(base: Path, adapter: Path, target: Path) -> None:
    """Give a merged model the tokenizer, and the template, that its adapter was tuned with.

    An older trainer leaves the template in tokenizer_config.json, where the base's file of its own
    would hide it.
    """
    copy_companions(base, target)
    copy_companions(adapter, target)
    for folder in (adapter, base):
        template = read_template(folder)
        if template is not None:
            (target / TEMPLATE_FILE).write_text(template, "utf-8")
            return


def _publish(
    merged: Path,
    target: Path,
    overwrite: bool,
    base: Path,
    adapter: Path,
    facts: Mapping[str, Any],
) -> None:
    """Move a merged folder into place, and add the merge to its lineage."""
    with creating(target, overwrite) as partial:
        for file in merged.iterdir():
            shutil.move(file, partial / file.name)
        if facts:
            write_json(partial / MERGE_FILE, facts, indent=1)
        add_lineage(
            partial,
            step="merge",
            settings={"adapter": str(adapter)},
            source=base,
            adapter_fingerprint=fingerprint(adapter),
            **facts,
        )
