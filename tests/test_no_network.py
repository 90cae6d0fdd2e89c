"""No command opens a connection unless it was told of an address, whatever libraries would like."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.tiny import tiny_model

# Every process of a command writes down what it tries, and is refused.
WATCH = """
import os, sys
def _watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        if event != "socket.connect" or not isinstance(arguments[1], (str, bytes)):
            with open(os.environ["TRIED_CONNECTIONS"], "a") as file:
                file.write(f"{event} {arguments[1:]!r} in {sys.argv[:6]}\\n")
            raise ConnectionRefusedError("this test allows no connection")
sys.addaudithook(_watch)
"""

COMMANDS = """
inspect model
teacher model copy
student teacher small --layers 2 --texts rows.jsonl --calibration-tokens 200
generate model prompts.txt talks.jsonl --max-new-tokens 2 --keep-unfinished
targets teacher targets --texts rows.jsonl --block-length 64 --draws 4
distill model trained --targets targets --texts rows.jsonl --tokens 128 --block-length 64
quantize rounding model rounded --group-size 32
quantize gptq model gptq --texts rows.jsonl --group-size 32 --block-length 64 --samples 2
quantize nf4 model nf4
quantize tune rounded tuned --teacher teacher --texts rows.jsonl --block-length 64
quantize dequantize rounded floats
quantize rotate model rotated
export model chatbot
gguf model model.gguf
teacher model.gguf from-gguf
inspect chatbot
chat chatbot --max-new-tokens 2
run recipe.toml --out road
bench model chatbot --texts rows.jsonl --rounds 1 --scored-tokens 60 --context-length 64 \
--prompt-tokens 8 --new-tokens 4 --out report
"""


def test_no_command_opens_a_connection_that_it_was_not_told_of(tmp_path: Path, chats: Path):
    tiny_model(tmp_path / "model", seed=2)
    tiny_model(tmp_path / "teacher", num_hidden_layers=3, seed=1)
    (tmp_path / "rows.jsonl").write_text(chats.read_text("utf-8"), "utf-8")
    (tmp_path / "prompts.txt").write_text("Hi?\nHo?\n")
    (tmp_path / "recipe.toml").write_text('[a]\nstep = "teacher"\nsource = "model"\n')
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WATCH)
    program = textwrap.dedent("""
        import io, sys
        from mistill.cli.app import main
        for line in sys.argv[1].splitlines():
            if line:
                sys.stdin = io.StringIO("hi\\n")
                code = main(line.split())
                assert code == 0, (line, code)
    """)
    root = str(Path(__file__).parent.parent)
    environment = {
        name: value
        for name, value in os.environ.items()
        # Of these the libraries are told nothing, as a user's would be.
        if name not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "ORT_DISABLE_TELEMETRY")
    } | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), root]),
        "TRIED_CONNECTIONS": str(tmp_path / "tried"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "hub"),
    }
    ran = subprocess.run(
        [sys.executable, "-c", program, COMMANDS.replace("\\\n", " ")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    tried = (tmp_path / "tried").read_text() if (tmp_path / "tried").exists() else ""
    assert tried == ""
    assert ran.returncode == 0, ran.stderr[-3000:]
