r"""Do our figures of a rival agree with those of the rival's own benchmark?

    python -m benchmarks.suite.rival_tools MODEL --texts TEXT --llama-cpp PLACE \
        --llama-cpp-programs FOLDER --genai PLACE --genai-benchmark benchmark_e2e.py \
        --openvino PLACE --against llama.cpp genai openvino

The same file is run in turn by our child process and by the rival's own program: ``llama-bench`` of
the same build as the library; ONNX Runtime GenAI's ``benchmark_e2e.py`` (from its repository, run
by the rival's Python); ``LLMPipeline`` of OpenVINO GenAI with the figures that it gives itself, as
in its ``benchmark_genai.py``. The last line is one JSON document: medians, and ratios of the same
turn. A rival whose own benchmark is not known is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures.passages import Passage, cut_prompts
from benchmarks.measure.children import Child, start_children
from benchmarks.measure.measuring import read_passages
from benchmarks.rivals.contest import InstalledRival, find_rivals, make_files
from benchmarks.rivals.engines import Note
from benchmarks.rivals.llama_cpp_files import MODEL_FILE
from benchmarks.rivals.making import run_offline, run_program
from benchmarks.rivals.openvino_model import EXACT
from benchmarks.settings import BenchSettings
from benchmarks.suite.places import add_options, places
from benchmarks.suite.turns import paired_ratio, summary
from mistill.folders.folder import open_folder, read_json

_WITHIN = 0.03
_GENAI_FILE = "genai_config.json"
_HOURS = 3600.0
_PROMPT = "prompt_tokens_per_second"
_DECODE = "decode_tokens_per_second"
# OpenVINO GenAI's pipeline with its own figures; token ids, since the folder has no tokenizer.
_LLM_PIPELINE = """
import json, random, sys
import numpy, openvino, openvino_genai as genai
folder, prompt, new, threads, size, told = sys.argv[1:]
scheduler = genai.SchedulerConfig()
scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = False, 2**31 - 1
told = {"INFERENCE_NUM_THREADS": int(threads), **json.loads(told)}
pipeline = genai.LLMPipeline(folder, "CPU", scheduler_config=scheduler, **told)
settings = genai.GenerationConfig()
settings.ignore_eos, settings.max_new_tokens = True, int(new)
settings.set_eos_token_id(0)
for _ in range(4):
    ids = [[random.randrange(int(size)) for _ in range(int(prompt))]]
    figures = pipeline.generate(openvino.Tensor(numpy.array(ids)), settings).perf_metrics
