"""The command ``mistill``: parse, call the Python API, print.

Options come from the settings dataclasses of the steps, so that a default is written once.
An error that a user can meet is printed as one line and ends with 2; anything else is a bug of
ours and keeps its traceback.

It is one file because each command is little more than its signature and its help, and whoever
looks for a command without a group of its own finds it here.
"""

from __future__ import annotations

import json as json_library
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from cyclopts.exceptions import CycloptsError
from rich.console import Console

from distill import (
    GenerateSettings,
    HealSettings,
    StudentSettings,
    TargetSettings,
    TrainSettings,
)
from export import GgufSettings, OnnxSettings
from mistill import __version__
from mistill.chat.settings import ChatSettings
from mistill.cli import bench_commands, eval_commands, quantize_commands, tune_commands
from mistill.cli.command_output import is_main_process, print_folder, print_result
from mistill.cli.help_pages import SAMPLING, HelpPage
from mistill.cli.options import LISTS, Flat, Texts
from mistill.cli.outside import (
    OUR_PACKAGES,
    SignalledError,
    ending_on_signals,
    from_outside,
    is_lost,
    make_visible,
    refuse,
    refuse_words,
    require_known_method,
    speak_utf8,
    with_counts,
    without_output,
    without_verbose,
)
from mistill.cli.serving import ServeCommandSettings, print_address
from mistill.compressing import CompressSettings
from mistill.engine.language_model import Provider
from mistill.errors import MissingExtraError, MistillError, SettingsError
from mistill.settings import require

_log = logging.getLogger(__name__)

app = App(
    name="mistill",
    version=__version__,
    help="Make a large language model small enough to chat on a laptop. With -v, a command tells "
    "its settings, what it does, and how long it took.",
    version_flags=("--version", "-V"),
    help_format="plaintext",
    help_formatter=HelpPage(),
    default_parameter=LISTS,
    # An interruption is told what becomes of the work, below.
    suppress_keyboard_interrupt=False,
)
app.register_install_completion_command(
    help="Complete commands and options with the Tab key, in bash, zsh and fish."
)
app.command(tune_commands.app)
app.command(quantize_commands.app)
app.command(bench_commands.app)
app.command(eval_commands.app)


@app.command
def teacher(
    source: str, target: Path, /, *, overwrite: bool = False, json: bool = False
) -> dict[str, Any]:
    """Save a teacher from the Hub, a GGUF file or a folder as a plain model folder.

    Args:
        source: The model: a Hub id such as owner/name, a model folder, a GGUF file, or @smollm2
            for SmolLM2-135M-Instruct from a Python package.
        target: The model folder to write.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    from mistill.sources.source import save_model

    return print_folder(save_model(source, target, overwrite=overwrite), json)


@app.command(
    help_formatter=HelpPage(
        {
            "Replies": ("max_new_tokens", "system", "batch_size"),
            "Teacher on a server": ("server", "api_key_file"),
            "Replies that are kept": ("keep_unfinished", "max_repeats", "drop_duplicates"),
            "Best of several replies": ("best_of", "reward", "by", "schema", "pattern", "pairs"),
            "Prompts and instructions that are written": (
                *("without_prompts", "reverse", "forward", "keep_share"),
            ),
            **SAMPLING,
            "Held-out data": ("held_out", "held_out_share"),
        }
    )
)
def generate(
    teacher: str,
    prompts: Path,
    target: Path,
    /,
    *,
    reward: Path | None = None,
    forward: str | None = None,
    settings: Annotated[GenerateSettings, Flat] = GenerateSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Let a teacher answer a file of prompts, to get conversations to train a student on.

    Args:
        teacher: The model that answers: a model folder, a Hub id, a GGUF file, or @smollm2. With
            --server the name of a model there.
        prompts: A text file with one prompt per line; @teacher with --without-prompts, and texts
            with --reverse.
        target: The .jsonl file of conversations to write. The same command resumes an interrupted
            run.
        reward: The folder of a reward model that chooses among several replies.
        forward: With --reverse, a model that grades each instruction by how much likelier it makes
            its text: a model folder, a Hub id, a GGUF file, or @smollm2.
        settings: How the replies are sampled.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    from distill import generate_conversations

    file = generate_conversations(
        teacher,
        prompts,
        target,
        reward=reward,
        forward=forward,
        settings=settings,
        overwrite=overwrite,
    )
    with file.open(encoding="utf-8") as lines:
        count = sum(1 for _ in lines)
    words = f"{count} pairs" if settings.pairs else f"{count} conversations"
    return print_result({"path": str(file), "conversations": count}, words, file, json)


@app.command(help_formatter=HelpPage({"Data": ("texts",)}))
def reverse(
    target: Path, /, *, texts: Texts, overwrite: bool = False, json: bool = False
) -> dict[str, Any]:
    """Swap the sides of conversations, to tune a model that writes instructions for texts.

    Args:
        target: The .jsonl file of conversations to write.
        texts: Conversations. A .jsonl, .json, .csv or .parquet file, a Hub dataset, or @demo-train.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    from distill import reverse_conversations

    file = reverse_conversations(texts, target, overwrite=overwrite)
    with file.open(encoding="utf-8") as lines:
        count = sum(1 for _ in lines)
    facts = {"path": str(file), "conversations": count}
    return print_result(facts, f"{count} reversed conversations", file, json)


