"""Secrets do not appear in messages and logs."""

import logging

import pytest

from mlx_flashhead.common.repositories import redact, redacted_logs

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH"


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "my-own-secret")


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"Illegal header value b'Bearer {TOKEN}'", "Illegal header value b'Bearer …'"),
        ("my-own-secret is not valid", "… is not valid"),
        ("Bearer other.token-of~some/kind=", "Bearer …"),
        ("proxy http://ann:pass@proxy:80 refused", "proxy http://…@proxy:80 refused"),
        ("PUT https://s3/x?X-Amz-Signature=1&b=2 failed", "PUT https://s3/x?… failed"),
    ],
)
def test_redact(text, expected):
    assert redact(text) == expected


def test_what_is_no_secret_stays():
    text = "hf_transfer is missing, see https://huggingface.co/a/b"
    assert redact(text) == text


def test_logs_of_the_client_are_redacted(caplog):
    logger = logging.getLogger("huggingface_hub.utils._http")
    with redacted_logs():
        try:
            raise ValueError("my-own-secret")
        except ValueError:
            logger.warning("%s was sent", "my-own-secret", exc_info=True)
    assert "my-own-secret" not in caplog.text
    assert "… was sent" in caplog.text
    logger.warning("%s again", "my-own-secret")
    assert "my-own-secret again" in caplog.text
