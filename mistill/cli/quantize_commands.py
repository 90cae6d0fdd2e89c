"""The commands ``mistill quantize``: parse, call the Python API, print."""

from __future__ import annotations

import json as json_library
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.console import Console

from mistill.cli.command_output import made_folder, speaks
from mistill.cli.options import Flat, Making, Texts
from mistill.errors import SettingsError
from mistill.settings import settings_dict
from quantize import (
    GptqSettings,
    MixedSettings,
    Nf4Settings,
    RotationSettings,
    RoundingSettings,
    SweepSettings,
    TuningSettings,
)

app = App(name="quantize", help="Make a smaller copy of a model folder.")


@app.default
def quantize_model(
    source: Path,
    target: Path,
    /,
    *,
    texts: Texts,
    sweep: Annotated[bool, Parameter(negative=())] = False,
    held_out: Texts = (),
    teacher: str | None = None,
    settings: Annotated[SweepSettings, Flat] = SweepSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Quantize by GPTQ with its defaults, or with --sweep in many ways and compare them.

    Args:
        source: A float model folder.
        target: The folder to make; of a sweep, a folder of folders, which an interrupted sweep
            resumes.
        texts: Text to calibrate on.
        sweep: Try a named set of ways, measure each, and print a table to choose from.
        held_out: Text to measure on; a sweep needs some.
        teacher: The model that the source learnt from, to compare with too.
        settings: What a sweep tries, and how much text is used.
        overwrite: Replace the target if it exists.
        json: End with one line of JSON.

    Returns:
        What was made.

    Raises:
        SettingsError: If what is given is of a sweep, and there is none, or the reverse.
    """
    import quantize

    if not sweep:
        if settings.variants:
            raise SettingsError("--variants is for a sweep; add --sweep")
        plain = GptqSettings(
            samples=settings.samples, block_length=settings.block_length, seed=settings.seed
        )
        made = quantize.to_gptq(
            source,
            target,
            texts=texts,
            held_out=held_out or None,
            teacher=teacher,
            settings=plain,
            overwrite=overwrite,
        )
        return _quantized(made, json)
    if not held_out:
        raise SettingsError("a sweep needs text to measure on; give --held-out")
    report = quantize.sweep(
        source,
        target,
        texts=texts,
        held_out=held_out,
        teacher=teacher,
        settings=settings,
        overwrite=overwrite,
    )
    if speaks():
        from quantize.sweeping.sweeping import sweep_notes, sweep_table

        console = Console()
        console.print(sweep_table(report))
        console.print(sweep_notes(report), soft_wrap=True, markup=False, highlight=False)
        if json:
            print(json_library.dumps(report.to_dict()))
    return report.to_dict()


@app.command
def gptq(
    source: Path,
    target: Path,
    /,
    *,
    texts: Texts,
    settings: Annotated[GptqSettings, Flat] = GptqSettings(),
    quantize_config: Path | None = None,
    backend: Literal["mistill", "gptqmodel", "auto_gptq"] = "mistill",
    how: Annotated[Making, Flat] = Making(),
) -> dict[str, Any]:
    """Round weights to a few bits, making up for each error in the columns that follow.

    Args:
        source: A float model folder.
        target: The folder to make.
        texts: Text to calibrate on.
        settings: The grid and the method.
        quantize_config: A quantize_config.json of AutoGPTQ, or a folder with one, for settings
            that are not given here.
        backend: Which library does it: gptqmodel where that is installed; auto_gptq says why that
            one cannot.
        how: How the result is measured, and what is printed.

    Returns:
        What was made.
    """
    from quantize import gptq_settings, to_gptq

    if quantize_config is not None:
        plain = settings_dict(GptqSettings())
        given = settings_dict(settings)
        settings = gptq_settings(
            quantize_config, **{name: given[name] for name in given if given[name] != plain[name]}
        )
    made = to_gptq(source, target, texts=texts, settings=settings, backend=backend, **how.given())
    return _quantized(made, how.json)


@app.command
def rounding(
    source: Path,
    target: Path,
    /,
    *,
    settings: Annotated[RoundingSettings, Flat] = RoundingSettings(),
    how: Annotated[Making, Flat] = Making(),
) -> dict[str, Any]:
    """Round weights to the nearest point of the same grid: the baseline.

    Args:
        source: A float model folder.
        target: The folder to make.
        settings: The grid.
        how: How the result is measured, and what is printed.

    Returns:
        What was made.
    """
    from quantize import to_rounding

    made = to_rounding(source, target, settings=settings, **how.given())
    return _quantized(made, how.json)


@app.command
def mixed(
    source: Path,
    target: Path,
    /,
    *,
    texts: Texts,
    settings: Annotated[MixedSettings, Flat] = MixedSettings(),
    how: Annotated[Making, Flat] = Making(),
) -> dict[str, Any]:
    """Choose bits and groups for every matrix, within a size, and quantize by GPTQ.

    Args:
        source: A float model folder.
        target: The folder to make.
        texts: Text to estimate on and to calibrate on.
        settings: The size and the choices.
        how: How the result is measured, and what is printed.

    Returns:
        What was made.
    """
    from quantize import to_mixed

    made = to_mixed(source, target, texts=texts, settings=settings, **how.given())
    return _quantized(made, how.json)


@app.command
def nf4(
    source: Path,
    target: Path,
    /,
    *,
    settings: Annotated[Nf4Settings, Flat] = Nf4Settings(),
    how: Annotated[Making, Flat] = Making(),
) -> dict[str, Any]:
    """Store weights as bitsandbytes' 4-bit normal floats.

    Args:
        source: A float model folder.
        target: The folder to make.
        settings: Whether the scales are quantized too.
        how: How the result is measured, and what is printed.

    Returns:
        What was made.
    """
    from quantize import to_nf4

    made = to_nf4(source, target, settings=settings, **how.given())
    return _quantized(made, how.json)


@app.command
def rotate(
    source: Path,
    target: Path,
    /,
    *,
    settings: Annotated[RotationSettings, Flat] = RotationSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Rotate hidden states, so that no direction of theirs stands out to be quantized.

    Args:
        source: A float model folder.
        target: The float folder to make: the same predictions from other weights.
        settings: Which rotation.
        overwrite: Replace the target if it exists.
        json: End with one line of JSON.

    Returns:
        What was made.
    """
    from quantize import rotate as rotate_folder

    return made_folder(rotate_folder(source, target, settings=settings, overwrite=overwrite), json)


@app.command
def tune(
    source: Path,
    target: Path,
    /,
    *,
    teacher: str,
    texts: Texts,
    held_out: Texts = (),
    settings: Annotated[TuningSettings, Flat] = TuningSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Tune the scales and norms of a GPTQ folder; an interrupted run resumes.

    Args:
        source: A GPTQ folder; its codes stay as they are.
        target: The folder to make.
        teacher: The model to imitate: the float one that was quantized, or that one's teacher.
        texts: Text to learn from.
        held_out: Text to judge on; the end of the texts if not given.
        settings: How to tune.
        overwrite: Replace the target if it exists.
        json: End with one line of JSON.

    Returns:
        What was made, with the KL to the teacher before and after.
    """
    from mistill.folders.lineage import read_lineage
    from quantize import tune as tune_folder

    made = tune_folder(
        source,
        target,
        teacher=teacher,
        texts=texts,
        held_out=held_out or None,
        settings=settings,
        overwrite=overwrite,
    )
    step = read_lineage(made)[-1]
    before, after = step["before"], step["after"]
    if speaks():
        print(
            f"KL to the teacher {before['kl']:.5f} before, {after['kl']:.5f} after; perplexity "
            f"{before['perplexity']:.2f}, {after['perplexity']:.2f}"
        )
    return made_folder(made, json, before=before, after=after)


@app.command
def convert(
    source: Path,
    target: Path,
    /,
    *,
    to: Literal["gptq", "gptq_v2"],
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Store the codes of a GPTQ folder in the other checkpoint format; no code or zero changes.

    Args:
        source: A GPTQ folder.
        target: The folder to make.
        to: gptq stores zeros less one, gptq_v2 as they are.
        overwrite: Replace the target if it exists.
        json: End with one line of JSON.

    Returns:
        What was made.
    """
    from quantize import convert as convert_folder

    return made_folder(convert_folder(source, target, to=to, overwrite=overwrite), json)


@app.command
def dequantize(
    source: Path,
    target: Path,
    /,
    *,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Turn a GPTQ or NF4 folder back into a float one that predicts the same.

    Args:
        source: A GPTQ or NF4 folder.
        target: The folder to make.
        dtype: Type of the weights; float32 holds what the codes say exactly.
        overwrite: Replace the target if it exists.
        json: End with one line of JSON.

    Returns:
        What was made.
    """
    from quantize import dequantize as dequantize_folder

    return made_folder(dequantize_folder(source, target, dtype=dtype, overwrite=overwrite), json)


@app.command
def merge(
    base: Path,
    adapter: Path,
    target: Path,
    /,
    *,
    texts: Texts = (),
    held_out: Texts = (),
    float_base: Path | None = None,
    settings: Annotated[GptqSettings, Flat] = GptqSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Merge a LoRA adapter; with texts, quantize in the better of two orders and show both.

    Args:
        base: A float, GPTQ or NF4 folder.
        adapter: A folder that peft saved.
        target: The folder to make.
        texts: Text to calibrate on; the result stays float without it.
        held_out: Text to compare the two orders on; the calibration text if not given.
        float_base: The float original of a quantized base, where its lineage does not find it.
        settings: How to quantize; those of a GPTQ base if none is given.
        overwrite: Replace the target if it exists.
        json: End with one line of JSON.

    Returns:
        What was made, with the KL of both orders.
    """
    from quantize import merge_lora

    made = merge_lora(
        base,
        adapter,
        target,
        texts=texts or None,
        held_out=held_out or None,
        settings=None if settings == GptqSettings() else settings,
        float_base=float_base,
        overwrite=overwrite,
    )
    return _merged(made, json)


def _quantized(path: Path, json: bool) -> dict[str, Any]:
    """Say what quantizing has made, and how close it is where that was measured."""
    from mistill.cli.fidelity import fidelity_table, read_fidelity

    measured = read_fidelity(path)
    if measured is None:
        return made_folder(path, json)
    if speaks():
        Console().print(fidelity_table(measured))
    return made_folder(path, json, measured=measured)


def _merged(path: Path, json: bool) -> dict[str, Any]:
    """Say what a merge has made, and how far both orders are from the float merged model."""
    from mistill.folders.lineage import read_lineage

    step = read_lineage(path)[-1]
    for name, one in step.get("orders", {}).items() if speaks() else ():
        chosen = " (kept)" if name == step["chosen"] else ""
        print(
            f"{name.replace('_', ' ')}: KL {one['kl']:.5f}, perplexity {one['perplexity']:.2f} "
            f"of {one['reference_perplexity']:.2f}{chosen}"
        )
    facts = {name: step[name] for name in ("orders", "chosen") if name in step}
    return made_folder(path, json, **facts)