@app.command(
    help_formatter=HelpPage(
        {
            "Size of the student": (
                *("layers", "parameters", "megabytes_at_4_bits"),
                *("hidden_size", "intermediate_size", "key_value_heads"),
            ),
            "What is pruned": ("texts", "choose", "keep", "calibration_tokens", "block_length"),
            "Healing in closed form": ("heal", "heal_tokens"),
            "Student with random weights": ("fresh", "attention_heads", "seed"),
        }
    )
)
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
    """Make a student: prune the teacher, or start from random weights with its vocabulary.

    Args:
        teacher: The model to prune: a model folder, a Hub id, a GGUF file, or @smollm2.
        target: The model folder of the student to write.
        texts: Calibration data, on which the importance of layers, heads and channels is
            measured and the student is healed; best of several kinds. A .txt, .jsonl, .json,
            .csv or .parquet file, a Hub dataset, or @demo-train.
        settings: How much of the teacher the student keeps.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    from distill import new_student

    folder = new_student(
        teacher, target, texts=texts or None, settings=settings, overwrite=overwrite
    )
    return print_folder(folder, json)


@app.command(
    help_formatter=HelpPage(
        {
            "Models and text": ("teacher", "texts", "tokens", "block_length"),
            "Fit": ("ridge", "kept_layers"),
        }
    )
)
def heal(
    student: Path,
    target: Path,
    /,
    *,
    teacher: str,
    texts: Texts,
    settings: Annotated[HealSettings, Flat] = HealSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Refit a pruned student's output matrices in closed form to what its teacher computes.

    No gradient is computed. The same command resumes an interrupted run.

    Args:
        student: The model folder of the student to heal, as mistill student makes it.
        target: The model folder of the healed student to write.
        teacher: The model that the student was pruned from: a model folder, a Hub id, a GGUF
            file, or @smollm2.
        texts: Calibration data, best of several kinds: as many tokens of each are read. A .txt,
            .jsonl, .json, .csv or .parquet file, a Hub dataset, or @demo-train.
        settings: How the matrices are fitted.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    from distill import heal as heal_student

    folder = heal_student(
        student, target, teacher=teacher, texts=texts, settings=settings, overwrite=overwrite
    )
    return print_folder(folder, json)


@app.command(
    help_formatter=HelpPage(
        {
            "What is stored": ("texts", "method", "draws", "top_k", "temperature", "codec", "seed"),
            "Memory and speed": (
                *("batch_size", "block_length", "precision", "memory_mib", "shard_tokens"),
            ),
            "Several machines": ("rank", "ranks"),
        }
    )
)
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
    """Store teacher logits on disk, so that students train without the teacher in memory.

    The same command resumes an interrupted run.

    Args:
        teacher: The model that predicts: a model folder, a Hub id, a GGUF file, or @smollm2.
        target: The folder of targets to write, on this machine or at an address such as
            s3://bucket/targets.
        texts: The training text that the teacher reads. A .txt, .jsonl, .json, .csv or .parquet
            file, a Hub dataset, or @demo-train.
        settings: What is stored of the teacher's distribution at each position.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    from distill import cache_targets
    from mistill.folders.folder import MANIFEST_FILE
    from mistill.folders.location import location_of
    from mistill.folders.targets_folder import describe_targets

    folder = cache_targets(teacher, target, texts=texts, settings=settings, overwrite=overwrite)
    location = location_of(folder)
    if not location.exists(MANIFEST_FILE):
        facts = {"path": str(folder), "finished": False}
        return print_result(facts, "unfinished: other processes are still writing", folder, json)
    info = describe_targets(location)
    words = (
        f"{info.positions:,} positions in {info.shards} shards, {info.size_bytes / 1e6:.2f} MB, "
        f"{info.bytes_per_position:.1f} bytes a position, all files counted"
    )
    return print_result(
        {"path": str(folder), "finished": True, **info.to_dict()}, words, folder, json
    )


