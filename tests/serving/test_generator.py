"""The thread that generates, where something fails that no check has refused."""

import threading
from argparse import Namespace
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from mlx_flashhead.serving.cache import PromptCaches
from mlx_flashhead.serving.generator import FlashHeadGenerator, until_stop
from mlx_flashhead.serving.provider import HeadSettings


class FailingGenerator(FlashHeadGenerator):
    """Takes a request, then fails; at the second one it answers."""

    def _generate(self):
        self.rounds = getattr(self, "rounds", 0) + 1
        while not self._stop:
            request = self._next_request(timeout=0.05)
            if request is not None:
                if self.rounds == 1:
                    raise RuntimeError("out of memory")
                request[0].put(Context())
                request[0].put(None)


class Context:
    def stop(self):
        pass


def request():
    arguments = SimpleNamespace(model=SimpleNamespace(model="default_model"), stop_words=[])
    return SimpleNamespace(head_settings=HeadSettings(), problem=None), arguments


def test_requests_under_way_fail_and_later_ones_are_answered(caplog):
    provider = SimpleNamespace(cli_args=Namespace())
    generator = FailingGenerator(provider, PromptCaches(2))
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            generator.generate(*request())
        assert "The requests under way have failed" in caplog.text
        _, responses = generator.generate(*request())
        assert list(responses) == []
        assert generator.is_healthy
    finally:
        generator.stop_and_join()
    assert not any("_run_generate" in thread.name for thread in threading.enumerate())


@dataclass
class Response:
    text: str
    finish_reason: str | None = None


def texts(parts, words):
    responses = [Response(part) for part in parts]
    return [response.text for response in until_stop(responses, words)]


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], ["ab", "cd", "ef"]),
        (["bc"], ["ab", "c"]),
        (["abcdef"], ["ab", "cd", "ef"]),
        (["f", "d"], ["ab", "cd"]),
        (["a"], ["a"]),
        (["abd"], ["ab", "cd", "ef"]),
    ],
)
def test_text_ends_with_the_first_stop_word(words, expected):
    assert texts(["ab", "cd", "ef"], words) == expected


@pytest.mark.parametrize(
    "reason, expected",
    [
        ("length", [("ab", None), ("c", None)]),  # the word ended it, not the limit
        ("stop", [("ab", None), ("cdx", "stop")]),  # mlx-lm has ended it
    ],
)
def test_reason_for_the_end(reason, expected):
    responses = [Response("ab"), Response("cdx", reason)]
    found = list(until_stop(responses, ["bc"]))
    assert [(response.text, response.finish_reason) for response in found] == expected
