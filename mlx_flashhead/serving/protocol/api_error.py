"""Errors of requests, in the one form of OpenAI's API."""

from http import HTTPStatus
from typing import Any


class ApiError(ValueError):
    """A refused request: a sentence, the wrong field if there is one, and a word for programs."""

    def __init__(
        self, message: str, field: str | None = None, *, status: int = 400, code: str | None = None
    ):
        super().__init__(message)
        self.field, self.status, self.code = field, HTTPStatus(status), code

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.field, "code": self.code}
        return {"error": error}


def wrong(field: str, why: str) -> ApiError:
    """What refuses a request because of a field: a sentence that begins with the field's name."""
    return ApiError(f"{field} {why}", field)
