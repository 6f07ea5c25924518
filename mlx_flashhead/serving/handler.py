"""Answers HTTP requests: mlx-lm's API, with JSON in every answer."""

import logging
from contextlib import contextmanager

from ..models.compat import APIHandler
from .provider import RequestError
from .requests import POST_PATHS, check_body
from .valid_json import dumps

# A bias beyond this is as good as infinite, and would be infinite in float16.
MAX_BIAS = 1e4


class FlashHeadHandler(APIHandler):
    """One request; further pages are added by a subclass that extends ``do_GET``."""

    _headers_sent = False
    _request = None
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
            if self.headers.get("Content-Length", "").strip().startswith("-"):
                self.send_problem(400, "Content-Length must not be negative.")
            elif self.path in POST_PATHS:
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
        self.logprobs = self.logprobs or self.top_logprobs > 0
        if self.seed is not None:
            self.seed %= 2**64  # OpenAI's seeds may be negative
        if self.stream_options is not None:
            self.stream_options.setdefault("include_usage", False)
        if self.logit_bias is not None:
            bias = self.logit_bias.items()
            self.logit_bias = {i: max(-MAX_BIAS, min(MAX_BIAS, value)) for i, value in bias}

    def handle_completion(self, request, stop_words) -> None:
        """As mlx-lm's, with what the request asks of the FlashHead."""
        request.head_settings, request.problem = self.head_settings, None
        self._request = request
        super().handle_completion(request, stop_words)

    def generate_response(self, *args, **kwargs) -> dict:
        """As mlx-lm's, with complete logprobs."""
        response = super().generate_response(*args, **kwargs)
        for choice in response["choices"]:
            if "logprobs" in choice:
                content = self._logprobs(kwargs["tokens"], kwargs["token_logprobs"], choice)
                choice["logprobs"]["content"] = content
        return response

    def _logprobs(self, tokens, token_logprobs, choice) -> list[dict]:
        """Each token that was chosen, and the likeliest ones at its place, in order."""
        names = self._request.tokenizer.convert_ids_to_tokens(tokens)
        found = zip(tokens, names, token_logprobs, choice["logprobs"]["content"], strict=True)
        return [
            {
                "id": token,
                "token": name,
                "logprob": logprob,
                "bytes": None,
                "top_logprobs": sorted(
                    ({**top, "bytes": None} for top in entry.get("top_logprobs", ())),
                    key=lambda top: -top["logprob"],
                ),
            }
            for token, name, logprob, entry in found
        ]

    def _set_completion_headers(self, status_code=200):
        # mlx-lm answers 404 to whatever fails before the first token, not to unknown models alone
        if status_code == 404 and self._request and isinstance(self._request.problem, RequestError):
            status_code = 400
        super()._set_completion_headers(status_code)

    def end_headers(self) -> None:
        super().end_headers()
        self._headers_sent = True

    def log_message(self, format, *args) -> None:  # the base class's name
        logging.info("%s %s", self.address_string(), format % args)

    def send_problem(self, status: int, message: str) -> None:
        """Answers with an error; in a stream that has begun, as its last event."""
        problem = dumps({"error": message})
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
