"""Two processes tune a model as one does, and divide no four-bit weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
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


def accelerator(kind: str, stage: int = 0) -> Any:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}})
    return SimpleNamespace(
        distributed_type=DistributedType(kind), state=SimpleNamespace(deepspeed_plugin=plugin)
    )


def test_four_bit_weights_are_divided_by_neither_zero3_nor_fsdp() -> None:
    four_bits = SupervisedSettings(base="nf4")
    with pytest.raises(SettingsError, match=r"ZeRO-3 divides weights before .* use ZeRO-2"):
        require_divisible(four_bits, accelerator("DEEPSPEED", 3))
    with pytest.raises(SettingsError, match="FSDP divides weights of one type only"):
        require_divisible(four_bits, accelerator("FSDP"))
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