@app.command(
    help_formatter=HelpPage(
        {
            "Data": ("texts", "teacher", "targets", "held_out", "tokens", "epochs"),
            "Loss": ("divergence", "mixture", "temperature", "cross_entropy"),
            "On-policy distillation": ("on_policy", "on_policy_temperature", "on_policy_prompt"),
            "Optimization": (
                *("learning_rate", "warmup", "weight_decay", "max_gradient_norm", "optimizer"),
                *("batch_size", "block_length", "lora_rank", "seed"),
            ),
            "Memory and speed": (
                *("micro_batch_size", "gradient_checkpointing", "loss_memory_mib", "precision"),
                *("teacher_precision", "teacher_device_map", "divide_teacher"),
            ),
            "Evaluation and checkpoints": (
                *("evaluate_every", "held_out_share", "held_out_tokens", "kept_back_share"),
                *("checkpoint_every", "twin", "trackers"),
            ),
        }
    )
)
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
    """Train a student to predict what its teacher predicts.

    The same command resumes an interrupted run.

    Args:
        student: The model folder of the student to train, as mistill student makes it.
        target: The model folder of the trained student to write.
        teacher: The teacher: a model folder, a Hub id, a GGUF file, or @smollm2. Give either
            this or --targets.
        targets: A folder of teacher logits, as mistill targets makes it, for the same texts.
        texts: Training text. A .txt, .jsonl, .json, .csv or .parquet file, a Hub dataset, or
            @demo-train.
        held_out: Text on which the student is evaluated and not trained. If it is not given,
            some documents of the texts are held out.
        settings: The loss, the optimization and the evaluation.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    from distill import train

    folder = train(
        student,
        target,
        teacher=teacher,
        targets=targets,
        texts=texts,
        held_out=held_out or None,
        settings=settings,
        overwrite=overwrite,
    )
    return print_folder(folder, json)


@app.command(
    help_formatter=HelpPage(
        {
            "Size and speed": (
                "precision",
                "activations",
                "context_length",
                "head_bits",
                "embedding_bits",
            ),
            "Matrix products": ("block_size", "accuracy_level", "float_columns", "tune_for"),
            "KV cache": ("cache", "cache_texts", "ring"),
            "Other runtimes": ("portable", "layout"),
            "Checks": ("parity_positions", "memory_speed"),
        }
    )
)
def export(
    source: Path,
    target: Path,
    /,
    *,
    settings: Annotated[OnnxSettings, Flat] = OnnxSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Export a model to an ONNX folder that runs fast on a CPU.

    Args:
        source: The model folder to export, with float, GPTQ or NF4 weights.
        target: The ONNX folder to write.
        settings: What the graph looks like.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    from export import to_onnx

    folder = to_onnx(source, target, settings=settings, overwrite=overwrite)
    if settings.layout == "mistill":
        return print_folder(folder, json)
    size = sum(file.stat().st_size for file in (folder / "onnx").iterdir())
    facts = {"path": str(folder), "form": settings.layout, "weight_bytes": size}
    return print_result(facts, f"transformers.js folder, {size / 1e6:.1f} MB", folder, json)


@app.command(
    help_formatter=HelpPage(
        {
            "Size": ("size_mb", "bits_per_weight", "tokens_per_second"),
            "Data": ("texts", "held_out", "samples", "block_length"),
            "Work": ("tuning_steps", "seed"),
            "Chatbot": ("context_length",),
        }
    )
)
def compress(
    source: str,
    target: Path,
    /,
    *,
    texts: Texts = ("@demo-train", "@demo-plain"),
    held_out: Texts = ("@demo-held-out",),
    settings: Annotated[CompressSettings, Flat] = CompressSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Make a chatbot of a model in one step, within a size or at a speed.

    Bits are chosen for every matrix, the weights are quantized by GPTAQ, and an ONNX folder is made
    of them. The same command resumes an interrupted run.

    Args:
        source: A float model folder, a Hub id, a GGUF file, or @smollm2.
        target: The ONNX folder to write.
        texts: Text to calibrate and to tune on, best of several kinds. A .txt, .jsonl, .json,
            .csv or .parquet file, a Hub dataset, or one that mistill ships: @demo-train
            (conversations) and @demo-plain (plain text).
        held_out: Other text, on which the chatbot is compared with its source.
        settings: How small the chatbot is, and how much work goes into it.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    from mistill.compressing import compress

    folder = compress(
        source, target, texts=texts, held_out=held_out, settings=settings, overwrite=overwrite
    )
    from mistill.cli.onnx_report import speed_in_words
    from mistill.folders.folder import MANIFEST_FILE, read_json

    speed = read_json(folder / MANIFEST_FILE).get("speed")
    if speed is None:
        return print_folder(folder, json)
    print(speed_in_words(speed))
    return print_folder(folder, json, speed=speed)


@app.command(help_formatter=HelpPage({"Weights": ("dtype", "table_dtype")}))
def gguf(
    source: str,
    target: Path,
    /,
    *,
    settings: Annotated[GgufSettings, Flat] = GgufSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Export a model to a GGUF file for llama.cpp and Ollama.

    Args:
        source: The model folder to export, with float, GPTQ or NF4 weights.
        target: The .gguf file to write.
        settings: How the weights are stored.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    from export import to_gguf
    from export.llama_cpp.gguf_file import matrix_types
    from mistill.sources.source import resolve_model

    file = to_gguf(source, target, settings=settings, overwrite=overwrite)
    size = file.stat().st_size
    types = matrix_types(resolve_model(source), settings)
    dtype = " and ".join(dict.fromkeys(types.values()))
    facts = {"path": str(file), "form": "gguf", "dtype": dtype, "bytes": size}
    return print_result(facts, f"GGUF file, {dtype}, {size / 1e6:.1f} MB", file, json)


@app.command(help_formatter=HelpPage({"Measurement": ("model", "threads")}))
def probe(
    target: Path,
    /,
    *,
    model: Path | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Time matrix products on this machine, for mistill export --tune-for on another one.

    Args:
        target: The .json file to write.
        model: A model folder; products with its matrices are timed. If it is not given, matrices
            of common sizes are timed.
        threads: Number of threads. By default one for each processor that this process may use.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    from export import probe_cpu
    from mistill.folders.folder import read_json

    file = probe_cpu(target, model=model, threads=threads, overwrite=overwrite)
    facts = read_json(file)
    words = f"{len(facts['timings'])} products on {facts['machine']}, {facts['threads']} threads"
    return print_result({"path": str(file), **facts}, words, file, json)


@app.command
def inspect(folder: str, /, *, json: bool = False) -> int:
    """Show what a folder holds, how it was made, and what is wrong with it.

    Args:
        folder: A folder that mistill or transformers wrote: a model, an ONNX model, or targets,
            which may also lie at an address such as s3://bucket/targets; or a Hub id.
        json: Print the result as one line of JSON at the end.

    Returns:
        0 for a sound folder, 1 for one with problems.
    """
    from mistill.cli.inspection import inspect_folder

    inspection = inspect_folder(folder)
    Console().print(inspection.panel())
    if json:
        print(json_library.dumps(inspection.to_dict()))
    return 1 if inspection.problems else 0


@app.command(
    help_formatter=HelpPage(
        {
            "Conversation": (
                "prompt",
                "lines",
                "system",
                "session",
                "max_new_tokens",
                "stop",
                "overflow",
            ),
            **SAMPLING,
            "Speed": ("threads", "provider", "draft", "exact"),
            "Constrained decoding": ("json_schema", "regex", "grammar"),
        }
    )
)
def chat(
    folder: Path,
    words: str | None = None,
    /,
    *,
    prompt: Annotated[str | None, Parameter(alias="-p")] = None,
    lines: bool = False,
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
    """Chat with a model in the terminal, or answer one prompt.

    Args:
        folder: The model: an ONNX folder, which is faster and needs no PyTorch, or a model folder.
        words: A prompt to answer. Without one, a terminal is chatted with, and what comes from a
            pipe is the prompt.
        prompt: The prompt to answer, as an option.
        lines: Answer each line of standard input, as a conversation, instead of the whole; a
            program that waits for an answer with the pipe open is answered so in any case.
        system: The system prompt that begins the conversation.
        threads: Number of threads. By default one for each processor that this process may use.
        provider: The execution provider of ONNX Runtime; cuda and tensorrt need onnxruntime-gpu,
            directml needs onnxruntime-directml, coreml a Mac.
        draft: Write faster by speculative decoding. With "lookup", draft tokens are looked up in
            the conversation (prompt lookup decoding). With the ONNX folder of a smaller model
            that has the same vocabulary, that draft model proposes them.
        exact: Keep greedy replies, and those with a seed, the same whenever the same is said:
            earlier replies are read again, and speculative decoding is off if it could change the
            text. With --no-exact, replies may differ from run to run.
        json_schema: A file with a JSON schema; every reply is JSON that fits it.
        regex: A regular expression; every reply matches it from start to end.
        grammar: A file with a grammar in Lark's notation; every reply follows it.
        session: A file that holds the conversation and its KV cache. If it exists, the
            conversation continues; it is saved there after each reply.
        settings: How the replies are sampled, and when they end.
    """
    from mistill import constraints
    from mistill.chat.terminal_chat import run_terminal_chat

    require(
        words is None or prompt is None, "give the prompt once, behind the folder or with --prompt"
    )
    constraint_options = [json_schema, regex, grammar]
    require(
        sum(option is not None for option in constraint_options) <= 1,
        "give only one of --json-schema, --regex and --grammar",
    )
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
        prompt=prompt if words is None else words,
        lines=lines,
    )


@app.command(
    help_formatter=HelpPage(
        {
            "Address": ("host", "port", "allow_host", "allow_origin"),
            "Keys": ("api_key_file", "no_key"),
            "Model": ("model_name", "any_model", "threads", "provider", "context"),
            "Load": ("slots", "queue", "queue_seconds", "prefix_mib", "stream_interval_ms"),
            "Replies that do not say how": ("max_new_tokens", *SAMPLING["Sampling"]),
            "Other pages": ("metrics", "page"),
        }
    )
)
def serve(
    folder: Path, /, *, settings: Annotated[ServeCommandSettings, Flat] = ServeCommandSettings()
) -> int:
    """Serve a chatbot to OpenAI's clients and to a page in the browser.

    Args:
        folder: The ONNX folder of a chatbot, as mistill export writes it.
        settings: Where and to whom it is served.

    Returns:
        0 after it was told to stop, 1 if the engine crashed.
    """
    from mistill.serve.running import serve as serve_folder

    return serve_folder(folder, settings=settings, started=print_address)


@app.command(help_formatter=HelpPage({"Plan": ("dry_run",)}))
def run(
    recipe: Path, /, *, out: Path | None = None, dry_run: bool = False, json: bool = False
) -> None:
    """Run the steps of a recipe. Finished steps are skipped, and an interrupted one resumes.

    Args:
        recipe: A TOML file with one table for each step.
        out: The folder for all outputs. By default the recipe's own out.
        dry_run: Check the recipe and say what would run, about how long it would take and what it
            would leave on the disk; run nothing.
        json: Print the result as one line of JSON at the end.
    """
    from mistill.recipe import read_recipe, run_recipe

    if dry_run:
        from mistill.planning import describe_plan, plan_recipe

        loaded = read_recipe(recipe, out=out)
        planned = plan_recipe(loaded)
        print(describe_plan(loaded, planned))
        if json:
            print(json_library.dumps([asdict(step) for step in planned]))
        return
    outputs = run_recipe(read_recipe(recipe, out=out), Console())
    if json and is_main_process():
        print(json_library.dumps({name: str(path) for name, path in outputs.items()}))


@app.command(help_formatter=HelpPage({"Upload": ("send", "private")}))
def push(
    folder: Path,
    repository: str,
    /,
    *,
    send: bool = False,
    private: bool = True,
    json: bool = False,
) -> dict[str, Any]:
    """Send a folder to the Hub. Without --send, say what would be sent, and send nothing.

    Args:
        folder: A folder that mistill made; it is looked at first, and refused if it is broken or
            names a place of this machine.
        repository: Where to, as owner/name; it is made if it does not exist.
        send: Send it. An interrupted upload goes on with the same command.
        private: Let only the owner see a new repository.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    from mistill.sharing import push as push_folder

    upload = push_folder(folder, repository, send=send, private=private)
    for name, size in upload.files.items():
        print(f"{size / 1e6:12,.3f} MB  {name}")
    for remark in upload.remarks:
        print(f"remark: {remark}")
    done = "sent" if send else "nothing was sent; --send sends them"
    facts = {**asdict(upload), "size_bytes": upload.size_bytes, "sent": send}
    words = f"{len(upload.files)} files, {upload.size_bytes / 1e6:,.1f} MB, {done}"
    return print_result(facts, words, f"https://huggingface.co/{repository}", json)


