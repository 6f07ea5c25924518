"""Errors of requests, in the one form of OpenAI's API."""

from http import HTTPStatus
from typing import Any


class Problem(ValueError):
    """A refused request.

    Args:
        message: One sentence for the person who made the request.
        field: The wrong field of the request, if there is one.
        status: The HTTP status.
        code: A word for programs.
    """

    def __init__(
        self,
        message: str,
        field: str | None = None,
        *,
        status: int = HTTPStatus.BAD_REQUEST,
        code: str | None = None,
    ):
        super().__init__(message)
        self.field = field
        self.status = HTTPStatus(status)
        self.code = code

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        server = self.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        error = {
            "message": str(self),
            "type": "server_error" if server else "invalid_request_error",
            "param": self.field,
            "code": self.code,
        }
        return {"error": error}


def wrong(field: str, why: str) -> Problem:
    """What refuses a request because of a field: a sentence that begins with the field's name."""
    return Problem(f"{field} {why}", field)
