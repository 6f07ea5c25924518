"""Secrets do not appear in messages."""

import pytest

from mlx_flashhead.common.repositories import redact

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
