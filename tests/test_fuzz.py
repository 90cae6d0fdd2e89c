"""Changed files of every form end every command soon, with one line and no traceback.

One small item of each form is made; then single values of its JSON documents are replaced or
removed, bytes are changed, and files are cut short. The seeds are fixed.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.forked import Ran, run_forked
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 10**12, 10**30, -(10**12), 0.5, 1e300),
    *(float("inf"), float("nan"), "", "x", "\ud800", "../../etc/passwd", "a" * 5000, "\x1b[31m"),
    *([], [1], ["x"], [None], {}, {"a": 1}, {"": None}, [[[[]]]]),
)
SECONDS = 60.0

# The commands that read a form; the first is the quickest.
COMMANDS: dict[str, tuple[str, ...]] = {
    "float": (
        "inspect {item}",
        "quantize rounding {item} out --group-size 32",
        "student {item} out --layers 1 --choose even",
        "teacher {item} out",
        "export {item} out --parity-positions 0",
        "gguf {item} out.gguf",
        "chat {item} --max-new-tokens 1",
        "quantize gptq {item} out --texts rows.jsonl --group-size 32 --block-length 32 --samples 2",
        "quantize nf4 {item} out",
    ),
    "gptq": (
        "inspect {item}",
        "quantize dequantize {item} out",
        "export {item} out --parity-positions 0",
        "quantize convert {item} out --to gptq_v2",
        "chat {item} --max-new-tokens 1",
    ),
    "nf4": ("inspect {item}", "quantize dequantize {item} out"),
    "chatbot": ("inspect {item}", "chat {item} --max-new-tokens 2"),
    "targets": (
        "inspect {item}",
        "distill model out --targets {item} --texts rows.jsonl --tokens 64 --block-length 64",
    ),
    "adapter": ("quantize merge model {item} out",),
    "model.gguf": ("teacher {item} out",),
    "session.st": ("chat chatbot --max-new-tokens 2 --session {item}",),
    "recipe.toml": ("run {item} --out out",),
    "rows.jsonl": (
        "student model out --layers 1 --texts {item} --calibration-tokens 64 --block-length 32",
    ),
    "schema.json": ("chat chatbot --max-new-tokens 2 --json-schema {item}",),
    "prompts.jsonl": ("generate model {item} out.jsonl --max-new-tokens 1 --keep-unfinished",),
}
FORMS = tuple(COMMANDS)


def lora_adapter(folder: Path) -> None:
    """An adapter of two matrices as peft writes it."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    stated |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": "model", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.{part}.weight": np.full(
            shape, 0.01, np.float32
        )
        for layer in range(2)
        for part, shape in (("lora_A", (2, 64)), ("lora_B", (64, 2)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> Iterator[Path]:
    """A folder with one item of each form; read only."""
    # What is imported here, the copies of this process need not import.
    for module in ("torch", "transformers", "onnxruntime", "peft", "mistill.cli.app", "export"):
        importlib.import_module(module)
    here = tmp_path_factory.mktemp("forms")
    model = tiny_model(here / "model", num_hidden_layers=2, seed=2)
    tiny_model(here / "teacher", seed=1)
    (here / "rows.jsonl").write_text(
        "".join(chats.read_text("utf-8").splitlines(keepends=True)[:12]), "utf-8"
    )
    lora_adapter(here / "adapter")
    shutil.copytree(model, here / "float")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(here / "cache"))
        make_forms(here)
        yield here


def make_forms(here: Path) -> None:
    """Make of the model what steps make of it, and write the small files."""
    for command, stdin in (
        ("quantize rounding model gptq --group-size 32", ""),
        ("quantize nf4 model nf4", ""),
        ("export model chatbot --parity-positions 0", ""),
        ("gguf model model.gguf", ""),
        ("targets teacher targets --texts rows.jsonl --block-length 64 --draws 4", ""),
        ("chat chatbot --max-new-tokens 2 --session session.st", "hi\n"),
    ):
        ran = run_forked(command.split(), cwd=here, stdin=stdin)
        assert ran.code == 0, (command, ran)
    (here / "recipe.toml").write_text(
        'out = "road"\n\n[a]\nstep = "teacher"\nsource = "model"\n\n[b]\nstep = "rounding"\n'
        'source = "a"\ngroup_size = 32\nbits = 4\nsymmetric = true\n'
    )
    schema = {"type": "object", "properties": {"a": {"enum": ["x", 1]}}, "required": ["a"]}
    (here / "schema.json").write_text(json.dumps(schema))
    (here / "prompts.jsonl").write_text('{"prompt": "hi"}\n{"prompt": "ho"}\n')


# --- changes --------------------------------------------------------------------------------------


def files_of(item: Path) -> list[Path]:
    return sorted(file for file in item.rglob("*") if file.is_file()) if item.is_dir() else [item]


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in a document; of long lists and objects some of them."""
    keys = (
        list(value)
        if isinstance(value, dict)
        else range(len(value))
        if isinstance(value, list)
        else []
    )
    step = max(1, len(keys) // 40)
    for key in list(keys)[::step]:
        yield (*path, key)
        yield from places_in(value[key], (*path, key))


def change_value(text: str, dice: random.Random) -> str:
    """A JSON document with one value replaced or removed."""
    value = copy.deepcopy(json.loads(text))
    places = list(places_in(value))
    if not places:
        return json.dumps(dice.choice(ODD_VALUES))
    *parents, key = dice.choice(places)
    holder = value
    for parent in parents:
        holder = holder[parent]
    if dice.random() < 0.2:
        del holder[key]
    else:
        holder[key] = dice.choice(ODD_VALUES)
    return json.dumps(value)


def change(item: Path, dice: random.Random) -> str:
    """Change one file of an item, and say what was done."""
    files = files_of(item)
    documents = [file for file in files if file.suffix == ".json"]
    if documents and dice.random() < 0.7:
        file = dice.choice(documents)
        file.write_text(change_value(file.read_text("utf-8"), dice))
        return f"a value of {file.name}"
    file = dice.choice(files)
    content = bytearray(file.read_bytes())
    if file.suffix == ".jsonl" and dice.random() < 0.7:
        lines = content.decode().splitlines()
        number = dice.randrange(len(lines))
        lines[number] = change_value(lines[number], dice)
        file.write_text("\n".join(lines) + "\n")
        return f"a value of line {number + 1}"
    if file.suffix == ".safetensors" and dice.random() < 0.5:
        length = int.from_bytes(content[:8], "little")
        header = change_value(content[8 : 8 + length].decode(), dice).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
        return f"a value in the header of {file.name}"
    if not content:
        file.write_bytes(b"\xff")
        return f"a byte in {file.name}, which was empty"
    kind = dice.random()
    if kind < 0.2:
        del content[dice.randrange(len(content)) :]
    else:
        # The start of a file says what the rest is.
        reach = len(content) if kind < 0.6 else min(len(content), 4096)
        for _ in range(dice.choice((1, 1, 4, 32))):
            content[dice.randrange(reach)] = dice.choice((0, 1, 255, dice.randrange(256)))
    file.write_bytes(bytes(content))
    return f"bytes of {file.name}"


# --- the promise ----------------------------------------------------------------------------------


def require_kept(ran: Ran, words: str) -> None:
    """Exit code 0, 1 or 2, soon; at a refusal one line; never a traceback."""
    assert ran.code is not None, f"{words}: still running after {SECONDS:g} s, {ran.err[-3000:]}"
    assert "Traceback" not in ran.err, f"{words}: {ran.err[-1500:]}"
    assert ran.code in (0, 1, 2), f"{words}: exit code {ran.code}, {ran.err[-500:]}"
    lines = [line for line in ran.err.splitlines() if line.strip()]
    assert all(line.startswith("mistill: ") for line in lines), f"{words}: {ran.err[-1500:]}"
    if ran.code == 2:
        # A line of a pipe that cannot be answered is named besides.
        assert len(lines) == 1 or "could not be answered" in lines[-1], f"{words}: {lines}"


def try_one(place: Path, scratch: Path, form: str, command: str, seed: int) -> Ran:
    dice = random.Random(f"{form} {command} {seed}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for item in place.iterdir():
        if item.name not in (form, "cache"):
            (scratch / item.name).symlink_to(item)
    if (place / form).is_dir():
        shutil.copytree(place / form, scratch / form)
    else:
        shutil.copyfile(place / form, scratch / form)
    what = change(scratch / form, dice)
    before = {item.name for item in scratch.iterdir()}
    words = command.format(item=form)
    ran = run_forked(words.split(), cwd=scratch, stdin="hi\n", seconds=SECONDS)
    require_kept(ran, f"{words} [{what}, seed {seed}]")
    if ran.code == 2:
        left = {item.name for item in scratch.iterdir()} - before
        assert left <= {".out.working", ".out.jsonl.working", "out"} - (
            set() if form == "recipe.toml" else {"out"}
        ), f"{words} [{what}, seed {seed}] left {left}"
    return ran


def fuzz(commands: int, inputs: int) -> Callable[..., None]:
    """A test of the first commands of each form with so many inputs."""

    @settings(
        max_examples=inputs,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # seeds do not shrink
        suppress_health_check=list(HealthCheck),
    )
    @given(form=st.sampled_from(FORMS), choice=st.integers(0, 10**6), seed=st.integers(0, 10**9))
    def test(place: Path, tmp_path: Path, form: str, choice: int, seed: int) -> None:
        known = COMMANDS[form][:commands]
        try_one(place, tmp_path / "scratch", form, known[choice % len(known)], seed)

    return test


test_changed_files_end_commands_with_one_line = fuzz(commands=2, inputs=200)
test_every_command_ends_with_one_line = pytest.mark.slow(fuzz(commands=99, inputs=1800))
