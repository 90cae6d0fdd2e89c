"""Refusals in OpenAI's words: a status, and an error object that its clients read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class RefusalError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: Status of HTTP, 400 or more.
        message: What was expected, what came, and what to do; without a word of a conversation.
        param: The field that is to blame; None where none is.
        code: A word for programs; None where there is none.
        details: More entries of the error object.
        headers: Headers of the answer.
    """

    status: int
    message: str
    param: str | None
    code: str | None
    details: dict[str, Any]
    headers: dict[str, str]

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        details: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Refuse a request.

        Args:
            status: Status of HTTP, 400 or more.
            message: What was expected, what came, and what to do.
            param: The field that is to blame.
            code: A word for programs.
            details: More entries of the error object.
            headers: Headers of the answer.
        """
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.details = dict(details or {})
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error object, as JSON."""
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": _TYPES.get(self.status, "invalid_request_error"),
                    "param": self.param,
                    "code": self.code,
                    **self.details,
                }
            }
        )


def own_fault() -> RefusalError:
    """A request that failed by a mistake of ours.

    Returns:
        The refusal to raise, with the status 500.
    """
    return RefusalError(500, "something went wrong in the server; its log says where")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> RefusalError:
    """A request that asks for what cannot be.

    Args:
        message: What was expected, what came, and what to do.
        param: The field that is to blame.
        code: A word for programs.

    Returns:
        The refusal to raise, with the status 400.
    """
    return RefusalError(400, message, param=param, code=code)


def busy(message: str, seconds: float) -> RefusalError:
    """A request for which there is no room now.

    Args:
        message: Why.
        seconds: After how long it is worth to ask again.

    Returns:
        The refusal to raise, with the status 429.
    """
    wait = str(max(1, min(60, round(seconds))))
    return RefusalError(429, message, code="rate_limit_exceeded", headers={"Retry-After": wait})


def unavailable(message: str) -> RefusalError:
    """A request that comes while nothing is served.

    Args:
        message: Why.

    Returns:
        The refusal to raise, with the status 503.
    """
    return RefusalError(503, message, code="unavailable", headers={"Retry-After": "5"})
