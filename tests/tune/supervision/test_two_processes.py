"""Two processes tune a model as one does, and divide no four-bit weights."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import tune
from mistill.errors import SettingsError
from mistill.folders.lineage import read_lineage
from tests.launching import launched
from tests.mistill.training.test_processes import environment_of
from tests.tune.supervision.test_tuned_folder import QUICK, hidden_beside, report_of
from tune.settings import SupervisedSettings
from tune.supervision.tuned_folder import _compute_dtype, require_divisible
from tune.trainers.placing import place_for

PROGRAM = """
import json, sys
import torch
torch.set_num_threads(1)
import tune
model, target, texts, options = sys.argv[1:]
tune.supervised(model, target, texts=texts, **json.loads(options))
"""


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss") or line["held_out"]["cross_entropy"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"base": "nf4", "neftune": 5.0},
        {"lora_rank": 0, "learning_rate": 1e-3},
        {"lora_start": "pissa", "learning_rate": 1e-3, "gradient_checkpointing": True},
    ],
    ids=["qlora-neftune", "whole", "pissa"],
)
def test_two_processes_tune_as_one_does(
    tmp_path: Path, model: Path, chats: Path, options: dict[str, Any]
) -> None:
    options = {**QUICK, **options}
    one = tune.supervised(model, tmp_path / "one", texts=chats, **options)
    two = tmp_path / "two"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    words = [program, model, two, chats, json.dumps(options)]
    done = launched(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert report_of(two)["after"]["cross_entropy"] == pytest.approx(
        report_of(one)["after"]["cross_entropy"], rel=1e-5
    )
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (two, one))
    for name, tensor in ours.items():
        # Adam turns the last bits of a tiny gradient into a step of the learning rate's size.
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    assert read_lineage(two)[-1]["processes"] == 2
    assert hidden_beside(tmp_path) == []


FSDP_PROGRAM = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from accelerate import PartialState
from accelerate.utils import DistributedType
import tune
from tune.supervision import trainer
# accelerate divides weights among GPUs only; what it would do there works on CPUs too
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
model, target, texts, options, dies_at = sys.argv[1:]
original, count = trainer.accumulate_gradients, 0
def dying(module, *words):
    global count
    count += 1
    if count == int(dies_at):
        os.kill(os.getpid(), signal.SIGKILL)
    if count == 1:
        codes = [one for name, one in module.named_parameters() if "base_layer.weight" in name]
        here, whole = (sum(map(torch.Tensor.numel, some)) for some in (
            [one.to_local() for one in codes], codes))
        os.write(1, f"HELD {here} {whole} {codes[0].dtype}\\n".encode())
    return original(module, *words)
trainer.accumulate_gradients = dying
tune.supervised(model, target, texts=texts, **json.loads(options))
"""


@pytest.mark.slow
def test_fsdp2_divides_four_bit_weights_and_learns_as_one_process_does(
    tmp_path: Path, model: Path, chats: Path
) -> None:
    options = {**QUICK, "base": "nf4", "precision": "float32"}
    one = tune.supervised(model, tmp_path / "one", texts=chats, **options)
    program = tmp_path / "program.py"
    program.write_text(FSDP_PROGRAM)

    def divided(target: Path, dies_at: int) -> subprocess.CompletedProcess[str]:
        words = [program, model, target, chats, json.dumps(options), dies_at]
        return launched(words, tmp_path, environment=environment_of("fsdp2-qlora"))

    two, resumed = tmp_path / "two", tmp_path / "resumed"
    done = divided(two, 0)
    assert done.returncode == 0, done.stderr
    held = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("HELD")]
    assert len(held) == 2
    for here, whole, dtype in held:
        assert int(here) * 2 == int(whole)
        assert dtype == "torch.float32"
    assert read_lineage(two)[-1]["distributed"] == "FSDP"
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (two, one))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    assert divided(resumed, 4).returncode != 0
    assert not resumed.exists()
    again = divided(resumed, 0)
    assert again.returncode == 0, again.stderr
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (resumed / name).read_bytes() == (two / name).read_bytes(), name
    assert hidden_beside(tmp_path) == []


def accelerator(kind: str, stage: int = 0) -> Any:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}})
    return SimpleNamespace(
        distributed_type=DistributedType(kind), state=SimpleNamespace(deepspeed_plugin=plugin)
    )


def test_four_bit_weights_are_neither_divided_by_zero3_nor_cast_by_fsdp() -> None:
    four_bits = SupervisedSettings(base="nf4")
    with pytest.raises(SettingsError, match=r"ZeRO-3 divides weights before .* use ZeRO-2"):
        require_divisible(four_bits, accelerator("DEEPSPEED", 3))
    fsdp = accelerator("FSDP")
    fsdp.mixed_precision = "bf16"
    with pytest.raises(SettingsError, match=r"FSDP would cast .* codes too; set precision"):
        require_divisible(four_bits, fsdp)
    fsdp.mixed_precision = "no"
    require_divisible(four_bits, fsdp)
    require_divisible(four_bits, accelerator("DEEPSPEED", 2))
    require_divisible(four_bits, accelerator("MULTI_GPU"))
    require_divisible(SupervisedSettings(), accelerator("DEEPSPEED", 3))


def test_frozen_weights_have_the_type_of_the_adapters_where_fsdp_divides_both() -> None:
    for kind, dtype in (("FSDP", torch.float32), ("MULTI_GPU", torch.bfloat16)):
        one = accelerator(kind)
        one.mixed_precision = "bf16"
        assert _compute_dtype(one) == dtype
        one.mixed_precision = "no"
        assert _compute_dtype(one) == torch.float32


def test_a_model_that_does_not_fit_the_gpu_is_looked_at_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 * 2**30, 16 * 2**30))
    gpu = torch.device("cuda:0")
    assert place_for(14 * 2**30, gpu) == gpu
    assert place_for(14 * 2**30 + 1, gpu) == torch.device("cpu")
    assert place_for(10**12, torch.device("cpu")) == torch.device("cpu")
