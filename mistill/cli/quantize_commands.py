"""The commands ``mistill quantize``: parse, call the Python API, print.

It is one file because each command is little more than its signature and its help.
"""

from __future__ import annotations

import json as json_library
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.console import Console

from mistill.cli.command_output import is_main_process, print_folder
from mistill.cli.help_pages import GPTQ, GRID, HelpPage
from mistill.cli.options import LISTS, Flat, OutputOptions, Texts
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

app = App(
    name="quantize",
    default_parameter=LISTS,
    help="Quantize the weights of a model folder.",
    help_formatter=HelpPage(
        {
            "Data": ("texts", "held_out", "teacher"),
            "Calibration data": ("samples", "block_length", "seed"),
            "Comparison of several formats": ("sweep", "variants", "held_out_samples"),
        }
    ),
)


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
    """Quantize by GPTQ with its defaults, or compare several formats with --sweep.

    Args:
        source: The model folder to quantize, with float weights.
        target: The quantized folder to write. With --sweep, a folder that holds one quantized
            folder for each format; the same command resumes an interrupted sweep.
        texts: Calibration data. A .txt, .jsonl, .json, .csv or .parquet file, a Hub dataset, or
            @demo-train.
        sweep: Quantize in several formats, measure each one, and print a table to choose from.
        held_out: Text on which the KL divergence from the source and the perplexity are measured.
            A sweep needs it.
        teacher: The model that the source was distilled from. If it is given, the KL divergence
            from it is measured on the held-out text too.
        settings: Which formats a sweep tries, and how much text is used.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.

    Raises:
        SettingsError: If an option of a sweep is given without one, or a sweep without text.
    """
    import quantize

    if not sweep:
        if settings.variants:
            raise SettingsError("--variants is for a sweep of several formats; add --sweep")
        plain = GptqSettings(
            samples=settings.samples, block_length=settings.block_length, seed=settings.seed
        )
        folder = quantize.to_gptq(
            source,
            target,
            texts=texts,
            held_out=held_out or None,
            teacher=teacher,
            settings=plain,
            overwrite=overwrite,
        )
        return _quantized(folder, json)
    if not held_out:
        raise SettingsError("a sweep measures each format on held-out text; give --held-out")
    report = quantize.sweep(
        source,
        target,
        texts=texts,
        held_out=held_out,
        teacher=teacher,
        settings=settings,
        overwrite=overwrite,
    )
    if is_main_process():
        from quantize.sweeping.sweeping import sweep_notes, sweep_table

        console = Console()
        console.print(sweep_table(report))
        console.print(sweep_notes(report), soft_wrap=True, markup=False, highlight=False)
        if json:
            print(json_library.dumps(report.to_dict()))
    return report.to_dict()


@app.command(
    help_formatter=HelpPage(
        {
            "Data and size": ("texts", "bits", "group_size", "held_out", "teacher"),
            **GRID,
            **GPTQ,
            "Other libraries": ("quantize_config", "backend", "model_file_base_name"),
        }
    )
)
def gptq(
    source: Path,
    target: Path,
    /,
    *,
    texts: Texts,
    settings: Annotated[GptqSettings, Flat] = GptqSettings(),
    quantize_config: Path | None = None,
    backend: Literal["mistill", "gptqmodel", "auto_gptq"] = "mistill",
    output: Annotated[OutputOptions, Flat] = OutputOptions(),
) -> dict[str, Any]:
    """Quantize weights by GPTQ, which corrects each rounding error in the columns that follow.

    Args:
        source: The model folder to quantize, with float weights.
        target: The quantized folder to write.
        texts: Calibration data. A .txt, .jsonl, .json, .csv or .parquet file, a Hub dataset, or
            @demo-train.
        settings: The grid of the codes and the algorithm.
        quantize_config: A quantize_config.json of AutoGPTQ, or a folder that holds one. It sets
            every option that is not given on the command line.
        backend: The library that quantizes: mistill, or gptqmodel if it is installed. auto_gptq
            is refused with an explanation, because that library cannot do it any more.
        output: How the result is measured, and what is printed.

    Returns:
        The facts that were printed.
    """
    from quantize import gptq_settings, to_gptq

    if quantize_config is not None:
        plain = settings_dict(GptqSettings())
        options = settings_dict(settings)
        settings = gptq_settings(
            quantize_config,
            **{name: value for name, value in options.items() if value != plain[name]},
        )
    folder = to_gptq(
        source, target, texts=texts, settings=settings, backend=backend, **output.keywords()
    )
    return _quantized(folder, output.json)


