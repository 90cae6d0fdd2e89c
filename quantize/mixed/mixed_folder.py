"""Give every matrix the precision that is worth its bytes, within a size.

The KL that each choice costs is estimated from one backward pass (``quantize.mixed.sensitivity``),
and the costs of different matrices add up. Every matrix begins with the fewest bytes; the change
that lowers KL most for each byte is made again and again while it fits. Where the choices of a
matrix, from few bytes to many, bring less and less, nothing that costs the same bytes is better
than this greedy walk but for the last change; choices that bring more than the one before them are
skipped over by keeping only the lower convex hull (Shoham and Gersho, 1988, section III,
https://doi.org/10.1109/29.90373). What is made is an ordinary GPTQ folder.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch

from mistill.errors import SettingsError
from mistill.folders.folder import describe, tensor_headers, weight_files
from mistill.folders.publishing import begun_on, refuse_existing, write_json
from mistill.settings import settings_from
from mistill.text.rows import Texts, check_texts
from mistill.weights.gptq_layout import EMBEDDING, HEAD, ModuleFormat, codes_per_unit
from quantize.calibration_text import draw_blocks
from quantize.folders.float_model import FloatModel, open_float
from quantize.folders.gptq_folder import make_gptq, require_context
from quantize.measuring.fidelity import open_check
from quantize.mixed.budget import Choice, fill_budget, fill_budget_alike
from quantize.mixed.q4_k_m import q4_k_m_bytes
from quantize.mixed.sensitivity import Costs, estimate_costs
from quantize.settings import TABLE_BITS, BudgetSettings, GptqSettings, MixedSettings

if TYPE_CHECKING:
    from quantize.options import MixedOptions

_log = logging.getLogger(__name__)

CHOICE_FILE = "mixed.json"

# Matrices of one input, which an ONNX folder multiplies as one.
_PRODUCTS = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
}

# What GPTQ and GPTAQ leave of the KL that rounding to 4 bits costs: 0.0852 and 0.0766 of 0.256 nats
# (docs/benchmarks.md, "Beside onnxruntime's own quantizers").
_LEFT_BY = {"gptq": 0.33, "gptaq": 0.3}

# What the header of a file says of a tensor, besides its name, takes fewer bytes than this.
_HEADER_BYTES = 90


def to_mixed(
    source: str | Path,
    target: str | Path,
    *,
    texts: Texts,
    held_out: Texts | None = None,
    teacher: str | Path | None = None,
    settings: MixedSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[MixedOptions],
) -> Path:
    """Quantize by GPTQ with bits and groups chosen for every matrix, within a size.

    ``mixed.json`` in the new folder holds what was chosen, and the KL that it was expected to
    cost.

    Args:
        source: A float model folder.
        target: The folder to make, in the AutoGPTQ layout.
        texts: Text to estimate and to calibrate on.
        held_out: Text to measure the result on; the report holds its KL to the source then.
        teacher: The model that the source learnt from, to compare the result with too.
        settings: The size and the choices; or give its fields as options.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``MixedSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range, the model cannot be as small as asked for, or
            there is a teacher and no held-out text.
        FolderError: If the source is broken or quantized already.
        VocabularyError: If the teacher has other tokens.
        TextError: If there is no text.
    """
    settings = settings_from(MixedSettings, settings, options)
    target = refuse_existing(target, overwrite, [source])
    model = open_float(source)
    require_context(model, settings.block_length)
    check_texts(texts, skip_bad_rows=settings.skip_bad_rows)
    check = open_check(model.folder, held_out, teacher, skip_bad_rows=settings.skip_bad_rows)
    chosen, budget = choose(model, texts, settings, today=begun_on(target))

    def summarize(folder: Path) -> None:
        summary = {
            "budget_bytes": budget,
            "expected_bytes": sum(choice.size for choice in chosen.values())
            + _bytes_of_others(model),
            "weight_bytes": sum(file.stat().st_size for file in weight_files(folder)),
            "expected_kl": sum(choice.cost for choice in chosen.values()),
            "modules": {
                name: None
                if choice.form is None
                else {"bits": choice.form.bits, "group_size": choice.form.group_size}
                for name, choice in chosen.items()
            },
        }
        write_json(folder / CHOICE_FILE, summary, indent=1)

    return make_gptq(
        model,
        target,
        texts=texts,
        settings=as_gptq_settings(model, chosen, settings),
        check=check,
        overwrite=overwrite,
        finish=summarize,
    )


def choose(
    model: FloatModel, texts: Texts, settings: MixedSettings, *, today: date | None = None
) -> tuple[dict[str, Choice], int]:
    """Choose how every matrix and table is stored.

    Args:
        model: The float model.
        texts: Text to estimate on.
        settings: The size and the choices.
        today: The day that a chat template writes; None takes the time of reading.

    Returns:
        A choice for each, by name, and the bytes that all files may have.

    Raises:
        SettingsError: If even the smallest choices do not fit.
    """
    sizes = _possible_sizes(model, settings)
    budget = size_limit(model, settings)
    rest = _bytes_of_others(model)
    least = sum(min(by_form.values()) for by_form in sizes.values()) + rest
    if least > budget:
        parameters = describe(model.folder).parameters
        raise SettingsError(
            f"with these formats {model.folder} takes at least {least / 1e6:.1f} MB "
            f"({least * 8 / parameters:.2f} bits per weight), more than the limit of "
            f"{budget / 1e6:.1f} MB; raise the size or give smaller formats"
        )
    own = replace(settings.gptq(), samples=settings.sensitivity_samples)
    blocks = draw_blocks(texts, model.folder, own, today=today)
    generator = torch.Generator().manual_seed(settings.seed)
    forms = {name: [f for f in by_form if f is not None] for name, by_form in sizes.items()}
    costs = estimate_costs(model, blocks, forms, settings.gptq(), generator)
    choices = _choices(sizes, costs, _LEFT_BY[settings.method])
    if settings.fused:
        return fill_budget_alike(choices, _fused_with, budget - rest), budget
    return fill_budget(choices, budget - rest), budget


def uniform_bytes(model: FloatModel, group_size: int) -> int:
    """Bytes of a model whose matrices have 4 bits and whose tables stay float.

    Args:
        model: The float model.
        group_size: Columns per group; where it does not fit, the most bytes of those that do.

    Returns:
        At least what the files have.
    """
    total = _bytes_of_others(model)
    for by_form in _possible_sizes(model, MixedSettings()).values():
        fours = {f: size for f, size in by_form.items() if f is not None and f.bits == 4}
        matching = [size for f, size in fours.items() if f.group_size == group_size]
        total += by_form[None] if None in by_form else max(matching or fours.values())
    return total


def as_gptq_settings(
    model: FloatModel, chosen: Mapping[str, Choice], settings: MixedSettings
) -> GptqSettings:
    """Express the choices as settings of GPTQ.

    Args:
        model: The float model.
        chosen: A choice for each matrix and table.
        settings: GPTQ's own part is taken from it.

    Returns:
        Settings with overrides for all that differs from what most matrices have.
    """
    own = {name: chosen[name].form for name in model.matrices}
    tables = {name: chosen[name].form for name in (EMBEDDING, HEAD) if name in chosen}
    table_forms = [form for form in tables.values() if form is not None]
    most = Counter(form for form in own.values() if form is not None).most_common(1)[0][0]
    # A table has the group size that holds by default.
    base = replace(most, group_size=table_forms[0].group_size) if table_forms else most
    alike: dict[tuple[str, ModuleFormat], list[str]] = {}
    for name, form in own.items():
        if form is not None and form != base:
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            alike.setdefault((rest, form), []).append(layer)
    overrides = tuple(
        rf"model\.layers\.(?:{'|'.join(layers)})\.{re.escape(rest)}$: "
        f"bits={form.bits}, group_size={form.group_size}"
        for (rest, form), layers in alike.items()
    )
    bits = {name: None if form is None else form.bits for name, form in tables.items()}
    return replace(
        settings.gptq(),
        bits=base.bits,
        group_size=base.group_size,
        overrides=overrides,
        embedding_bits=bits.get(EMBEDDING),
        head_bits=bits.get(HEAD),
    )


def _possible_sizes(
    model: FloatModel, settings: MixedSettings
) -> dict[str, dict[ModuleFormat | None, int]]:
    """Bytes of every matrix and table in every format that fits it; None is as it is."""
    sizes: dict[str, dict[ModuleFormat | None, int]] = {}
    scale_bytes = 4 if settings.scale_type == "float32" else 2
    for name, (inputs, outputs) in model.matrices.items():
        fitting = [f for f in settings.choices() if _fits(inputs, outputs, f)]
        if not fitting:
            raise SettingsError(
                f"no format fits {name} of {inputs} inputs and {outputs} outputs; give one whose "
                "group_size divides the inputs"
            )
        sizes[name] = {f: _size(name, inputs, outputs, f, scale_bytes) for f in fitting}
    present = tensor_headers(model.folder)
    for module in _table_names(model):
        table = present[f"{module}.weight"]
        rows, width = table.shape
        sizes[module] = {None: table.size + len(module) + _HEADER_BYTES}
        if not settings.tables:
            continue
        group = _table_group(width, settings)
        for bits in TABLE_BITS:
            form = ModuleFormat(bits=bits, group_size=group, symmetric=settings.symmetric)
            if _fits(width, rows, form):
                sizes[module][form] = _size(module, width, rows, form, scale_bytes)
    return sizes


def _table_group(width: int, settings: MixedSettings) -> int:
    """Columns per group of the tables, which have one: the most that all formats' bits have."""
    largest = []
    for bits in TABLE_BITS:
        groups = [form.group_size for form in settings.choices() if form.bits == bits]
        groups = [group for group in groups if group > 0] or [128]
        largest.append(max(groups))
    return next((g for g in (128, 64, 32, 16) if width % g == 0 and g <= min(largest)), -1)


