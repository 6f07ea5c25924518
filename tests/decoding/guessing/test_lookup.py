"""What a lookup finds, beside a search through the whole text."""

import random

import pytest

from mlx_flashhead.decoding.guessing.lookup import LENGTHS, Lookup


def searched(tokens, n_tokens):
    """The continuation of the latest earlier place of the longest n-gram, by a scan."""
    for length in LENGTHS:
        latest = tokens[-length:]
        for place in range(len(tokens) - 1, length - 1, -1):
            if len(latest) == length and tokens[place - length : place] == latest:
                period = tokens[place:]
                return length, [period[i % len(period)] for i in range(n_tokens)]
    return 0, []


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_what_a_search_finds(seed):
    chance = random.Random(seed)
    tokens = [chance.randrange(6) for _ in range(40)]
    lookup = Lookup(tokens)
    for _ in range(200):
        assert lookup.find(7) == searched(tokens, 7)
        more = [chance.randrange(6) for _ in range(chance.randrange(1, 4))]
        lookup.extend(more)
        tokens += more


def test_tokens_that_were_taken_back_are_not_found():
    lookup = Lookup([1, 2, 3, 4, 7, 8])
    lookup.extend([1, 2, 9, 5, 5, 5])
    lookup.truncate(6)
    # Where 1, 2 stood is something else now.
    lookup.extend([7, 8, 7, 8, 6, 6, 1, 2])
    assert lookup.find(1) == (0, [])
    lookup.extend([4, 1, 2])
    assert lookup.find(1) == (2, [4])


def test_a_text_that_repeats_itself_goes_on_as_it_began():
    assert Lookup([5, 6, 7, 5, 6, 7, 5, 6]).find(6) == (4, [7, 5, 6, 7, 5, 6])


def test_too_short_a_text_has_nothing():
    assert Lookup([]).find(3) == Lookup([4]).find(3) == Lookup([4, 4]).find(3) == (0, [])
