"""The command ``mistill``: parse, call the Python API, print.

Options come from the settings dataclasses of the steps, so that a default is written once.
An error that a user can meet is printed as one line and ends with 2; anything else is a bug of
ours and keeps its traceback.
"""

from __future__ import annotations

import json as json_library
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App
from cyclopts.exceptions import CycloptsError
from rich.console import Console

from distill import GenerateSettings, StudentSettings, TargetSettings, TrainSettings
from export import GgufSettings, OnnxSettings
from mistill import __version__
from mistill.chat.bot import ChatSettings
from mistill.cli import bench_commands, eval_commands, quantize_commands
from mistill.cli.command_output import made_folder, say, speaks
from mistill.cli.options import Flat, Texts
from mistill.engine.language_model import Provider
from mistill.errors import MissingExtraError, MistillError
from mistill.settings import require

app = App(
    name="mistill",
    version=__version__,
    help="Make a large language model small enough to chat on a laptop.",
    help_format="plaintext",
)
app.command(quantize_commands.app)
app.command(bench_commands.app)
app.command(eval_commands.app)


@app.command
def teacher(
    source: str, target: Path, /, *, overwrite: bool = False, json: bool = False
) -> dict[str, Any]:
    """Make a plain model folder of a teacher, wherever it comes from.

    Args:
        source: A Hub id, a model folder, a GGUF file, or @smollm2 for the embedded teacher.
        target: The folder to make.
        overwrite: Replace the target if it exists.
        json: End with one line of JSON.

    Returns:
        What was made.
    """
    from mistill.sources.source import save_model

    return made_folder(save_model(source, target, overwrite=overwrite), json)


