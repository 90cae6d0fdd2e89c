"""From a large model to a chatbot for a laptop, in Python.

    python examples/laptop_chatbot.py TEACHER TEXTS OUT

TEACHER is a Hub id, a model folder, a GGUF file or @smollm2; TEXTS are conversations, such as
chats.jsonl or @demo-train; OUT is a folder for what is made.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import distill
import export
import mistill
import quantize


def make_chatbot(teacher: str, texts: str, out: Path, layers: int, tokens: int) -> Path:
    """Distil, quantize and export; every step reads a folder and makes one."""
    source = mistill.save_model(teacher, out / "teacher")
    student = distill.new_student(source, out / "student", texts=texts, layers=layers)
    trained = distill.train(student, out / "trained", teacher=source, texts=texts, tokens=tokens)
    small = quantize.to_gptq(trained, out / "small", texts=texts, bits=4, group_size=32)
    return export.to_onnx(small, out / "chatbot")


def main() -> None:
    """Make the chatbot and ask it something."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("texts")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--tokens", type=int, default=40_000)
    arguments = parser.parse_args()
    chatbot = make_chatbot(
        arguments.teacher, arguments.texts, arguments.out, arguments.layers, arguments.tokens
    )
    bot = mistill.ChatBot(chatbot, max_new_tokens=60)
    for piece in bot.reply("What is a mistral?"):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
