"""Folders for ONNX Runtime GenAI, made by its own model builder."""

from __future__ import annotations

from pathlib import Path

from benchmarks.rivals.environment import Environment
from benchmarks.rivals.making import Order, find_package, float_folder, largest_block, run_offline
from mistill.errors import MissingExtraError
from mistill.folders.folder import read_json
from mistill.settings import require

_PRECISIONS = ("int4", "int8", "fp32")

# The builder as a script. transformers must not find mistral-common, which it would load the
# tokenizer of a Mistral model with, and which needs more than it says.
_BUILD = (
    "import pathlib, runpy, sys; builder = {builder!r}; "
    "sys.path.insert(0, str(pathlib.Path(builder).parent)); sys.argv[0] = builder; "
    "sys.modules['mistral_common'] = None; runpy.run_path(builder, run_name='__main__')"
)


def check_variant(variant: str) -> None:
    """Refuse a variant that cannot be made.

    Args:
        variant: ``default``, ``best``, a precision, or ``key=value`` of its builder, joined by
            ``+``.
    """
    for part in variant.split("+"):
        require(
            part in ("default", "best", *_PRECISIONS) or "=" in part[1:],
            "genai's variants are default, best, int4, int8, fp32 or options of its builder such "
            f"as block_size=64+prune_lm_head=true, not {variant!r}",
        )


def make(order: Order) -> tuple[dict[str, str], str]:
    """Make a folder.

    Args:
        order: The weight format, the source and the folders.

    Returns:
        The builder's options, and how the folder was made.
    """
    weights, preparation = float_folder(order.source, order.scratch)
    precision, options = builder_options(order.variant, read_json(weights / "config.json"))
    python, builder = find_builder(order.environment)
    command = [str(python), "-c", _BUILD.format(builder=str(builder)), "-i", str(weights)]
    command += ["-o", str(order.folder), "-p", precision, "-e", "cpu"]
    command += ["-c", str(order.scratch / "cache")]
    if options:
        command += ["--extra_options", *(f"{name}={value}" for name, value in options.items())]
    run_offline(command, ORT_DISABLE_TELEMETRY="1")
    flags = " ".join(["-p", precision, "-e", "cpu", *(f"{k}={v}" for k, v in options.items())])
    return {
        "precision": precision,
        **options,
    }, f"{preparation}onnxruntime-genai's builder.py {flags}"


def builder_options(variant: str, config: dict[str, object]) -> tuple[str, dict[str, str]]:
    """Options of the builder.

    Args:
        variant: As ``check_variant`` says. ``best`` takes what is fastest on a processor: the
            largest blocks that divide the model's widths, a head that scores the last position
            only, and one table for embedding and head where the model ties them.
        config: The model's config.json.

    Returns:
        The precision and the extra options.
    """
    precision = "int4"
    options: dict[str, str] = {}
    for part in variant.split("+"):
        if part in _PRECISIONS:
            precision = part
        elif part == "best":
            options["block_size"] = str(largest_block(config))
            options["prune_lm_head"] = "true"
            if config.get("tie_word_embeddings"):
                options["shared_embeddings"] = "true"
        elif part != "default":
            name, _, value = part.partition("=")
            options[name] = value
    return precision, options


def find_builder(environment: Environment) -> tuple[Path, Path]:
    """The model builder, and a Python that can run it.

    Args:
        environment: Where genai is installed.

    Returns:
        The Python and the file.

    Raises:
        MissingExtraError: If the package has no builder.
    """
    needs = ("torch", "transformers", "onnx_ir", "onnx")
    package, python = find_package(environment, "onnxruntime_genai", needs)
    builder = package / "models" / "builder.py"
    if not builder.is_file():
        raise MissingExtraError(
            f"{package} holds no models/builder.py; install a whole onnxruntime-genai with: "
            "pip install onnxruntime-genai"
        )
    return python, builder
