"""Answers HTTP requests: mlx-lm's API, with JSON in every answer."""

import json
import logging
import math
from contextlib import contextmanager
from typing import Any

from .compat import APIHandler
from .serving_requests import POST_PATHS, check_body

# What OpenAI's API gives a token that is too unlikely to have a logprob.
VERY_UNLIKELY = -9999.0
# A bias beyond this is as good as infinite, and would be infinite in float16.
MAX_BIAS = 1e4


class FlashHeadHandler(APIHandler):
    """One request; further pages are added by a subclass that extends ``do_GET``."""

    _headers_sent = False
    stream = False

    def do_GET(self) -> None:
        """Answers ``/v1/models`` and ``/health``."""
        with self.problems_told():
            if self.path == "/health" or self.path.startswith("/v1/models"):
                super().do_GET()
            else:
                self.send_problem(404, f"There is nothing at {self.path}.")

    def do_POST(self) -> None:
        """Answers chat and text completions."""
        with self.problems_told():
            if self.path in POST_PATHS:
                super().do_POST()
            else:
                places = ", ".join(POST_PATHS)
                self.send_problem(404, f"There is nothing at {self.path}: post to {places}.")

    def validate_model_parameters(self) -> None:
        """Checks the request.

        Raises:
            ValueError: In one sentence, if it cannot be served.
        """
        self.head_settings = check_body(self.body, POST_PATHS[self.path])
        super().validate_model_parameters()
        if self.seed is not None:
            self.seed %= 2**64  # OpenAI's seeds may be negative
        if self.stream_options is not None:
            self.stream_options.setdefault("include_usage", False)
        if self.logit_bias is not None:
            bias = self.logit_bias.items()
            self.logit_bias = {i: max(-MAX_BIAS, min(MAX_BIAS, value)) for i, value in bias}

    def handle_completion(self, request, stop_words) -> None:
        """As mlx-lm's, with what the request asks of the FlashHead."""
        request.head_settings = self.head_settings
        super().handle_completion(request, stop_words)

    def generate_response(self, *args, **kwargs) -> dict:
        """As mlx-lm's, with numbers that JSON can hold."""
        response = super().generate_response(*args, **kwargs)
        for choice in response["choices"]:
            message = choice.get("message") or choice.get("delta") or {}
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = _strict(call["function"]["arguments"])
        return _finite(response)

    def end_headers(self) -> None:
        super().end_headers()
        self._headers_sent = True

    def log_message(self, format, *args) -> None:  # the base class's name
        logging.info("%s %s", self.address_string(), format % args)

    def send_problem(self, status: int, message: str) -> None:
        """Answers with ``{"error": message}``; in a stream that has begun, as its last event."""
        problem = json.dumps({"error": message})
        if self._headers_sent:
            if self.stream:
                self.wfile.write(f"data: {problem}\n\n".encode())
            return
        self._headers_buffer = []  # those of an answer that was begun
        self._set_completion_headers(status)
        self.end_headers()
        self.wfile.write(problem.encode())

    @contextmanager
    def problems_told(self):
        """Tells the client what went wrong, unless the client has gone."""
        try:
            yield
        except ConnectionError:
            logging.info("%s has closed the connection", self.address_string())
        except Exception as error:
            logging.info("%s could not be answered", self.path, exc_info=True)
            status = 400 if isinstance(error, ValueError | TypeError | RecursionError) else 500
            self.send_problem(status, str(error) or type(error).__name__)


def _finite(value: Any) -> Any:
    """A JSON value without -inf (which is what a ruled-out token's logprob may be) and NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(VERY_UNLIKELY, value)
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def _strict(text: str) -> str:
    """JSON text with null in place of NaN and Infinity."""
    return json.dumps(json.loads(text, parse_constant=lambda _: None), ensure_ascii=False)
