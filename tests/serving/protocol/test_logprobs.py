"""Names of tokens by their text and its bytes, and their log-probabilities."""

from types import SimpleNamespace

import mlx.core as mx
import pytest
from tokenizers import decoders

from mlx_flashhead.serving.protocol.logprobs import VERY_UNLIKELY, TokenNames, token_logprobs
from model_folders import EOS


def test_bytes_of_a_byte_level_tokenizer(tiny):
    names = TokenNames(tiny.tokenizer)
    tokens = tiny.tokenizer.encode("aé €\n", add_special_tokens=False)
    assert b"".join(map(names.bytes, tokens)) == "aé €\n".encode()
    assert names.text(tokens[0]) == "a"
    assert names.text(tokens[1]) == "bytes:\\xc3"
    assert {names.bytes(i) for i in range(2, 258)} == {bytes([i]) for i in range(256)}
    assert names.text(1) == EOS
    assert names.bytes(5000) == b""


def test_bytes_of_a_sentencepiece_tokenizer():
    vocabulary = ["▁the", "<0xE2>", "e", "é", "<s>"]
    fallback = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer = SimpleNamespace(
        is_fast=True,
        backend_tokenizer=SimpleNamespace(decoder=fallback),
        convert_ids_to_tokens=lambda i: vocabulary[i],
        added_tokens_decoder={4: None},
    )
    names = TokenNames(tokenizer)
    expected = [b" the", b"\xe2", b"e", "é".encode(), b"<s>"]
    assert [names.bytes(i) for i in range(5)] == expected


@pytest.mark.parametrize(
    "token, n_tops, expected",
    [
        (1, 3, [(1, -3.0), (2, -0.5), (0, -1.0), (1, -3.0)]),
        (3, 0, [(3, VERY_UNLIKELY)]),
        (0, 20, [(0, -1.0), (2, -0.5), (0, -1.0), (1, -3.0), (3, VERY_UNLIKELY)]),
    ],
)
def test_logprobs_of_the_chosen_and_the_likeliest(token, n_tops, expected):
    logprobs = mx.array([-1.0, -3.0, -0.5, -float("inf")])
    assert token_logprobs(logprobs, token, n_tops) == expected
