"""Rejected requests, as errors of OpenAI's shape, and of Anthropic's where its API is served."""

from typing import Any

# Anthropic's words for a status; Claude Code looks for those of a prompt that is too long.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
TOO_LONG = "context_length_exceeded"


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

    def renamed(self, field: str, name: str) -> "ApiError":
        """The same error where a field has another name."""
        if field == name or not (self.field and field.startswith(self.field)):
            return self
        message = str(self).replace(field, name)
        if message.startswith(self.field):
            message = name + message.removeprefix(self.field)
        return ApiError(message, name, status=self.status, code=self.code)

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        error_type = "invalid_request_error"
        if self.status >= 500:
            error_type = "server_error"
        error = {"message": str(self), "type": error_type, "param": self.field, "code": self.code}
        return {"error": error}

    def as_anthropic_json(self) -> dict[str, Any]:
        """The body of the answer in Anthropic's shape."""
        error_type = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
        message = str(self)
        if self.code == TOO_LONG:
            message = f"Prompt is too long. {message}"
        return {"type": "error", "error": {"type": error_type, "message": message}}

    def body_at(self, path: str) -> dict[str, Any]:
        """The body of the answer to a request for a path, in the shape of its API."""
        if path.removeprefix("/v1").startswith("/messages"):
            return self.as_anthropic_json()
        return self.as_json()


def field_error(field: str, reason: str) -> ApiError:
    """The error of a field, with a sentence that begins with the field's name."""
    return ApiError(f"{field} {reason}", field)
