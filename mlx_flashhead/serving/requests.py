"""What a request may hold: checked before it joins others in a batch."""

import math
from collections.abc import Iterator
from typing import Any

from .provider import HeadSettings

CHAT = "chat"
TEXT = "text"
POST_PATHS = {
    "/v1/completions": TEXT,
    "/v1/chat/completions": CHAT,
    "/chat/completions": CHAT,
}
MAX_INT = 2**31 - 1


def check_body(body: dict[str, Any], kind: str) -> HeadSettings:
    """Checks what mlx-lm's server does not.

    Args:
        body: The request.
        kind: ``CHAT`` or ``TEXT``.

    Returns:
        What the request asks of the FlashHead.

    Raises:
        ValueError: In one sentence, if it cannot be served.
    """
    for number in _numbers(body):
        if not math.isfinite(number):
            raise ValueError("NaN and Infinity are not JSON, and numbers must be below 1e308.")
    for name, value in body.items():
        if name != "seed" and isinstance(value, int) and abs(value) > MAX_INT:
            raise ValueError(f"{name} is {value}: it must be at most {MAX_INT}.")
    _check_prompt(body, kind)
    _check_stop(body.get("stop"))
    seed = body.get("seed")
    if isinstance(seed, int) and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}: it must be a whole number of 64 bits.")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise ValueError('stream_options must be an object, such as {"include_usage": true}.')
    bias = body.get("logit_bias")
    if isinstance(bias, dict) and not all(isinstance(v, int | float) for v in bias.values()):
        raise ValueError("logit_bias must give each token id a number.")
    return _head_settings(body)


def _numbers(value: Any) -> Iterator[float]:
    """Every float within a JSON value."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)


def _check_prompt(body: dict[str, Any], kind: str) -> None:
    if kind == TEXT:
        if not isinstance(body.get("prompt"), str):
            raise ValueError("prompt must be a text.")
        return
    messages = body.get("messages")
    valid = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    )
    if not valid or not messages:
        raise ValueError(
            'messages must be a list of at least one {"role": "user", "content": "…"}.'
        )
    for name in ("tools", "chat_template_kwargs", "role_mapping"):
        expected = list if name == "tools" else dict
        if body.get(name) is not None and not isinstance(body[name], expected):
            what = "a list" if expected is list else "an object"
            raise ValueError(f"{name} must be {what}.")


def _check_stop(stop: Any) -> None:
    words = [stop] if isinstance(stop, str) else stop
    if words is not None and (
        not isinstance(words, list) or not all(isinstance(w, str) and w for w in words)
    ):
        raise ValueError("stop must be a text or a list of texts, none of them empty.")


def _head_settings(body: dict[str, Any]) -> HeadSettings:
    n_probes, dense = body.get("n_probes"), body.get("dense")
    if n_probes is not None and (type(n_probes) is not int or n_probes < 1):
        raise ValueError(f"n_probes is {n_probes!r}: it must be a whole number, 1 or more.")
    if dense is not None and type(dense) is not bool:
        raise ValueError(f"dense is {dense!r}: it must be true or false.")
    if dense and n_probes is not None:
        raise ValueError("dense scores every token: leave n_probes out.")
    return HeadSettings(n_probes, dense)
