"""The whole road through the command line: a tiny Mistral with the real Mistral v0.1 vocabulary."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mistill import ChatBot, open_model
from mistill.cli.app import main
from mistill.folders.lineage import read_lineage
from mistill.text.vocabulary import load_vocabulary

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def mistral_vocabulary() -> Path:
    """The tokenizer file of Mistral 7B v0.1, from the package that Mistral publishes."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or not found.submodule_search_locations:
        pytest.skip("mistral-common is not installed; make setup installs it")
    return Path(found.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-layer Mistral with random weights and 32,000 tokens, as it would be downloaded."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("road") / "mistral"
    config = MistralConfig(
        vocab_size=32_000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    model.save_pretrained(folder)
    shutil.copyfile(mistral_vocabulary(), folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "add_bos_token": True,
                "legacy": False,
            }
        )
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def mistill(command: str) -> None:
    assert main(command.split()) == 0, command


@pytest.fixture(scope="module")
def road(mistral: Path, chats: Path) -> Path:
    """The folder in which every step of the road has run, each by its command."""
    folder = mistral.parent
    at = {name: folder / name for name in ("teacher", "pruned", "trained", "small", "chatbot")}
    mistill(f"teacher {mistral} {at['teacher']}")
    # Healed, a model of random weights leaves training nothing to do.
    mistill(f"student {at['teacher']} {at['pruned']} --layers 3 --texts {chats} --no-heal")
    mistill(
        f"distill {at['pruned']} {at['trained']} --teacher {at['teacher']} --texts {chats} "
        "--tokens 4000 --block-length 128 --learning-rate 0.001 --evaluate-every 0"
    )
    mistill(f"quantize gptq {at['trained']} {at['small']} --texts {chats} --group-size 32")
    mistill(f"export {at['small']} {at['chatbot']}")
    return folder


def test_the_real_vocabulary_survives_the_road(road):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(road / "mistral/tokenizer.model"))
    vocabulary = load_vocabulary(road / "chatbot")
    assert vocabulary.size == theirs.vocab_size() == 32_000
    assert vocabulary.token_bytes(theirs.piece_to_id("\u2581wind")) == b" wind"
    text = "The mistral blows: caf\u00e9, \ud55c\uad6d\uc5b4, 1234 and \U0001f600."
    assert vocabulary.encode(text) == theirs.encode(text)
    assert vocabulary.end_ids == (2,)


def test_the_lineage_tells_the_whole_road(road):
    steps = [entry["step"] for entry in read_lineage(road / "chatbot")]
    assert steps == ["teacher", "student", "distill", "gptq", "export"]


def test_distillation_brought_the_student_closer(road):
    from benchmarks import compare

    held = road / "held-out.jsonl"
    if not held.exists():
        message = [
            {"role": "user", "content": "Which wind is cold and strong?"},
            {"role": "assistant", "content": "The mistral is a strong, cold wind."},
        ]
        held.write_text("".join(json.dumps({"messages": message}) + "\n" for _ in range(4)))
    report = compare(
        [road / "teacher", road / "pruned", road / "trained"],
        texts=held,
        rounds=1,
        new_tokens=8,
        prompt_tokens=16,
        transformers_generate=False,
    )
    assert report["trained"].mean_kl < report["pruned"].mean_kl


def test_the_chatbot_says_what_its_quantized_source_says(road):
    ids = np.array([load_vocabulary(road / "chatbot").encode("The mistral is a cold wind.")])
    theirs, ours = open_model(road / "small").logits(ids), open_model(road / "chatbot").logits(ids)
    assert np.abs(theirs - ours).mean() < 0.05 * theirs.std()


def test_the_chatbot_answers_through_python_and_through_a_pipe(road):
    bot = ChatBot(road / "chatbot", temperature=0, max_new_tokens=12)
    reply = "".join(bot.reply("What is a mistral?"))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mistill.cli.app", "chat", str(road / "chatbot")),
            *("--temperature", "0", "--max-new-tokens", "12"),
        ],
        input="What is a mistral?\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert reply.strip()
    assert reply.strip() in done.stdout


def test_inspect_tells_what_the_chatbot_is(road, capsys):
    capsys.readouterr()
    mistill(f"inspect {road / 'chatbot'} --json")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["info"]["form"] == "onnx"
    assert found["info"]["vocabulary_size"] == 32_000
    assert found["problems"] == []


def test_inspect_names_what_is_wrong_and_exits_with_1(road, tmp_path, capsys):
    broken = Path(shutil.copytree(road / "chatbot", tmp_path / "broken"))
    (broken / "model.onnx.data").unlink()
    assert main(["inspect", str(broken)]) == 1
    assert "model.onnx.data is missing" in capsys.readouterr().out


def test_bench_draws_a_report(road, chats, tmp_path, capsys):
    capsys.readouterr()
    mistill(
        f"bench {road / 'trained'} {road / 'chatbot'} --texts {chats} --scored-tokens 200 "
        f"--rounds 1 --new-tokens 8 --prompt-tokens 16 --out {tmp_path / 'report'} --json"
    )
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(report["models"]) == 2
    assert sorted(file.suffix for file in (tmp_path / "report").iterdir()) == [
        ".html",
        ".json",
        ".md",
        ".png",
        ".svg",
    ]