@app.command(
    help_formatter=HelpPage(
        {"Data and size": ("bits", "group_size", "held_out", "teacher"), **GRID}
    )
)
def rounding(
    source: Path,
    target: Path,
    /,
    *,
    settings: Annotated[RoundingSettings, Flat] = RoundingSettings(),
    output: Annotated[OutputOptions, Flat] = OutputOptions(),
) -> dict[str, Any]:
    """Quantize weights by rounding each to the nearest code: the baseline of GPTQ.

    Args:
        source: The model folder to quantize, with float weights.
        target: The quantized folder to write.
        settings: The grid of the codes.
        output: How the result is measured, and what is printed.

    Returns:
        The facts that were printed.
    """
    from quantize import to_rounding

    folder = to_rounding(source, target, settings=settings, **output.keywords())
    return _quantized(folder, output.json)


@app.command(
    help_formatter=HelpPage(
        {
            "Data and size": ("texts", "size_mb", "bits_per_weight", "held_out", "teacher"),
            "Formats to choose from": ("formats", "tables", "fused", "sensitivity_samples"),
            **GRID,
            **GPTQ,
        }
    )
)
def mixed(
    source: Path,
    target: Path,
    /,
    *,
    texts: Texts,
    settings: Annotated[MixedSettings, Flat] = MixedSettings(),
    output: Annotated[OutputOptions, Flat] = OutputOptions(),
) -> dict[str, Any]:
    """Quantize by GPTQ in mixed precision, with bits and group sizes chosen to fit a size.

    Args:
        source: The model folder to quantize, with float weights.
        target: The quantized folder to write.
        texts: Calibration data, on which the sensitivity of each matrix is measured as well. A
            .txt, .jsonl, .json, .csv or .parquet file, a Hub dataset, or @demo-train.
        settings: The size, and the formats to choose from.
        output: How the result is measured, and what is printed.

    Returns:
        The facts that were printed.
    """
    from quantize import to_mixed

    folder = to_mixed(source, target, texts=texts, settings=settings, **output.keywords())
    return _quantized(folder, output.json)


@app.command(
    help_formatter=HelpPage({"Data and size": ("double_quantization", "held_out", "teacher")})
)
def nf4(
    source: Path,
    target: Path,
    /,
    *,
    settings: Annotated[Nf4Settings, Flat] = Nf4Settings(),
    output: Annotated[OutputOptions, Flat] = OutputOptions(),
) -> dict[str, Any]:
    """Quantize weights to NF4, the 4-bit type of bitsandbytes and QLoRA.

    Args:
        source: The model folder to quantize, with float weights.
        target: The quantized folder to write.
        settings: Whether the scales are quantized as well.
        output: How the result is measured, and what is printed.

    Returns:
        The facts that were printed.
    """
    from quantize import to_nf4

    folder = to_nf4(source, target, settings=settings, **output.keywords())
    return _quantized(folder, output.json)


