"""A laptop that only chats: no PyTorch, no transformers, nothing sent anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

import export
from mistill.chat.bot import ChatBot

ROOT = Path(__file__).parents[2]
HEAVY = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "gguf",
    "matplotlib",
    "onnx_ir",
    "scipy",
    "torch",
    "transformers",
)
QUESTION = "What is the weather like today?"
FORBID = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

HEAVY = set(sys.argv.pop().split())
sys.meta_path.insert(0, Forbidden())
"""


@pytest.fixture(scope="module")
def chatbot(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.to_onnx(model, tmp_path_factory.mktemp("onnx") / "chatbot", parity_positions=0)


@pytest.fixture(scope="module")
def answer(chatbot: Path) -> str:
    """What the chatbot answers here, where PyTorch is installed."""
    return "".join(ChatBot(chatbot, temperature=0, max_new_tokens=9, threads=1).reply(QUESTION))


def run(
    command: Sequence[str | Path], home: Path, typed: str = "", ours: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command as someone whose home is empty; with our source tree on the path, or not."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "ORT_", "HF_", "XDG_"))
    }
    environment |= {"HOME": str(home)}
    if ours:
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        command, input=typed, env=environment, cwd=home, capture_output=True, text=True
    )


def without_heavy(code: str, *arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-c", FORBID + code, *arguments, " ".join(HEAVY)]


def test_importing_mistill_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, mistill; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mistill" in done.stdout.split()
    assert not {*HEAVY, "onnxruntime", "safetensors", "tokenizers", "numpy"} & set(
        done.stdout.split()
    )


def test_a_chatbot_answers_where_nothing_heavy_can_be_imported(
    chatbot: Path, answer: str, tmp_path: Path
) -> None:
    code = """
from mistill import ChatBot
bot = ChatBot(sys.argv[1], temperature=0, max_new_tokens=9, threads=1)
print("".join(bot.reply(sys.argv[2])), end="")
"""
    done = run(without_heavy(code, chatbot, QUESTION), tmp_path)
    assert done.stdout == answer, done.stderr
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == [], "something was left in the home"


def test_the_command_chats_where_nothing_heavy_can_be_imported(
    chatbot: Path, answer: str, tmp_path: Path
) -> None:
    code = "from mistill.cli.app import main; sys.exit(main())"
    options = ("--temperature", "0", "--max-new-tokens", "9", "--threads", "1")
    done = run(without_heavy(code, "chat", chatbot, *options), tmp_path, f"{QUESTION}\n")
    assert done.stdout == f"{answer}\n", done.stderr
    assert list(tmp_path.iterdir()) == [], "something was left in the home"


def test_a_folder_that_needs_pytorch_is_refused_with_what_to_install(
    model: Path, tmp_path: Path
) -> None:
    code = "from mistill.cli.app import main; sys.exit(main())"
    done = run(without_heavy(code, "chat", model), tmp_path, "Hello\n")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "pip install 'mistill[compress]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.network
def test_the_wheel_alone_chats_in_a_clean_environment(
    chatbot: Path, model: Path, answer: str, tmp_path: Path
) -> None:
    wheels, home, clean = (tmp_path / name for name in ("wheels", "home", "clean"))
    home.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, ROOT],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("mistill-*.whl")
    venv.create(clean, with_pip=False, symlinks=True)
    install: list[str | Path] = [*pip, "--python", clean, "install", "--no-compile"]
    install += ["--constraint", ROOT / "constraints.txt"]
    probe = subprocess.run(
        [*install, "--dry-run", "--ignore-installed", "--no-deps", "jinja2"],
        capture_output=True,
        text=True,
    )
    if probe.returncode != 0:
        pytest.skip(f"pip reaches no package index: {probe.stderr.strip().splitlines()[-1]}")
    subprocess.run([*install, wheel], check=True)

    python, command = clean / "bin" / "python", clean / "bin" / "mistill"
    code = "import sys, importlib.util as u; print(*filter(u.find_spec, sys.argv[1:]))"
    listed = run([python, "-c", code, *HEAVY, "onnxruntime"], home, ours=False)
    assert listed.stdout.split() == ["onnxruntime"], listed.stderr
    imported = run(
        [python, "-c", "import sys, mistill; mistill.ChatBot; print(mistill.__file__)"],
        home,
        ours=False,
    )
    assert imported.stdout.startswith(str(clean)), imported.stderr
    options = ["--temperature", "0", "--max-new-tokens", "9", "--threads", "1"]
    chatted = run([command, "chat", chatbot, *options], home, f"{QUESTION}\n", ours=False)
    assert chatted.stdout == f"{answer}\n", chatted.stderr
    refused = run([command, "chat", model], home, "Hello\n", ours=False)
    assert refused.returncode == 2
    assert "mistill[compress]" in refused.stderr
    assert list(home.iterdir()) == [], "something was left in the home"