@app.command(help_formatter=HelpPage({"Demo": ("size",)}))
def demo(*, size: Literal["quick", "normal", "full"] = "normal", out: Path | None = None) -> None:
    """Distil, quantize, export and measure a small chatbot from SmolLM2-135M-Instruct.

    The same command resumes an interrupted demo.

    Args:
        size: How long it may take: about 4 minutes with quick, 12 with normal and 60 with full. How
            long the first steps take decides how much the student learns.
        out: The folder for all outputs. By default demo, demo-quick or demo-full.
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
    if sys.stdout is None:
        return refuse(SettingsError("the standard output is closed; open it, or use /dev/null"))
    speak_utf8()
    logging.basicConfig(level=logging.WARNING, format="mistill: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(make_visible)
    if is_main_process():
        # How many rows were read, cut and passed over, and what became of the replies.
        for name in ("mistill.text.row_counts", "distill.conversations"):
            logging.getLogger(name).setLevel(logging.INFO)
    # bitsandbytes warns of each faster kernel that this processor does not support.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    words, tells = without_verbose(sys.argv[1:] if arguments is None else arguments)
    if tells and is_main_process():
        for name in OUR_PACKAGES:
            logging.getLogger(name).setLevel(logging.INFO)
    began = time.monotonic()
    try:
        code = _run(words)
        sys.stdout.flush()
        if tells:
            _log.info("took %.1f s", time.monotonic() - began)
    except OSError as error:
        if not is_lost(sys.stdout):
            raise
        return without_output(error)
    return code


def _run(arguments: Sequence[str]) -> int:
    try:
        with ending_on_signals():
            words = with_counts(arguments)
            require_known_method(words, "quantize", list(quantize_commands.app))
            result = app(
                words,
                exit_on_error=False,
                print_error=False,
                help_on_error=False,
                result_action="return_value",
            )
    except CycloptsError as error:
        return refuse_words(error)
    except MistillError as error:
        return refuse(error)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "datasets", "onnx_ir"):
            raise
        return refuse(
            MissingExtraError(
                f"{error.name} is not installed, and this command needs it; install it with: "
                "pip install 'mistill[compress]'"
            )
        )
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is None and is_lost(sys.stdout):
            return without_output(error)
        outside = from_outside(error)
        if outside is None:
            raise
        return refuse(outside)
    except KeyboardInterrupt:
        print(
            "mistill: interrupted; the same command resumes the work or starts it again",
            file=sys.stderr,
        )
        return 130
    except SignalledError as error:
        print(
            f"mistill: ended by {error.name}; the same command resumes the work or starts it again",
            file=sys.stderr,
        )
        return 128 + error.number
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
