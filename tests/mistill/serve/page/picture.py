"""The picture of the page in the documentation: a real chatbot's answers, at temperature 0.

python -m tests.mistill.serve.page.picture CHATBOT docs/chat-page.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.benchmarks.report.chromium import find_chromium
from tests.mistill.serve.page.chat_page import ChatPage
from tests.mistill.serve.running import running

BEFORE = ("How do I print a greeting in Python?", "What is the capital of France?")
QUESTIONS = (
    "Name three things to see in Paris, one line each.",
    "Tell me more about the Louvre Museum in two sentences.",
)
SIZE = {"width": 1120, "height": 772}
COLOURS = 64


def take(folder: Path, target: Path) -> None:
    """Serve a chatbot, talk to it through the page, and write what is then seen.

    Args:
        folder: The ONNX folder of a chatbot.
        target: The PNG file to write.
    """
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with running(folder, model_name="chatbot") as server, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        address = f"http://127.0.0.1:{server.port}/"
        chat = ChatPage.opened(browser, address, "", True, {"viewport": SIZE})
        chat.page.set_default_timeout(120_000)
        chat.page.click("#open-settings")
        chat.page.fill("#set-temperature", "0")
        chat.page.fill("#set-max_tokens", "160")
        chat.page.keyboard.press("Escape")
        for question in BEFORE:
            chat.ask(question)
            chat.page.click("#new-chat")
        for question in QUESTIONS:
            chat.ask(question)
        chat.page.mouse.move(0, 0)
        chat.page.wait_for_timeout(500)
        chat.page.screenshot(path=target)
        chat.check()
        browser.close()
    with Image.open(target) as picture:
        picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(
            target, optimize=True
        )


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
