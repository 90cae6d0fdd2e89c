"""Packages that look like OpenVINO, OpenVINO GenAI and optimum-intel: 3 follows 2, and 4 follows 3.

``install`` writes an environment of them: a Python that finds no other rival.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

_OPENVINO = """
import sys
import numpy as np

__version__ = "1.2.3-4-fake"
assert "torch" not in sys.modules, "our libraries leaked into a rival's process"

class Type:
    def __init__(self, name):
        self.name = name
    def to_string(self):
        return self.name

class Tensor:
    def __init__(self, data):
        self.data = data

class Port:
    def get_names(self):
        return {"input_ids"}

class Request:
    fresh = False
    def reset_state(self):
        self.fresh = True
    def infer(self, given):
        assert self.fresh and set(given) == {"input_ids"}, given
        self.fresh = False
        self.ids = given["input_ids"]
    def get_tensor(self, name):
        assert name == "logits"
        return Tensor(np.eye(SIZE, dtype=np.float32)[(self.ids + 1) % SIZE])

class Graph:
    inputs = (Port(),)
    def create_infer_request(self):
        return Request()

class Core:
    def get_property(self, device, name):
        return Type({"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "u8"}[name])
    def compile_model(self, file, device, properties):
        global SIZE
        SIZE = int(open(file).read())
        check(properties)
        return Graph()

def check(properties):
    exact = {"INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "KV_CACHE_PRECISION"}
    assert properties.pop("INFERENCE_NUM_THREADS") == 1 and set(properties) in (exact, set())
    properties["INFERENCE_NUM_THREADS"] = 1
"""

_GENAI = """
import pathlib
import openvino

__version__ = "1.2.3.0-5-fake"

class SchedulerConfig:
    pass

class GenerationConfig:
    def set_eos_token_id(self, token):
        self.eos = token

class LLMPipeline:
    def __init__(self, file, device, enable_save_ov_model=False):
        content = pathlib.Path(file).read_bytes()
        assert content[:4] == b"GGUF" and device == "CPU" and enable_save_ov_model
        if b"sullen" in content:
            raise SystemExit("this architecture is not known")
        folder = pathlib.Path(file).parent
        (folder / "openvino_model.xml").write_text("384")
        (folder / "openvino_model.bin").write_bytes(bytes(500))
        (folder / "openvino_tokenizer.bin").write_bytes(bytes(70))

class Written:
    def __init__(self, token):
        self.generated_ids = [token]

class Handle:
    def __init__(self, ids, settings, size):
        self.token, self.left = int(ids[0, -1]), settings.max_new_tokens
        self.unread, self.size = [], size
        assert settings.ignore_eos and not settings.do_sample and settings.eos >= 0
    def step(self):
        self.token = (self.token + 1) % self.size
        self.unread.append(self.token)
        self.left -= 1
    def can_read(self):
        return bool(self.unread)
    def read(self):
        return {0: Written(self.unread.pop(0))}
    def cancel(self):
        self.left = 0

class ContinuousBatchingPipeline:
    def __init__(self, folder, scheduler, device, properties):
        self.size = int((pathlib.Path(folder) / "openvino_model.xml").read_text())
        openvino.check(properties)
        assert not scheduler.enable_prefix_caching and device == "CPU"
        self.handles, self.numbers = [], []
    def add_request(self, number, tensor, settings):
        assert not self.has_non_finished_requests(), "what was broken off goes on"
        assert number not in self.numbers
        self.numbers.append(number)
        self.handles = [Handle(tensor.data, settings, self.size)]
        return self.handles[0]
    def has_non_finished_requests(self):
        return any(handle.left for handle in self.handles)
    def step(self):
        for handle in self.handles:
            if handle.left:
                handle.step()
"""

_EXPORTER = """
import json, sys
from pathlib import Path

words = sys.argv[1:]
assert words[:2] == ["export", "openvino"]
source, target = Path(words[words.index("-m") + 1]), Path(words[-1])
if "--sullen" in words:
    raise SystemExit("the exporter knows no option --sullen")
config = json.loads((source / "config.json").read_text())
target.mkdir(exist_ok=True)
(target / "openvino_model.xml").write_text(str(config["vocab_size"]))
(target / "openvino_model.bin").write_bytes(bytes(1000))
(target / "words.json").write_text(json.dumps([words, config]))
"""


def install(folder: Path, *, exporter: bool = True) -> Path:
    """Make an environment: ``bin/python`` in it finds the packages."""
    packages = folder / "packages"
    packages.mkdir(parents=True)
    (packages / "openvino.py").write_text(textwrap.dedent(_OPENVINO))
    (packages / "openvino_genai.py").write_text(textwrap.dedent(_GENAI))
    if exporter:
        for package in ("optimum", "optimum/intel", "optimum/commands"):
            (packages / package).mkdir()
            (packages / package / "__init__.py").touch()
        (packages / "optimum" / "commands" / "optimum_cli.py").write_text(_EXPORTER)
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return folder
