"""The server as ASGI knows one: guards, routes, errors, one line of log for each request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from mistill.errors import MistillError
from mistill.serve import model_routes
from mistill.serve.chat import chat
from mistill.serve.completions import complete
from mistill.serve.generation import Served
from mistill.serve.http.exchange import ClientGoneError, Exchange, Receive, Scope, Send
from mistill.serve.http.guard import Guard
from mistill.serve.http.keys import Keys
from mistill.serve.http.page_files import PageFile, page_files
from mistill.serve.refusals import RefusalError, own_fault, unavailable
from mistill.serve.streaming import log_bug, refusal_of

Handler = Callable[[Served, Exchange], Awaitable[None]]
_log = logging.getLogger("mistill.serve")


class App:
    """The server.

    Attributes:
        routes: Handlers by method and path; a path that ends with a slash stands for all names
            below it.
        stopping: Whether it takes no more requests that need the engine.
    """

    routes: dict[tuple[str, str], Handler]
    stopping: bool

    def __init__(self, served: Served, keys: Keys) -> None:
        """Put it together.

        Args:
            served: The model.
            keys: API keys.
        """
        self.stopping = False
        self.served = served
        self._guard = Guard(served.settings, keys, served.limits)
        self._page: dict[str, PageFile] = page_files() if served.settings.page else {}
        self.routes = {
            ("POST", "/v1/chat/completions"): chat,
            ("POST", "/v1/completions"): complete,
            ("POST", "/tokenize"): model_routes.tokenize,
            ("POST", "/detokenize"): model_routes.detokenize,
            ("GET", "/tokenizer_info"): model_routes.tokenizer_info,
            ("GET", "/v1/models"): model_routes.models,
            ("GET", "/v1/models/"): model_routes.model,
            ("GET", "/health"): model_routes.health,
        }
        if served.settings.metrics:
            self.routes["GET", "/metrics"] = model_routes.metrics
        if self._page:
            self.routes["GET", "/"] = self._page_file
            self.routes["GET", "/static/"] = self._page_file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Args:
            scope: ASGI's.
            receive: ASGI's.
            send: ASGI's.
        """
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send, self.served.limits)
        try:
            await self._answer(exchange)
        except ClientGoneError:
            exchange.facts["ending"] = "client left"
        except asyncio.CancelledError:
            exchange.facts["ending"] = "cut off"
            raise
        finally:
            self.served.counts.answered(exchange.status)
            _log_line(exchange)

    async def _answer(self, exchange: Exchange) -> None:
        try:
            self._guard.check(exchange)
            if exchange.method == "OPTIONS":
                await exchange.answer(204, b"", "text/plain", self._guard.preflight(exchange))
                return
            handler = self._route(exchange)
            if self.stopping and exchange.method == "POST":
                raise unavailable("the server is stopping")
            await handler(self.served, exchange)
        except RefusalError as refusal:
            await self._refuse(exchange, refusal)
        except MistillError as error:
            retry = self.served.counts.retry_seconds
            await self._refuse(exchange, refusal_of(error, retry_seconds=retry))
        except (ClientGoneError, asyncio.CancelledError):
            raise
        except Exception as error:
            log_bug(error)
            await self._refuse(exchange, own_fault())

    async def _refuse(self, exchange: Exchange, refusal: RefusalError) -> None:
        if exchange.status:  # too late: a stream that breaks off here has no end, and is none
            return
        if refusal.param is not None:
            exchange.facts["param"] = refusal.param
        if refusal.status != 413:
            await exchange.discard_body()
        if not exchange.body_read:
            refusal.headers["Connection"] = "close"
        await exchange.refuse(refusal)

    def _route(self, exchange: Exchange) -> Handler:
        path = exchange.path
        methods = {method for method, known in self.routes if known == path}
        if not methods:
            folder, _, name = path.rpartition("/")
            path = f"{folder}/" if name else path + "/"
            methods = {method for method, known in self.routes if known == path and path != "/"}
        if not methods:
            raise RefusalError(404, "there is no such address on this server", code="not_found")
        exchange.route = path
        method = "GET" if exchange.method == "HEAD" else exchange.method
        if method not in methods:
            allowed = ", ".join(sorted(methods))
            raise RefusalError(405, f"the method should be {allowed}", headers={"Allow": allowed})
        return self.routes[method, path]

    async def _page_file(self, served: Served, exchange: Exchange) -> None:
        file = self._page.get(exchange.path)
        if file is None:
            raise RefusalError(404, "there is no such file on this server", code="not_found")
        await exchange.answer(200, file.content, file.content_type, {"Cache-Control": "no-cache"})


def _log_line(exchange: Exchange) -> None:
    """One line for a request: numbers and words of our own, nothing that a client wrote."""
    seconds = time.monotonic() - exchange.began
    facts = "".join(f" {name}={value}" for name, value in exchange.facts.items() if name != "param")
    method = exchange.method if exchange.method in ("GET", "POST", "HEAD", "OPTIONS") else "-"
    # A log that cannot be written, on a full disk or to a closed pipe, stops no answer.
    with contextlib.suppress(Exception):
        _log.info(
            "%s %s %s %d %.3fs%s",
            exchange.request_id,
            method,
            exchange.route,
            exchange.status,
            seconds,
            facts,
        )
