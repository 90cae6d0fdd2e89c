"""Folders for ONNX Runtime GenAI, made by its own model builder.

The builder needs PyTorch and transformers, which an environment that only runs models need not
have: its files are then run by our Python, as they lie in that environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.rivals.environment import Environment
from benchmarks.rivals.making import call, float_folder
from mistill.errors import MissingExtraError
from mistill.folder import FolderInfo, read_json
from mistill.settings import require

_PRECISIONS = ("int4", "int8", "fp32")
_BLOCKS = (128, 64, 32)
_FIND = (
    "import importlib.util as u, json; s = u.find_spec('onnxruntime_genai'); "
    "print(json.dumps([list(s.submodule_search_locations), "
    "all(u.find_spec(n) for n in ('torch', 'transformers', 'onnx_ir', 'onnx'))]))"
)

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


def make(
    variant: str, environment: Environment, source: FolderInfo, scratch: Path, folder: Path
) -> tuple[dict[str, str], str]:
    """Make a folder.

    Args:
        variant: As ``check_variant`` says.
        environment: Where genai is installed.
        source: The folder whose weights it gets; codes are multiplied out.
        scratch: Where a float folder is kept for the next variant.
        folder: Where to put the files.

    Returns:
        The builder's options, and how the folder came to be.
    """
    weights, words = float_folder(source, scratch)
    precision, options = builder_options(variant, read_json(weights / "config.json"))
    python, builder = find_builder(environment)
    command = [
        str(python),
        "-c",
        _BUILD.format(builder=str(builder)),
        "-i",
        str(weights),
        "-o",
        str(folder),
        "-p",
        precision,
    ]
    command += ["-e", "cpu", "-c", str(scratch / "cache")]
    if options:
        command += ["--extra_options", *(f"{name}={value}" for name, value in options.items())]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    call(command, {**variables, "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"})
    said = " ".join(["-p", precision, "-e", "cpu", *(f"{k}={v}" for k, v in options.items())])
    return {"precision": precision, **options}, f"{words}onnxruntime-genai's builder.py {said}"


def builder_options(variant: str, config: dict[str, object]) -> tuple[str, dict[str, str]]:
    """What the builder is told.

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
            widths = [config[name] for name in ("hidden_size", "intermediate_size")]
            fitting = [b for b in _BLOCKS if all(isinstance(w, int) and w % b == 0 for w in widths)]
            options["block_size"] = str(fitting[0] if fitting else _BLOCKS[-1])
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
    ran = subprocess.run(
        [str(environment.python), "-P", "-c", _FIND], capture_output=True, text=True, check=True
    )
    (package, *_), able = json.loads(ran.stdout)
    builder = Path(package) / "models" / "builder.py"
    if not builder.is_file():
        raise MissingExtraError(
            f"{package} holds no models/builder.py; install a whole onnxruntime-genai with: "
            "pip install onnxruntime-genai"
        )
    return (environment.python if able else Path(sys.executable)), builder
