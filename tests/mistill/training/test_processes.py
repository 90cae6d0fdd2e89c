"""Several processes train as one does: same losses, same student, one of them writes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

import distill
from distill.settings import TrainSettings
from distill.training import trained_folder
from mistill.errors import SettingsError
from mistill.folders.lineage import read_lineage
from mistill.training import processes
from tests.distill.training.test_trained_folder import QUICK, hidden_beside
from tests.launching import launched
from tests.tiny import tiny_model

RUN: dict[str, Any] = {**QUICK, "tokens": 900, "micro_batch_size": 1, "evaluate_every": 2}
CONFIGS = Path(__file__).parents[3] / "examples" / "accelerate"


def environment_of(name: str) -> dict[str, str]:
    """What ``accelerate launch`` tells the processes that it starts with one of our configs."""
    config: Any = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    if config.distributed_type == DistributedType.DEEPSPEED:
        fields = {
            f"ACCELERATE_DEEPSPEED_{key.upper()}": str(value)
            for key, value in config.deepspeed_config.items()
        }
        return {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", **fields}
    words = ["--config_file", str(CONFIGS / f"{name}.yaml"), "program.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    told: dict[str, str] = prepare_multi_gpu_env(arguments)
    return {key: told[key] for key in told if key.startswith(("ACCELERATE_", "FSDP_"))}


FSDP = environment_of("fsdp2")
PROGRAM = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from accelerate import PartialState
from accelerate.utils import DistributedType
import distill
from distill.training import trainer
from mistill.training.processes import accelerating
if os.environ.get("ACCELERATE_USE_FSDP"):
    # accelerate divides weights among GPUs only; what it would do there works on CPUs too
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
student, target, teacher, texts, options, dies_at = sys.argv[1:]
original, count = trainer.accumulate_gradients, 0
def dying(*args):
    global count
    count += 1
    if count == int(dies_at):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
trainer.accumulate_gradients = dying
from distill.teacher import live_teacher
load = live_teacher.load_teacher
def loading(*args, **options):
    teacher = load(*args, **options)
    if isinstance(teacher, live_teacher.DividedTeacher):
        here = sum(p.to_local().numel() for p in teacher.answer.parameters())
        whole = sum(p.numel() for p in teacher.answer.parameters())
        # In one write: the other process prints to the same pipe.
        os.write(1, f"HELD {here} {whole}\\n".encode())
    return teacher
live_teacher.load_teacher = loading
distill.train(student, target, teacher=teacher, texts=texts, **json.loads(options))
"""


def train_in_two(
    tmp_path: Path,
    environment: dict[str, str],
    student: Path,
    target: Path,
    teacher: Path,
    chats: Path,
    options: dict[str, Any],
    dies_at: int = 0,
) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    words = [student, target, teacher, chats, json.dumps(options), dies_at]
    return launched([program, *words], tmp_path, environment=environment)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] if "loss" in line else line["held_out"]["kl"] for line in lines]


def assert_same_student(two: Path, one: Path) -> None:
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (two, one))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        # Adam turns the last bits of a tiny gradient into a step of the learning rate's size.
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    assert read_lineage(two)[-1]["kept_step"] == read_lineage(one)[-1]["kept_step"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fsdp2", {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}),
        ("fsdp2-offload", {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}),
        ("fsdp2-qlora", {"FSDP_VERSION": "2", "ACCELERATE_MIXED_PRECISION": "no"}),
        ("zero2", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        ("zero3", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
        ("ddp", {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        (
            "zero2-json",
            {"ACCELERATE_DEEPSPEED_DEEPSPEED_CONFIG_FILE": "examples/accelerate/zero2.json"},
        ),
        (
            "zero3-offload",
            {
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
                "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
            },
        ),
    ],
)
def test_our_configs_say_what_their_names_say(name: str, expected: dict[str, str]) -> None:
    found = environment_of(name)
    assert {key: found[key] for key in expected} == expected
    assert f"examples/accelerate/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()


def test_all_our_configs_are_tested() -> None:
    assert len(list(CONFIGS.glob("*.yaml"))) == 8
    zero2 = json.loads((CONFIGS / "zero2.json").read_text())
    assert zero2["zero_optimization"]["stage"] == 2
    assert zero2["bf16"]["enabled"]


def test_a_step_is_what_the_settings_say_whatever_deepspeeds_json_says() -> None:
    config = json.loads((CONFIGS / "zero2.json").read_text()) | {"gradient_clipping": 9.0}
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        num_processes=8,
        is_fsdp2=False,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config)),
    )
    processes._configure(accelerator, TrainSettings(micro_batch_size=2, max_gradient_norm=0.5), 3)
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.5