@app.command
def generate(
    teacher: str,
    prompts: Path,
    target: Path,
    /,
    *,
    settings: Annotated[GenerateSettings, Flat] = GenerateSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Let a teacher write training conversations from a file of prompts.

    Args:
        teacher: The model that answers.
        prompts: A text file with one prompt a line.
        target: The .jsonl file to write; an interrupted run resumes.
        settings: How the teacher writes.
        overwrite: Replace the target if it exists.
        json: End with one line of JSON.

    Returns:
        What was made.
    """
    from distill import generate_conversations

    made = generate_conversations(teacher, prompts, target, settings=settings, overwrite=overwrite)
    with made.open(encoding="utf-8") as lines:
        count = sum(1 for _ in lines)
    return say({"path": str(made), "conversations": count}, f"{count} conversations", made, json)


@app.command
def student(
    teacher: str,
    target: Path,
    /,
    *,
    texts: Texts = (),
    settings: Annotated[StudentSettings, Flat] = StudentSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Cut a student out of its teacher, or make a fresh one with its vocabulary.

    Args:
        teacher: The model to start from.
        target: The folder to make.
        texts: Text to measure the teacher on.
        settings: What to keep of it.
        overwrite: Replace the target if it exists.
        json: End with one line of JSON.

    Returns:
        What was made.
    """
    from distill import new_student

    made = new_student(teacher, target, texts=texts or None, settings=settings, overwrite=overwrite)
    return made_folder(made, json)


@app.command
def targets(
    teacher: str,
    target: str,
    /,
    *,
    texts: Texts,
    settings: Annotated[TargetSettings, Flat] = TargetSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Keep what a teacher says about a text on disk; an interrupted run resumes.

    Args:
        teacher: The model to ask.
        target: The folder to make, on this machine or an address such as s3://bucket/targets.
        texts: Text to ask it about.
        settings: How to keep what it says.
        overwrite: Replace the target if it exists.
        json: End with one line of JSON.

    Returns:
        What was made.
    """
    from distill import cache_targets
    from mistill.folders.folder import MANIFEST_FILE
    from mistill.folders.location import location_of
    from mistill.folders.targets_folder import describe_targets

    made = cache_targets(teacher, target, texts=texts, settings=settings, overwrite=overwrite)
    location = location_of(made)
    if not location.exists(MANIFEST_FILE):
        facts = {"path": str(made), "finished": False}
        return say(facts, "unfinished: other ranks are still at work", made, json)
    info = describe_targets(location)
    words = (
        f"{info.positions:,} positions in {info.shards} shards, {info.size_bytes / 1e6:.2f} MB, "
        f"{info.bytes_per_position:.1f} bytes a position with everything counted"
    )
    return say({"path": str(made), "finished": True, **info.to_dict()}, words, made, json)


@app.command
def distill(
    student: Path,
    target: Path,
    /,
    *,
    teacher: str | None = None,
    targets: str | None = None,
    texts: Texts,
    held_out: Texts = (),
    settings: Annotated[TrainSettings, Flat] = TrainSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Teach a student to predict what its teacher predicts; an interrupted run resumes.

    Args:
        student: The folder of the student to train.
        target: The folder to make.
        teacher: The model to learn from.
        targets: A folder of what the teacher said about the texts, in place of the teacher.
        texts: Text to learn on.
        held_out: Text to judge the student on; part of the texts if not given.
        settings: How to train.
        overwrite: Replace the target if it exists.
        json: End with one line of JSON.

    Returns:
        What was made.
    """
    from distill import train

    made = train(
        student,
        target,
        teacher=teacher,
        targets=targets,
        texts=texts,
        held_out=held_out or None,
        settings=settings,
        overwrite=overwrite,
    )
    return made_folder(made, json)


@app.command
def export(
    source: Path,
    target: Path,
    /,
    *,
    settings: Annotated[OnnxSettings, Flat] = OnnxSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Make an ONNX folder that is fast on a CPU.

    Args:
        source: A float, GPTQ or NF4 folder.
        target: The folder to make.
        settings: What the graph looks like.
        overwrite: Replace the target if it exists.
        json: End with one line of JSON.

    Returns:
        What was made.
    """
    from export import to_onnx

    made = to_onnx(source, target, settings=settings, overwrite=overwrite)
    if settings.layout == "mistill":
        return made_folder(made, json)
    size = sum(file.stat().st_size for file in (made / "onnx").iterdir())
    facts = {"path": str(made), "form": settings.layout, "weight_bytes": size}
    return say(facts, f"transformers.js folder, {size / 1e6:.1f} MB", made, json)


@app.command
def gguf(
    source: str,
    target: Path,
    /,
    *,
    settings: Annotated[GgufSettings, Flat] = GgufSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Make a GGUF file: the same model for llama.cpp and Ollama.

    Args:
        source: A float, GPTQ or NF4 folder.
        target: The file to make.
        settings: How the weights are stored.
        overwrite: Replace the target if it exists.
        json: End with one line of JSON.

    Returns:
        What was made.
    """
    from export import to_gguf

    made = to_gguf(source, target, settings=settings, overwrite=overwrite)
    size = made.stat().st_size
    facts = {"path": str(made), "form": "gguf", "dtype": settings.dtype, "bytes": size}
    return say(facts, f"GGUF file, {settings.dtype}, {size / 1e6:.1f} MB", made, json)


@app.command
def probe(
    target: Path,
    /,
    *,
    model: Path | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Time this machine's kernels, for export --tune-for on another machine.

    Args:
        target: The .json file to write.
        model: A model folder whose matrices are timed; matrices of usual sizes if not given.
        threads: Threads to multiply with; all processors that may be used if not given.
        overwrite: Replace the target if it exists.
        json: End with one line of JSON.

    Returns:
        What was made.
    """
    from export import probe_cpu
    from mistill.folders.folder import read_json

    made = probe_cpu(target, model=model, threads=threads, overwrite=overwrite)
    found = read_json(made)
    words = f"{len(found['timings'])} products on {found['machine']}, {found['threads']} threads"
    return say({"path": str(made), **found}, words, made, json)


@app.command
def inspect(folder: str, /, *, json: bool = False) -> int:
    """Show what a folder is, how it was made, and what is wrong with it.

    Args:
        folder: Any folder of the road; targets may lie elsewhere, as at s3://bucket/targets.
        json: End with one line of JSON.

    Returns:
        0 for a sound folder, 1 for one with problems.
    """
    from mistill.cli.inspection import inspect_folder

    found = inspect_folder(folder)
    Console().print(found.panel())
    if json:
        print(json_library.dumps(found.to_dict()))
    return 1 if found.problems else 0


@app.command
def chat(
    folder: Path,
    /,
    *,
    system: str | None = None,
    threads: int | None = None,
    provider: Provider = "cpu",
    draft: str | None = None,
    exact: bool = True,
    json_schema: Path | None = None,
    regex: str | None = None,
    grammar: Path | None = None,
    session: Path | None = None,
    settings: Annotated[ChatSettings, Flat] = ChatSettings(),
) -> None:
    """Talk to a chatbot; lines from a pipe are answered one by one.

    Args:
        folder: An ONNX folder, or a model folder where PyTorch is installed.
        system: What the chatbot is told before the conversation.
        threads: Threads to compute with; all processors that may be used if not given.
        provider: What computes an ONNX folder; cuda and tensorrt need onnxruntime-gpu.
        draft: Guess ahead, to write faster: ``lookup`` guesses from the conversation, the ONNX
            folder of a smaller model with the same tokens from that model.
        exact: Guess only if greedy replies stay the same to the token.
        json_schema: A file with the JSON schema that every reply must fit.
        regex: A regular expression that every reply must match.
        grammar: A file with the Lark grammar that every reply must follow.
        session: Go on with the conversation in this file, and keep it there at the end.
        settings: How it picks its words.
    """
    from mistill import constraints
    from mistill.chat.terminal_chat import run_terminal_chat

    forms = [form for form in (json_schema, regex, grammar) if form is not None]
    require(len(forms) <= 1, "give one of --json-schema, --regex and --grammar, not several")
    constraint = None
    if json_schema is not None:
        constraint = constraints.json_schema(json_schema)
    elif regex is not None:
        constraint = constraints.regex(regex)
    elif grammar is not None:
        constraint = constraints.lark(grammar)
    run_terminal_chat(
        folder,
        system=system,
        threads=threads,
        settings=settings,
        session=session,
        provider=provider,
        draft=draft,
        exact=exact,
        constraint=constraint,
    )


@app.command
def run(recipe: Path, /, *, out: Path | None = None, json: bool = False) -> None:
    """Run a recipe: skip what is done, resume what was interrupted.

    Args:
        recipe: A TOML file with a table per step.
        out: The folder for all outputs; the recipe's own ``out`` if not given.
        json: End with one line of JSON.
    """
    from mistill.recipe import read_recipe, run_recipe

    outputs = run_recipe(read_recipe(recipe, out=out), Console())
    if json and speaks():
        print(json_library.dumps({name: str(path) for name, path in outputs.items()}))


@app.command
def demo(*, size: Literal["quick", "normal", "full"] = "normal", out: Path | None = None) -> None:
    """Run the whole road on the embedded teacher; an interrupted demo resumes.

    Args:
        size: ``quick`` takes under 4 minutes, ``normal`` under 12, ``full`` about an hour.
        out: The folder for all outputs; ``demo``, ``demo-quick`` or ``demo-full`` if not given.
    """
    from mistill.demo import run_demo

    run_demo(size, out, Console())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words of the command; those of the process if None.

    Returns:
        The exit code: 0, 1 for a finding, 2 for bad input, 130 for an interruption.
    """
    logging.basicConfig(level=logging.WARNING, format="mistill: %(message)s")
    # bitsandbytes warns of each faster kernel that this processor has no use for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        result = app(
            arguments,
            exit_on_error=False,
            print_error=False,
            help_on_error=False,
            result_action="return_value",
        )
    except (MistillError, CycloptsError) as error:
        return _refuse(error)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "datasets", "safetensors", "onnx_ir"):
            raise
        return _refuse(
            MissingExtraError(
                f"{error.name} is not installed; this command needs: "
                "pip install 'mistill[compress]'"
            )
        )
    except KeyboardInterrupt:
        print("mistill: interrupted; the same command resumes or starts again", file=sys.stderr)
        return 130
    return result if isinstance(result, int) else 0


def _refuse(error: Exception) -> int:
    print(f"mistill: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
