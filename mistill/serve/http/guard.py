"""Who may ask: names of the server, origins of pages, API keys.

A page that somebody opens in a browser can send requests to 127.0.0.1, under a name that its owner
lets point there. So the Host header must be a name of this server, a page of another origin is
refused unless it was named, and bodies must be JSON, which no page sends without asking first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mistill.serve.http.exchange import Exchange
from mistill.serve.http.keys import Keys
from mistill.serve.refusals import RefusalError
from mistill.serve.settings import HOST_NAME, Limits, ServeSettings

_HOST = re.compile(rf"({HOST_NAME.pattern})(:[0-9]{{1,5}})?")
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_HEADER_NAME = re.compile(r"[a-z0-9-]{1,64}")
OPEN_PATHS = ("/", "/health")
OPEN_FOLDER = "/static/"


class Guard:
    """Refuses requests before anything is done for them."""

    def __init__(self, settings: ServeSettings, keys: Keys, limits: Limits) -> None:
        """Note who may ask.

        Args:
            settings: Names and origins.
            keys: API keys.
            limits: Bounds on headers.
        """
        names = {*_LOCAL, *(name.lower() for name in settings.allow_host)}
        host = settings.host.lower()
        if not settings.is_local and host not in ("0.0.0.0", "::"):
            names.add(f"[{host}]" if ":" in host else host)
        self._names = names
        self._origins = {origin.lower() for origin in settings.allow_origin}
        self._keys = keys
        self._limits = limits

    def check(self, exchange: Exchange) -> None:
        """Refuse a request that should not be answered.

        Args:
            exchange: The request; its owner and the headers of its answer are noted in it.

        Raises:
            RefusalError: If it comes under another name, from a foreign page, without a key, or
                with too much before its body.
        """
        self._check_form(exchange)
        host = self._check_host(exchange)
        named = self._check_origin(exchange, host)
        if not named:
            self._check_site(exchange)
        if exchange.method == "OPTIONS":
            return  # a browser asks ahead, and brings no key then
        self._check_key(exchange)
        if exchange.method == "POST":
            _check_type(exchange)

    def preflight(self, exchange: Exchange) -> Mapping[str, str]:
        """What a browser is told that asks ahead.

        Args:
            exchange: A request with the method OPTIONS that ``check`` let pass.

        Returns:
            Headers of the answer.

        Raises:
            RefusalError: If it does not come from an origin that was named.
        """
        if "Access-Control-Allow-Origin" not in exchange.more_headers:
            raise RefusalError(405, "the method OPTIONS is for pages of origins that were named")
        asked = exchange.header(b"access-control-request-headers") or b""
        names = [name.strip().lower() for name in asked.decode("latin-1").split(",")]
        return {
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": ", ".join(
                name for name in names if _HEADER_NAME.fullmatch(name)
            ),
            "Access-Control-Max-Age": "600",
        }

    def _check_form(self, exchange: Exchange) -> None:
        closing = {"Connection": "close"}
        if not exchange.path.startswith("/"):
            raise RefusalError(400, "the address should be a path", headers=closing)
        if exchange.target_bytes > self._limits.target_bytes:
            raise RefusalError(
                414, f"the address has more than {self._limits.target_bytes} bytes", headers=closing
            )
        if exchange.header_count > self._limits.headers:
            raise RefusalError(
                431, f"there are more than {self._limits.headers} headers", headers=closing
            )
        if b"transfer-encoding" in exchange.headers and b"content-length" in exchange.headers:
            raise RefusalError(
                400, "give either content-length or transfer-encoding", headers=closing
            )
        if b"upgrade" in exchange.headers or exchange.version not in ("1.0", "1.1"):
            raise RefusalError(400, "the server speaks HTTP/1.1 and nothing else", headers=closing)
        if b"content-encoding" in exchange.headers:
            raise RefusalError(400, "the body should not be compressed", headers=closing)

    def _check_host(self, exchange: Exchange) -> str:
        given = exchange.header(b"host")
        host = (given or b"").decode("latin-1").lower()
        match = _HOST.fullmatch(host)
        if match is None or match[1] not in self._names:
            raise RefusalError(
                403,
                "the Host header is no name of this server; its owner can add one with "
                "--allow-host NAME",
                code="unknown_host",
            )
        return host

    def _check_origin(self, exchange: Exchange, host: str) -> bool:
        """Whether the request comes from a page whose origin was named."""
        given = exchange.header(b"origin")
        if given is None:
            return False
        origin = given.decode("latin-1").lower()
        if origin in self._origins:
            exchange.more_headers = {
                "Access-Control-Allow-Origin": given.decode("latin-1"),
                "Access-Control-Expose-Headers": "X-Request-Id, Retry-After",
                "Vary": "Origin",
                "Cross-Origin-Resource-Policy": "cross-origin",
            }
            return True
        # The host was checked, so that a page of the same name is our own.
        if origin not in (f"http://{host}", f"https://{host}"):
            raise RefusalError(
                403,
                "pages of other origins may not call this server; its owner can name one with "
                "--allow-origin ORIGIN",
                code="foreign_origin",
            )
        return False

    def _check_site(self, exchange: Exchange) -> None:
        site = exchange.header(b"sec-fetch-site")
        if site is None or site in (b"same-origin", b"none"):
            return
        follows_a_link = (
            exchange.method == "GET"
            and exchange.path == "/"
            and exchange.header(b"sec-fetch-mode") == b"navigate"
            and exchange.header(b"sec-fetch-dest") == b"document"
        )
        if not follows_a_link:
            raise RefusalError(
                403, "pages of other sites may not call this server", code="foreign_origin"
            )

    def _check_key(self, exchange: Exchange) -> None:
        path, method = exchange.path, exchange.method
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
        offered = list(exchange.headers.get(b"x-api-key", []))
        offered += [
            value.removeprefix(b"Bearer ")
            for value in exchange.headers.get(b"authorization", [])
            if value.startswith(b"Bearer ")
        ]
        owner = self._keys.owner(offered)
        if owner is not None:
            exchange.owner = owner
        elif not (is_open and method in ("GET", "HEAD")):
            raise RefusalError(
                401,
                "this server needs an API key: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Bearer realm="mistill"'},
            )


def _check_type(exchange: Exchange) -> None:
    given = (exchange.header(b"content-type") or b"").decode("latin-1").lower()
    kind, _, parameter = given.partition(";")
    if kind.strip() != "application/json" or parameter.strip() not in ("", "charset=utf-8"):
        raise RefusalError(
            415, "the body should be JSON: send it with Content-Type: application/json"
        )