def test_a_config_that_accelerate_leaves_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.MULTI_CPU, num_processes=2, is_fsdp2=False
    )
    with pytest.raises(SettingsError, match=r"asks for FSDP and accelerate has chosen MULTI_CPU"):
        processes._configure(accelerator, TrainSettings(), 1)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"optimizer": "adamw_8bit"}, "FSDP", "adamw_8bit cannot be divided by FSDP"),
        ({"optimizer": "adamw_8bit"}, "DEEPSPEED", "adamw_8bit cannot be divided by DEEPSPEED"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    options: dict[str, Any], kind: str, words: str
) -> None:
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType(kind), num_processes=2, is_fsdp2=True
    )
    with pytest.raises(SettingsError, match=words):
        processes._configure(accelerator, TrainSettings(**options), 1)


def test_a_precision_that_the_caller_has_fixed_is_kept_and_no_other_begins(
    tmp_path: Path,
) -> None:
    with processes.precision_of_its_own():
        Accelerator(cpu=True)
        with (
            pytest.raises(SettingsError, match=r"fixed mixed_precision='no'.*would be in 'bf16'"),
            processes.accelerating(TrainSettings(precision="bfloat16"), tmp_path),
        ):
            pass
        with processes.accelerating(TrainSettings(precision="float32"), tmp_path):
            pass
        assert AcceleratorState().mixed_precision == "no"
    with processes.accelerating(TrainSettings(precision="bfloat16"), tmp_path) as accelerator:
        assert accelerator.mixed_precision == "bf16"


def test_a_device_map_in_several_processes_is_refused() -> None:
    settings = TrainSettings(teacher_device_map="auto")
    trained_folder._require_one_process(settings, 1)
    with pytest.raises(SettingsError, match=r"one process use all GPUs, and there are 2 processes"):
        trained_folder._require_one_process(settings, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
@pytest.mark.parametrize(
    "options", [{}, {"on_policy": 0.5, "lora_rank": 4, "gradient_checkpointing": True}]
)
def test_two_processes_of_deepspeed_train_as_one_does(
    tmp_path: Path, teacher: Path, model: Path, chats: Path, name: str, options: dict[str, Any]
) -> None:
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    options = {**RUN, **options}
    one = distill.train(model, tmp_path / "one", teacher=teacher, texts=chats, **options)
    two = tmp_path / "two"
    done = train_in_two(tmp_path, environment_of(name), model, two, teacher, chats, options)
    assert done.returncode == 0, done.stderr
    assert_same_student(two, one)
    assert read_lineage(two)[-1]["distributed"] == "DEEPSPEED"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "options", "tied"),
    [
        ({}, {}, False),
        ({}, {"on_policy": 0.5, "gradient_checkpointing": True, "lora_rank": 4}, False),
        ({}, {"divide_teacher": True}, True),
        (FSDP, {"cross_entropy": 0.2, "divide_teacher": True}, False),
        (FSDP, {"gradient_checkpointing": True}, True),
        (FSDP, {"on_policy": 0.5, "lora_rank": 4}, False),
    ],
    ids=["ddp", "ddp-everything", "ddp-divided", "fsdp", "fsdp-tied", "fsdp-adapters-on-policy"],
)
def test_two_processes_train_as_one_does(
    tmp_path: Path,
    teacher: Path,
    chats: Path,
    environment: dict[str, str],
    options: dict[str, Any],
    tied: bool,
) -> None:
    student = tiny_model(tmp_path / "student", seed=2, tie_word_embeddings=tied)
    options = {**RUN, **options}
    one = distill.train(student, tmp_path / "one", teacher=teacher, texts=chats, **options)
    two = tmp_path / "two"
    done = train_in_two(tmp_path, environment, student, two, teacher, chats, options)
    assert done.returncode == 0, done.stderr
    assert_same_student(two, one)
    held = re.findall(r"HELD (\d+) (\d+)", done.stdout)
    if options.get("divide_teacher"):
        assert len(held) == 2
        assert all(int(here) <= 0.51 * int(whole) for here, whole in held)
    facts = read_lineage(two)[-1]
    assert facts["processes"] == 2
    assert facts["distributed"] == ("FSDP" if environment else "MULTI_CPU")
    assert hidden_beside(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp"])
def test_two_killed_processes_resume(
    tmp_path: Path, teacher: Path, model: Path, chats: Path, environment: dict[str, str]
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = (teacher, chats, RUN)
    done = train_in_two(tmp_path, environment, model, whole, *arguments)
    assert done.returncode == 0, done.stderr
    killed = train_in_two(tmp_path, environment, model, resumed, *arguments, dies_at=4)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr or str(-signal.SIGKILL) in killed.stderr
    assert not resumed.exists()
    done = train_in_two(tmp_path, environment, model, resumed, *arguments)
    assert done.returncode == 0, done.stderr
    assert losses(resumed) == losses(whole)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