@app.command(help_formatter=HelpPage({"Rotation": ("seed", "dtype")}))
def rotate(
    source: Path,
    target: Path,
    /,
    *,
    settings: Annotated[RotationSettings, Flat] = RotationSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Rotate the hidden states, so that no channel has outliers that make quantization coarse.

    Args:
        source: The model folder to rotate, with float weights.
        target: The float folder to write. Its weights differ and its predictions are the same.
        settings: Which rotation, and the type of the weights.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    from quantize import rotate as rotate_folder

    return print_folder(rotate_folder(source, target, settings=settings, overwrite=overwrite), json)


@app.command(
    help_formatter=HelpPage(
        {
            "Data": ("teacher", "texts", "seen_text", "held_out", "held_out_blocks"),
            "Training": ("steps", "batch_size", "learning_rate", "norms", "block_length", "seed"),
            "Evaluation and resuming": ("evaluate_every", "checkpoint_every", "trackers"),
            "Memory and speed": (
                *("micro_batch_size", "gradient_checkpointing", "loss_memory_mib", "precision"),
            ),
        }
    )
)
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
    """Train the scales and norms of a GPTQ folder to imitate a teacher.

    The codes stay as they are. The same command resumes an interrupted run.

    Args:
        source: The GPTQ folder to train.
        target: The GPTQ folder to write.
        teacher: The model to imitate: the float model that was quantized, or the teacher of that
            model.
        texts: Training text. A .txt, .jsonl, .json, .csv or .parquet file, a Hub dataset, or
            @demo-train.
        held_out: Text on which the KL divergence from the teacher is measured. By default the
            last blocks of the texts.
        settings: How to train.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed, with the KL to the teacher before and after.
    """
    from mistill.folders.lineage import read_lineage
    from quantize import tune as tune_folder

    folder = tune_folder(
        source,
        target,
        teacher=teacher,
        texts=texts,
        held_out=held_out or None,
        settings=settings,
        overwrite=overwrite,
    )
    step = read_lineage(folder)[-1]
    before, after = step["before"], step["after"]
    if is_main_process():
        print(
            f"KL divergence from the teacher: {before['kl']:.5f} before, {after['kl']:.5f} after; "
            f"perplexity: {before['perplexity']:.2f} before, {after['perplexity']:.2f} after"
        )
    return print_folder(folder, json, before=before, after=after)


@app.command(help_formatter=HelpPage({"Format": ("to",)}))
def convert(
    source: Path,
    target: Path,
    /,
    *,
    to: Literal["gptq", "gptq_v2"],
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Convert a GPTQ folder between the checkpoint formats gptq and gptq_v2.

    No code and no zero point changes.

    Args:
        source: The GPTQ folder to convert.
        target: The GPTQ folder to write.
        to: The format to write. gptq stores each zero point less 1; gptq_v2 stores it as it is.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    from quantize import convert as convert_folder

    return print_folder(convert_folder(source, target, to=to, overwrite=overwrite), json)


@app.command(help_formatter=HelpPage({"Format": ("dtype",)}))
def dequantize(
    source: Path,
    target: Path,
    /,
    *,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Turn quantized weights back into floats, with the same predictions.

    Args:
        source: The GPTQ or NF4 folder to dequantize.
        target: The float folder to write.
        dtype: Type of the float weights; float32 represents the quantized weights exactly.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    from quantize import dequantize as dequantize_folder

    return print_folder(dequantize_folder(source, target, dtype=dtype, overwrite=overwrite), json)


@app.command(
    help_formatter=HelpPage(
        {
            "Data and size": ("texts", "held_out", "bits", "group_size", "float_base"),
            **GRID,
            **GPTQ,
            "Other libraries": ("model_file_base_name",),
        }
    )
)
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
    """Merge a LoRA adapter into its base model, and quantize the result if texts are given.

    An adapter that was trained on quantized weights can be merged into those or into the weights
    before quantization, and the merged model quantized before or after. With held-out text both are
    made, the one with the lower cross-entropy is kept, and both figures are printed.

    Args:
        base: The base model of the adapter: a float, GPTQ or NF4 folder.
        adapter: The folder of the adapter, as peft saves it.
        target: The folder of the merged model to write.
        texts: Calibration data. Without it the merged model keeps float weights.
        held_out: Text of the kind that the adapter was trained on, on which both are compared. By
            default the calibration data.
        float_base: The float model that a quantized base was made from, if the lineage of the
            base does not name it.
        settings: How to quantize. By default as the base is, if that is a GPTQ folder.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed, with the figures of both.
    """
    from quantize import merge_lora

    folder = merge_lora(
        base,
        adapter,
        target,
        texts=texts or None,
        held_out=held_out or None,
        settings=None if settings == GptqSettings() else settings,
        float_base=float_base,
        overwrite=overwrite,
    )
    return _merged(folder, json)


def _quantized(path: Path, json: bool) -> dict[str, Any]:
    """Print facts about a quantized folder, and its KL divergence where that was measured."""
    from mistill.cli.fidelity import fidelity_table, read_fidelity

    measured = read_fidelity(path)
    if measured is None:
        return print_folder(path, json)
    if is_main_process():
        Console().print(fidelity_table(measured))
    return print_folder(path, json, measured=measured)


def _merged(path: Path, json: bool) -> dict[str, Any]:
    """Print facts about a merged folder, and the figures of both ways."""
    from mistill.folders.lineage import read_lineage

    step = read_lineage(path)[-1]
    ways, costs = step.get("orders", step.get("ways", {})), step.get("cross_entropy", {})
    if costs and is_main_process():
        print(
            f"held-out cross-entropy: {costs['base']:.4f} before tuning, {costs['trained']:.4f} "
            "as trained"
        )
        for name, figures in ways.items():
            chosen = " (kept)" if name == step["chosen"] else ""
            compared = "as trained" if "ways" in step else "the float merged model"
            print(
                f"{name.replace('_', ' ')}: {costs[name]:.4f}, KL {figures['kl']:.5f} to "
                f"{compared}{chosen}"
            )
    names = ("orders", "ways", "chosen", "chosen_by", "cross_entropy", "share_kept")
    facts = {name: step[name] for name in names if name in step}
    return print_folder(path, json, **facts)
