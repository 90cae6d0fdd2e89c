"""A package that looks like onnxruntime-genai: its model says that 3 follows 2, and 4 follows 3.

``install`` writes an environment of it: a Python that finds no other rival.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

_PACKAGE = """
import json, os, sys, time
from pathlib import Path
import numpy as np

__version__ = "0.0-fake"
assert "torch" not in sys.modules, "our libraries leaked into a rival's process"

class Config:
    def __init__(self, folder):
        self.folder, self.overlays = folder, []
    def overlay(self, text):
        self.overlays.append(json.loads(text))

class Model:
    def __init__(self, config):
        described = json.loads((Path(config.folder) / "genai_config.json").read_text())["model"]
        self.size, self.pruned = described["vocab_size"], described["pruned"]
        threads = config.overlays[0]["model"]["decoder"]["session_options"]
        assert threads == {"intra_op_num_threads": 1}, threads

class GeneratorParams:
    def __init__(self, model):
        self.options = {}
    def set_search_options(self, **options):
        self.options = options

class Generator:
    def __init__(self, model, params):
        self.model, self.room, self.ids = model, params.options["max_length"], []
        assert params.options["min_length"] == self.room and not params.options["do_sample"]
    def append_tokens(self, tokens):
        self.ids += [int(token) for token in tokens]
        assert len(self.ids) <= self.room, "more tokens than there is room for"
        self.read = len(tokens)
    def _scores(self, ids):
        return np.eye(self.model.size, dtype=np.float32)[(np.array(ids) + 1) % self.model.size]
    def get_output(self, name):
        assert name == "logits"
        return self._scores(self.ids[-1:] if self.model.pruned else self.ids[-self.read :])[None]
    def get_logits(self):
        return self._scores(self.ids[-1:])[None]
    def generate_next_token(self):
        assert len(self.ids) < self.room, "asked to write without room"
        self.ids.append((self.ids[-1] + 1) % self.model.size)
        self.read = 1
    def get_next_tokens(self):
        return np.array([self.ids[-1]])
"""

_BUILDER = """
import json, sys
from pathlib import Path

words = sys.argv[1:]
source, target = (Path(words[words.index(flag) + 1]) for flag in ("-i", "-o"))
config = json.loads((source / "config.json").read_text())
if "fail" in " ".join(words):
    raise SystemExit("the builder knows no option fail")
described = {"vocab_size": config["vocab_size"], "context_length": 512, "words": words,
             "pruned": "prune_lm_head=true" in words}
(target / "genai_config.json").write_text(json.dumps({"model": described}))
(target / "model.onnx").write_bytes(bytes(10))
(target / "model.onnx.data").write_bytes(bytes(1000))
"""


def install(folder: Path) -> Path:
    """Make an environment: ``bin/python`` in it finds the package."""
    package = folder / "packages" / "onnxruntime_genai"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(_PACKAGE))
    (package / "models" / "builder.py").write_text(textwrap.dedent(_BUILDER))
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{package.parent}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return folder
