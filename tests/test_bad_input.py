"""Bad input is refused at once with one line and exit code 2, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from mistill.cli.app import main
from tests.tiny import tiny_model

Prepare = Callable[[Path], object]
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers are 48 wide, so that groups of 32 do not fit; read only."""
    return tiny_model(
        tmp_path_factory.mktemp("models") / "narrow",
        hidden_size=48,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=96,
        num_hidden_layers=1,
    )


@pytest.fixture
def place(
    tmp_path: Path,
    teacher: Path,
    model: Path,
    narrow: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder to stand in, with a teacher, a student, a narrow model and chats in it."""
    for name, source in (("teacher", teacher), ("student", model), ("narrow", narrow)):
        shutil.copytree(source, tmp_path / name)
    shutil.copyfile(chats, tmp_path / "chats.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder: Path) -> dict[str, int]:
    return {
        str(item.relative_to(folder)): item.stat().st_size if item.is_file() else -1
        for item in folder.rglob("*")
    }


def write(name: str, text: str) -> Prepare:
    return lambda place: (place / name).write_text(text, "utf-8")


def lines(name: str, *values: object) -> Prepare:
    return write(name, "".join(json.dumps(value) + "\n" for value in values))


def edit_json(name: str, **changes: object) -> Prepare:
    def change(place: Path) -> None:
        content = json.loads((place / name).read_text("utf-8"))
        content |= changes
        (place / name).write_text(json.dumps(content), "utf-8")

    return change


def cut(name: str, size: int) -> Prepare:
    return lambda place: os.truncate(place / name, size)


def remove(name: str) -> Prepare:
    return lambda place: (place / name).unlink()


def swap_tokens(place: Path) -> None:
    """Exchange two tokens of the student's vocabulary; its size stays the same."""
    file = place / "student" / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    one, two = [name for name in vocabulary if name.isalpha() and len(name) == 1][:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(content), "utf-8")


def both(first: Prepare, second: Prepare) -> Prepare:
    def prepare(place: Path) -> None:
        first(place)
        second(place)

    return prepare


def rounded(_: Path) -> None:
    """Make a quantized folder beside the student."""
    assert main(ROUNDED.split()) == 0


DISTILL = "distill student out --teacher teacher --texts chats.jsonl --tokens 64"
GPTQ = "quantize gptq student out --texts chats.jsonl --group-size 32"
ROUNDED = "quantize rounding student rounded --group-size 32"

CASES: dict[str, tuple[str, str, Prepare | None]] = {
    # what: (command, words of the message, what is done before)
    "no such folder": ("student nowhere/at/all out --layers 2", "nowhere/at/all", None),
    "a file for a folder": ("export chats.jsonl out", "is a file", None),
    "an empty folder": (
        "export empty out",
        "config.json is missing",
        lambda place: (place / "empty").mkdir(),
    ),
    "a folder without weights": (
        "export student out",
        "model.safetensors is missing",
        remove("student/model.safetensors"),
    ),
    "a folder without tokenizer": (
        DISTILL,
        "tokenizer.json is missing",
        remove("student/tokenizer.json"),
    ),
    "weights cut short": (
        "export student out",
        "cut short",
        cut("student/model.safetensors", 9999),
    ),
    "a damaged config": ("export student out", "not valid JSON", write("student/config.json", "{")),
    "a damaged tokenizer": (DISTILL, "tokenizer", write("student/tokenizer.json", "{}")),
    "pickled weights only": (
        "quantize rounding student out --group-size 32",
        "safetensors only",
        lambda place: (
            (place / "student/model.safetensors").rename(place / "student/pytorch_model.bin")
            and None
        ),
    ),
    "an unknown architecture": (
        "export student out",
        "gpt_neox",
        edit_json("student/config.json", model_type="gpt_neox"),
    ),
    "an unknown architecture to quantize": (
        GPTQ,
        "gpt_neox",
        edit_json("student/config.json", model_type="gpt_neox"),
    ),
    "an unknown quantization": (
        "export student out",
        "awq",
        edit_json("student/config.json", quantization_config={"quant_method": "awq"}),
    ),
    "code from the model's folder": (
        "teacher student out",
        "code",
        edit_json("student/config.json", auto_map={"AutoModel": "evil.Model"}),
    ),
    "a target that exists": ("export student teacher", "exists already", None),
    "a distilled target that exists": (
        DISTILL.replace(" out ", " teacher "),
        "exists already",
        None,
    ),
    "a target below a file": ("export student chats.jsonl/out", "is a file", None),
    "vocabularies that differ in size": (
        DISTILL,
        "vocab",
        edit_json("student/config.json", vocab_size=400),
    ),
    "vocabularies that differ in a token": (DISTILL, "differ", swap_tokens),
    "a missing text": (DISTILL.replace("chats", "missing"), "missing.jsonl", None),
    "an empty text": (DISTILL, "chats.jsonl", write("chats.jsonl", "")),
    "a damaged line": (
        DISTILL,
        "line 2",
        write("chats.jsonl", json.dumps(CHAT) + "\n{not json\n"),
    ),
    "columns nobody knows": (DISTILL, "columns", lines("chats.jsonl", {"foo": "bar"})),
    "a conversation without an answer": (
        DISTILL,
        "assistant",
        lines("chats.jsonl", {"messages": [{"role": "user", "content": "hi"}]}),
    ),
    "a role nobody knows": (
        DISTILL,
        "role",
        lines("chats.jsonl", {"messages": [{"role": "wizard", "content": "hi"}]}),
    ),
    "a kind of text nobody reads": (DISTILL.replace("chats.jsonl", "x.docx"), "x.docx", None),
    "chats for a model without a template": (
        DISTILL,
        "template",
        remove("student/chat_template.jinja"),
    ),
    "bits nobody has": (GPTQ + " --bits 5", "bits", None),
    "a group size that does not divide": (
        GPTQ.replace("student", "narrow"),
        "divide",
        None,
    ),
    "a group size of zero": (GPTQ.replace("32", "0"), "group_size", None),
    "rounding what is rounded": (
        "quantize rounding rounded out --group-size 32",
        "already",
        rounded,
    ),
    "rows that blocks of NF4 do not fill": (
        "quantize nf4 narrow out",
        "multiple of 64 weights",
        None,
    ),
    "a teacher to compare with on no text": (
        GPTQ + " --teacher teacher",
        "give held_out",
        None,
    ),
    "held-out text that is not there": (
        "quantize nf4 student out --held-out missing.jsonl",
        "missing.jsonl",
        None,
    ),
    "held-out text of one token": (
        "quantize rounding student out --group-size 32 --held-out one.txt",
        "no token to predict",
        write("one.txt", "a"),
    ),
    "a teacher that is not there": (
        GPTQ + " --held-out chats.jsonl --teacher nowhere",
        "nowhere",
        None,
    ),
    "a teacher with another vocabulary": (
        GPTQ + " --held-out chats.jsonl --teacher teacher",
        "different vocabularies",
        swap_tokens,
    ),
    "a mix with two limits": (
        "quantize mixed student out --texts chats.jsonl --size-mb 1 --bits-per-weight 5",
        "not both",
        None,
    ),
    "a mix smaller than any": (
        "quantize mixed student out --texts chats.jsonl --bits-per-weight 1 "
        "--formats bits=4,group_size=32",
        "takes at least",
        None,
    ),
    "a mix of blocks longer than the model reads": (
        "quantize mixed student out --texts chats.jsonl --bits-per-weight 9 --block-length 9999",
        "exceeds the model's 512 positions",
        None,
    ),
    "a format of a mix that nobody knows": (
        "quantize mixed student out --texts chats.jsonl --size-mb 1 --formats bits=5",
        "bits must be",
        None,
    ),
    "a sweep without text to measure on": (
        "quantize student out --texts chats.jsonl --sweep",
        "give --held-out",
        None,
    ),
    "a variant that nobody knows": (
        "quantize student out --texts chats.jsonl --sweep --held-out chats.jsonl --variants gptq-7",
        "a variant is one of",
        None,
    ),
    "variants without a sweep": (
        "quantize student out --texts chats.jsonl --variants nf4",
        "add --sweep",
        None,
    ),
    "a rotation of what is quantized": (
        "quantize rotate rounded out",
        "is gptq already",
        rounded,
    ),
    "a rotation to a type nobody has": (
        "quantize rotate student out --dtype int8",
        "int8",
        None,
    ),
    "a rotation onto what exists": ("quantize rotate student teacher", "exists already", None),
    "a float model to tune": (
        "quantize tune student out --teacher teacher --texts chats.jsonl",
        "give a GPTQ folder to tune",
        None,
    ),
    "tuning without a teacher": ("quantize tune rounded out --texts chats.jsonl", "teacher", None),
    "tuning against another vocabulary": (
        "quantize tune rounded out --teacher teacher --texts chats.jsonl",
        "different vocabularies",
        both(swap_tokens, rounded),
    ),
    "tuning that leaps": (
        "quantize tune student out --teacher teacher --texts chats.jsonl --learning-rate 2",
        "learning_rate must be above 0 and below 1",
        None,
    ),
    "tuning on too little text": (
        "quantize tune rounded out --teacher teacher --texts one.txt",
        "fill no block",
        both(rounded, write("one.txt", "Too short.")),
    ),
    "a format to convert to that nobody reads": (
        "quantize convert student out --to v3",
        "v3",
        None,
    ),
    "a float model to convert": (
        "quantize convert student out --to gptq",
        "only GPTQ folders have two formats",
        None,
    ),
    "a float model to dequantize": (
        "quantize dequantize student out",
        "give a GPTQ or NF4 folder to dequantize",
        None,
    ),
    "an adapter that is none": (
        "quantize merge student teacher out",
        "it has no adapter_config.json",
        None,
    ),
    "a setting that AutoGPTQ has not": (
        GPTQ + " --quantize-config q.json",
        "colour",
        write("q.json", '{"bits": 4, "colour": "blue"}'),
    ),
    "a library that cannot be imported": (GPTQ + " --backend auto_gptq", "auto_gptq", None),
    "an override that matches nothing": (
        GPTQ + " --overrides lm_head:bits=8",
        "lm_head",
        None,
    ),
    "a recipe with a teacher and no held-out text": (
        "run r.toml",
        "teacher needs held_out beside it",
        write(
            "r.toml",
            '[a]\nstep = "rounding"\nsource = "student"\nteacher = "teacher"\ngroup_size = 32',
        ),
    ),
    "a recipe that tunes against nobody": (
        "run r.toml",
        "teacher is missing",
        write("r.toml", '[a]\nstep = "tune"\nsource = "student"\ntexts = "chats.jsonl"'),
    ),
    "a temperature of zero": (DISTILL + " --temperature 0", "temperature", None),
    "a share above one": (DISTILL + " --cross-entropy 1.5", "cross_entropy", None),
    "no tokens": (DISTILL.replace("--tokens 64", "--tokens 0"), "tokens", None),
    "a batch that does not divide": (
        DISTILL + " --batch-size 3 --micro-batch-size 2",
        "divide",
        None,
    ),
    "more layers than the teacher": (
        "student teacher out --layers 9 --texts chats.jsonl",
        "layers",
        None,
    ),
    "no layers": ("student teacher out --layers 0 --texts chats.jsonl", "layers", None),
    "influence without text": ("student teacher out --layers 2", "texts", None),
    "a width cut without text": ("student teacher out --hidden-size 32", "give texts", None),
    "a wider student than its teacher": (
        "student teacher out --intermediate-size 999 --texts chats.jsonl",
        "at most the teacher's 128",
        None,
    ),
    "two sizes at once": (
        "student teacher out --layers 2 --parameters 90000 --texts chats.jsonl",
        "give one of them",
        None,
    ),
    "a size that no student has": (
        "student teacher out --megabytes-at-4-bits 0.01 --texts chats.jsonl",
        "no student of this width fits",
        None,
    ),
    "a size that the teacher has": (
        "student teacher out --parameters 999999999 --texts chats.jsonl",
        "the whole teacher is no larger",
        None,
    ),
    "query heads of a student that is cut": (
        "student teacher out --attention-heads 2 --texts chats.jsonl",
        "give key_value_heads",
        None,
    ),
    "a layer that is not there": (
        "student teacher out --choose named --keep 0 --keep 7",
        "7",
        None,
    ),
    "prompts that are missing": ("generate teacher none.txt out.jsonl", "none.txt", None),
    "an option that is not known": ("export student out --colour blue", "colour", None),
    "a word for a number": (GPTQ + " --bits four", "four", None),
    "a missing argument": ("export student", "TARGET", None),
    "a command that is not known": ("exprot student out", "exprot", None),
    "a benchmark of nothing": ("bench --texts chats.jsonl", "model", None),
    "a benchmark with two vocabularies": (
        "bench teacher student --texts chats.jsonl",
        "differ",
        swap_tokens,
    ),
    "a chat with a folder that is not there": ("chat nowhere", "no folder or file", None),
    "an inspection of nothing": ("inspect nowhere", "no folder or file", None),
    "a recipe that is not there": ("run none.toml", "none.toml is missing", None),
    "a recipe that is no TOML": ("run r.toml", "not a TOML", write("r.toml", "= 3")),
    "a recipe without steps": ("run r.toml", "no steps", write("r.toml", 'out = "x"')),
    "a recipe with an unknown step": (
        "run r.toml",
        "'distil'",
        write("r.toml", '[a]\nstep = "distil"'),
    ),
    "a recipe with an unknown option": (
        "run r.toml",
        "did you mean layers",
        write("r.toml", '[a]\nstep = "student"\nteacher = "teacher"\nlayer = 3'),
    ),
    "a recipe with a setting out of range": (
        "run r.toml",
        "bits",
        write("r.toml", '[a]\nstep = "gptq"\nsource = "student"\ntexts = "x"\nbits = 5'),
    ),
    "a recipe that names a later table": (
        "run r.toml",
        "neither an earlier table nor a model",
        write("r.toml", '[a]\nstep = "rounding"\nsource = "b"\n[b]\nstep = "nf4"\nsource = "a"'),
    ),
    "a recipe with a teacher and targets": (
        "run r.toml",
        "give either teacher or targets; both are given",
        write(
            "r.toml",
            '[a]\nstep = "distill"\nstudent = "student"\nteacher = "teacher"\n'
            'targets = "teacher"\ntexts = "chats.jsonl"',
        ),
    ),
    "a distillation without a teacher": (
        "distill student out --texts chats.jsonl",
        "neither is given",
        None,
    ),
    "targets that are not there": (
        "distill student out --targets nowhere --texts chats.jsonl --tokens 64",
        "nowhere",
        None,
    ),
    "targets for a divergence that they do not tell": (
        "distill student out --targets nowhere --texts chats.jsonl --divergence tvd",
        "divergence = tvd needs the teacher itself",
        None,
    ),
    "a tracker that is not installed": (
        f"{DISTILL} --trackers trackio",
        "pip install trackio",
        None,
    ),
    "a student's own text without a teacher to score it": (
        f"{DISTILL} --cross-entropy 1 --on-policy 0.5",
        "on_policy should be 0",
        None,
    ),
    "a teacher too narrow for four bits": (
        "distill student out --teacher narrow --texts chats.jsonl --teacher-precision nf4",
        "NF4 needs rows of a multiple of 64",
        None,
    ),
    "a recipe that lacks an input": (
        "run r.toml",
        "source is missing",
        write("r.toml", '[a]\nstep = "rounding"'),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(case, place, capfd):
    command, words, prepare = CASES[case]
    if prepare is not None:
        prepare(place)
    capfd.readouterr()
    before = snapshot(place)
    assert main(command.split()) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith("mistill: ")
    assert printed.err.count("\n") == 1, printed.err
    assert printed.out == ""
    assert words in printed.err
    assert snapshot(place) == before


@pytest.mark.parametrize(
    "command",
    [
        "export student out",
        "quantize rounding student out --group-size 32",
        "teacher student out",
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(command, place):
    before = snapshot(place)
    code = f"""
    import resource, sys
    import torch
    from mistill.cli.app import main
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    sys.exit(main({command.split()!r}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=place
    )
    assert done.returncode == 2, done.stderr
    assert "no room to write" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert snapshot(place) == before


def test_there_are_at_least_forty_cases():
    assert len(CASES) >= 40
