"""Rejected requests, as errors of OpenAI's shape."""

from typing import Any


class ApiError(ValueError):
    """A request that is rejected, or that cannot be answered.

    Args:
        message: A sentence for people.
        field: The field of the request that is the reason, if it is one.
        status: The HTTP status of the answer.
        code: A word for programs.
    """

    def __init__(
        self, message: str, field: str | None = None, *, status: int = 400, code: str | None = None
    ):
        super().__init__(message)
        self.field = field
        self.status = status
        self.code = code

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.field, "code": self.code}
        return {"error": error}


def field_error(field: str, reason: str) -> ApiError:
    """The error of a field, with a sentence that begins with the field's name."""
    return ApiError(f"{field} {reason}", field)