def _table_names(model: FloatModel) -> tuple[str, ...]:
    return (EMBEDDING,) if model.config.tie_word_embeddings else (EMBEDDING, HEAD)


def _fits(inputs: int, outputs: int, form: ModuleFormat) -> bool:
    unit = codes_per_unit(form.bits)
    divides = form.group_size == -1 or inputs % form.group_size == 0
    return divides and inputs % unit == 0 and outputs % unit == 0


def _size(name: str, inputs: int, outputs: int, form: ModuleFormat, scale_bytes: int) -> int:
    groups = 1 if form.group_size == -1 else inputs // form.group_size
    codes = inputs * outputs * form.bits // 8
    grids = groups * outputs * (8 * scale_bytes + form.bits) // 8
    return codes + grids + 4 * inputs + 4 * (len(name) + _HEADER_BYTES)


def size_limit(model: FloatModel, settings: BudgetSettings) -> int:
    """The size that a mix of a model may have.

    Args:
        model: The float model.
        settings: The size as it is asked for.

    Returns:
        Bytes of weights, scales and tables together.
    """
    if settings.size_mb is not None:
        return math.floor(settings.size_mb * 1e6)
    if settings.bits_per_weight is not None:
        return math.floor(settings.bits_per_weight * describe(model.folder).parameters / 8)
    present = tensor_headers(model.folder)
    tables = {name: present[f"{name}.weight"].shape for name in _table_names(model)}
    return q4_k_m_bytes(
        model.matrices,
        {name: (width, rows) for name, (rows, width) in tables.items()},
        sum(math.prod(present[name].shape) for name in _other_tensors(model)),
    )


