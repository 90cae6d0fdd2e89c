"""The page as a reader uses it, and what must hold whatever the reader does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

DONE = ".message.last:not(.writing) [data-do=regenerate]"
WRITING = ".message.last.writing"


@dataclass
class ChatPage:
    """One tab with the page in it.

    Attributes:
        page: The tab.
        address: Address of the server.
        requests: Addresses of everything that the page asked for.
        faults: Errors of the page's programs, and what broke the content security policy.
    """

    page: Page
    address: str
    requests: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @classmethod
    def opened(
        cls, browser: Browser, address: str, fragment: str, ready: bool, options: dict[str, Any]
    ) -> ChatPage:
        """Open the page in an empty profile; ready waits until it has found the model."""
        script = options.pop("init", None)
        settings = {"viewport": {"width": 1280, "height": 900}, "locale": "en-GB", **options}
        context = browser.new_context(**settings)
        context.set_default_timeout(20_000)
        if script:
            context.add_init_script(script)
        page = cls(context.new_page(), address)
        page.watch(page.page)
        page.page.goto(address + fragment)
        if ready:
            page.wait("#model[data-state=ready]")
        return page

    def watch(self, tab: Page) -> None:
        """Take note of what a tab asks for, and of what goes wrong in it."""
        tab.on("request", lambda request: self.requests.append(request.url))
        tab.on("pageerror", lambda error: self.faults.append(str(error)))
        tab.on("dialog", lambda dialog: self.faults.append(f"dialog: {dialog.message}"))

        def said(message: Any) -> None:
            # That an answer was an error is no fault of the page.
            if message.type == "error" and "Failed to load resource" not in message.text:
                self.faults.append(message.text)

        tab.on("console", said)

    def check(self) -> None:
        assert self.faults == []
        inside = (self.address, f"blob:{self.address}", "data:")
        assert not [url for url in self.requests if not url.startswith(inside)]

    # What a reader does.

    def wait(self, selector: str) -> Locator:
        element = self.page.locator(selector).first
        element.wait_for()
        return element

    def gone(self, selector: str) -> None:
        self.page.locator(selector).first.wait_for(state="hidden")

    def until_last(self, text: str) -> None:
        """Wait until the last message holds a text, also while it is written."""
        self.until(
            "(text) => document.querySelector('.message.last .text')?.textContent.includes(text)",
            text,
        )

    def until(self, expression: str, value: Any = None) -> None:
        self.page.wait_for_function(expression, arg=value)

    def say(self, text: str) -> None:
        """Send a message, and wait until its answer begins."""
        before = self.page.locator(".message").count()
        self.page.fill("#message", text)
        self.page.press("#message", "Control+Enter")
        self.until("(before) => document.querySelectorAll('.message').length > before", before)

    def ask(self, text: str) -> str:
        """Send a message, and wait for the whole answer."""
        self.say(text)
        return self.answer()

    def answer(self) -> str:
        """The whole last answer, as it is shown."""
        self.wait(DONE)
        return self.page.locator(".message.last .text").inner_text()

    def turn_to(self, title: str) -> None:
        """Open a conversation of the list."""
        self.page.locator("#chats .open", has_text=title).first.click()
        self.until("(title) => document.title.startsWith(title)", title)

    def do(self, name: str, message: int = -1) -> None:
        """Press a button of a message; it is shown while the pointer is over the message."""
        row = self.page.locator(".message").nth(message)
        row.hover()
        row.locator(f"[data-do={name}]").first.click()

    @property
    def texts(self) -> list[str]:
        # Text that is out of sight has no innerText: it is not laid out.
        return [text.strip() for text in self.page.locator(".message .text").all_text_contents()]

    def lists(self, titles: list[str]) -> None:
        """Wait until the list of conversations is this one."""
        self.until(
            "(titles) => JSON.stringify([...document.querySelectorAll('#chats .name')]"
            ".map((name) => name.textContent)) === JSON.stringify(titles)",
            titles,
        )

    @property
    def toast(self) -> str:
        return self.wait("#toast").locator("#toast-text").inner_text()

    def run(self, code: str, value: Any = None) -> Any:
        return self.page.evaluate(code, value)
