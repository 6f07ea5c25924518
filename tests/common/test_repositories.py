"""Secrets do not appear in messages, logs and uploads."""

import logging

import pytest

from mlx_flashhead.common.repositories import holds_secret, redact, redacted_logs

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
        *(("hf_transfer is missing, see https://huggingface.co/a/b",) * 2,),
    ],
)
def test_redact(text, expected):
    assert redact(text) == expected
    assert holds_secret(text.encode()) == any(secret in text for secret in (TOKEN, "my-own-secret"))


def test_logs_of_the_client_are_redacted(caplog):
    logger = logging.getLogger("huggingface_hub.utils._http")
    with redacted_logs():
        try:
            raise ValueError("my-own-secret")
        except ValueError:
            logger.warning("%s was sent", "my-own-secret", exc_info=True)
    assert "my-own-secret" not in caplog.text and "… was sent" in caplog.text
    logger.warning("%s again", "my-own-secret")
    assert "my-own-secret again" in caplog.text