print()
print(json.dumps([figures.get_ttft().mean, figures.get_tpot().mean]))
"""
_SAID = {
    _PROMPT: r"Average Prompt Processing Throughput \(per token\): ([\d.]+) tps",
    _DECODE: r"Average Token Generation Throughput \(per token\): ([\d.]+) tps",
}


def main() -> None:
    """Compare, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a float, GPTQ or NF4 folder")
    parser.add_argument("--texts", required=True, help="text that prompts are taken from")
    parser.add_argument("--genai-benchmark", type=Path, help="its benchmark_e2e.py")
    add_options(parser, ("llama.cpp:q4_0", "llama.cpp:q4_k_m", "genai:default"))
    print(json.dumps(run(parser.parse_args())))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make the files, and let the two take turns with each.

    Args:
        args: The command line.

    Returns:
        The JSON document.
    """
    source = open_folder(args.model)
    settings = BenchSettings(scored_tokens=4 * args.prompt)
    passages = read_passages(args.texts, source.path, settings)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for contestant in find_rivals(args.against, places(args)):
            own = own_benchmark(contestant, args)
            if own is None:
                continue
            entry = make_files(contestant, source, source.path.name, Path(scratch))
            found[entry.rival.name] = {
                "version": entry.rival.version,
                "system": entry.rival.system,
                "made": entry.rival.made,
                **take_turns(entry.note, own, passages, args),
            }
    return {
        "rounds": args.rounds,
        "threads": args.threads,
        "prompt": args.prompt,
        "new_tokens": args.new_tokens,
        "rivals": found,
    }


Own = Callable[[Note], dict[str, float]]


def take_turns(
    note: Note, own: Own, passages: Sequence[Passage], args: argparse.Namespace
) -> dict[str, Any]:
    """Let our child and the rival's own program run one file in turn.

    Args:
        note: The rival's files, and what runs them.
        own: Runs the rival's own program on it.
        passages: Where our prompts come from.
        args: The command line.

    Returns:
        Of reading and writing: both medians, the ratio, and whether it is within 3%.
    """
    ours, theirs = [], []
    prompts = cut_prompts(passages, length=args.prompt, count=1 + args.rounds)
    with start_children([note], args.threads) as (child,):
        child.ask("open")
        our_turn(child, prompts[0], args)
        for prompt in prompts[1:]:
            ours.append(our_turn(child, prompt, args))
            theirs.append(own(note))
    report: dict[str, Any] = {}
    for name in (_PROMPT, _DECODE):
        ratio = paired_ratio(ours, theirs, name)
        report[name] = {
            "ours": summary(ours, name),
            "its_own": summary(theirs, name),
            "ratio": ratio,
            "within_3_percent": abs(ratio["median"] - 1) <= _WITHIN,
        }
    return report


def our_turn(child: Child, prompt: list[int], args: argparse.Namespace) -> dict[str, float]:
    """One turn of our own: a prompt, and what is written at the depth where its tool writes.

    ``llama-bench`` writes from the start of an empty text, the others after the prompt.

    Args:
        child: Runs the rival.
        prompt: What to read.
        args: The command line.

    Returns:
        Tokens per second of both.
    """
    limits = {"new_tokens": args.new_tokens, "seconds": _HOURS}
    first = child.ask("turn", prompt=prompt, **limits)
    apart = (child.folder / MODEL_FILE).is_file()
    second = child.ask("turn", prompt=prompt[:1], **limits) if apart else first
    return {
        _PROMPT: len(prompt) / first["first_token_seconds"],
        _DECODE: len(second["token_seconds"]) / sum(second["token_seconds"]),
    }


def own_benchmark(contestant: InstalledRival, args: argparse.Namespace) -> Own | None:
    """How a rival's own benchmark is run.

    Args:
        contestant: The rival.
        args: The command line.

    Returns:
        A function of the rival's files; None if its own benchmark is not known.
    """
    environment = contestant.environment
    if contestant.choice.engine.name == "llama.cpp":
        program = environment.programs and environment.programs / "llama-bench"
        if not program or not os.access(program, os.X_OK):
            return None
        return lambda note: run_llama_bench(program, Path(note.folder), args)
    if contestant.choice.engine.name == "openvino":
        return lambda note: run_llm_pipeline(environment.python, note, args)
    if contestant.choice.engine.name != "genai" or args.genai_benchmark is None:
        return None
    return lambda note: run_genai(environment.python, Path(note.folder), args)


def run_llama_bench(program: Path, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run ``llama-bench`` once.

    Args:
        program: The path of llama-bench.
        folder: The rival's folder.
        args: The command line.

    Returns:
        Tokens per second of reading and of writing.
    """
    command = [str(program), "-m", str(folder / MODEL_FILE), "-t", str(args.threads)]
    command += ["-p", str(args.prompt), "-n", str(args.new_tokens), "-r", "1", "-o", "json"]
    said = run_program(command)
    tests = json.loads(said[said.index("[\n") : said.rindex("]") + 1])
    return {(_PROMPT if test["n_prompt"] else _DECODE): test["avg_ts"] for test in tests}


def run_genai(python: Path, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run ONNX Runtime GenAI's own benchmark once.

    Args:
        python: The Python of its environment.
        folder: The rival's folder.
        args: The command line.

    Returns:
        Tokens per second of reading and of writing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        same = with_threads(folder, Path(scratch) / "model", args.threads)
        command = [str(python), str(args.genai_benchmark), "-i", str(same), "-k", "1"]
        command += ["-l", str(args.prompt), "-g", str(args.new_tokens), "-r", "1", "-w", "1"]
        command += ["--use_random_tokens", "-o", str(Path(scratch) / "genai.csv")]
        said = run_program(command, {**os.environ, "ORT_DISABLE_TELEMETRY": "1"})
    found = {}
    for name, words in _SAID.items():
        match = re.search(words, said)
        if match is None:
            raise SystemExit(f"{args.genai_benchmark} named no {name}:\n{said[-2000:]}")
        found[name] = float(match[1])
    return found


def with_threads(folder: Path, target: Path, threads: int) -> Path:
    """The same genai folder for a program that cannot be told of threads: its config says them.

    Args:
        folder: The rival's folder.
        target: The folder to make, of links.
        threads: Threads to compute with.

    Returns:
        The target.
    """
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file.resolve())
    config = read_json(folder / _GENAI_FILE)
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    (target / _GENAI_FILE).unlink()
    (target / _GENAI_FILE).write_text(json.dumps(config))
    return target


def run_llm_pipeline(python: Path, note: Note, args: argparse.Namespace) -> dict[str, float]:
    """Run OpenVINO GenAI's own pipeline, and take what it says after three turns of warming up.

    Args:
        python: The Python of its environment.
        note: The rival's files, and what runs them.
        args: The command line.

    Returns:
        Tokens per second of reading and of writing.
    """
    told = {name: value for name, value in note.settings.items() if name in EXACT}
    numbers = map(str, (args.prompt, args.new_tokens, args.threads, note.vocabulary_size))
    command = [str(python), "-P", "-c", _LLM_PIPELINE, note.folder, *numbers, json.dumps(told)]
    first, each = json.loads(run_offline(command).splitlines()[-1])
    return {_PROMPT: 1e3 * args.prompt / first, _DECODE: 1e3 / each}


if __name__ == "__main__":
    main()