def _bytes_of_others(model: FloatModel) -> int:
    """Bytes of norms and biases, which stay as they are."""
    present = tensor_headers(model.folder)
    return sum(present[name].size + len(name) + _HEADER_BYTES for name in _other_tensors(model))


def _other_tensors(model: FloatModel) -> list[str]:
    """Names of the tensors that are neither matrices nor tables."""
    chosen = {f"{name}.weight" for name in (*model.matrices, EMBEDDING, HEAD)}
    return [
        name
        for name in tensor_headers(model.folder)
        if name not in chosen and not name.endswith("rotary_emb.inv_freq")
    ]


def _fused_with(name: str) -> str:
    """The product that a matrix belongs to where a runtime multiplies several as one."""
    layer, _, matrix = name.rpartition(".")
    return f"{layer}.{_PRODUCTS.get(matrix, matrix)}"


def _choices(
    sizes: Mapping[str, Mapping[ModuleFormat | None, int]], costs: Costs, left: float
) -> dict[str, list[Choice]]:
    """What each format takes and costs; ``left`` is the share of rounding's KL that stays.

    Tables are rounded, so that all of it stays of theirs.
    """

    def cost(name: str, form: ModuleFormat | None) -> float:
        if form is None:
            return 0.0
        return costs[name][form] * (1 if name in (EMBEDDING, HEAD) else left)

    return {
        name: [Choice(form, size, cost(name, form)) for form, size in by_form.items()]
        for name, by_form in sizes.items()
    }
