"""MLX's random state, and the draws of a text that mlx-lm's samplers make from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from struct import pack, unpack
from typing import cast

import mlx.core as mx

from ..head.draw import BELOW_ONE

Key = tuple[int, int]  # the two words of a key, or of MLX's random state

WORD = 0xFFFFFFFF
LANES = WORD | WORD << 64  # two words that are computed at once, 64 bits apart
PARITY = 0x1BD11BDA
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def current_key() -> Key:
    """MLX's random state in this thread. Waits for it."""
    high, low = mx.random.state[0].tolist()  # type: ignore[index]
    return high, low


def set_key(key: Key) -> None:
    """Makes ``key`` MLX's random state in this thread."""
    mx.random.seed(key[0] << 32 | key[1])


@contextmanager
def random_key(key: Key | None) -> Iterator[None]:
    """A block in which MLX's random state is ``key``; with None it stays as it is."""
    if key is None:
        yield
        return
    before = current_key()
    set_key(key)
    try:
        yield
    finally:
        set_key(before)


class DrawChain:
    """The random states of one text: each draw of a sampler of mlx-lm splits the state once.

    The keys follow from the state at the text's start, so that proposals draw ahead, and a
    rejected token's place is drawn again, while MLX's own state is what mlx-lm's loop would have
    left at the token that the caller got last.
    """

    def __init__(self) -> None:
        self._states = [current_key()]  # before each draw
        self._keys: list[Key] = []  # of each draw
        self._numbers: list[int] = []  # of each draw, the bits
        self._placed: mx.array | None = None

    def state(self, draw: int) -> Key:
        """MLX's random state before draw number ``draw``."""
        while len(self._states) <= draw:
            self._extend()
        return self._states[draw]

    def key(self, draw: int) -> Key:
        """The key with which that draw is made."""
        while len(self._keys) <= draw:
            self._extend()
        return self._keys[draw]

    def number_bits(self, draw: int) -> int:
        """The bits of the uniform number by which that draw is made from one row."""
        while len(self._numbers) <= draw:
            self._numbers.append(uniform_bits(self.key(len(self._numbers))))
        return self._numbers[draw]

    def place(self, draw: int) -> None:
        """Makes MLX's random state the one before ``draw``."""
        set_key(self.state(draw))
        self._placed = mx.random.state[0]  # type: ignore[index]

    @property
    def undisturbed(self) -> bool:
        """Whether nobody has drawn or seeded since :meth:`place`."""
        return self._placed is None or mx.random.state[0] is self._placed  # type: ignore[index]

    def _extend(self) -> None:
        following, key = split(self._states[-1])
        self._states.append(following)
        self._keys.append(key)


def split(key: Key) -> tuple[Key, Key]:
    """``mx.random.split(key)`` without an array: MLX's next state, and the key of a draw.

    Source: ``random::bits`` of four words in MLX.
    """
    first, second = _threefry(key, (0, 2), (1, 3))
    return (first[0], second[0]), (first[1], second[1])


def uniform_bits(key: Key) -> int:
    """The bits of the float32 number ``mx.random.uniform(shape=(1,), key=key)``.

    Source: ``random::uniform`` in MLX.
    """
    word = _threefry(key, (0, 0), (0, 0))[0][0]
    number = min(word * 2.0**-32, BELOW_ONE)  # rounded to float32 as MLX rounds the word
    return cast(int, unpack("<I", pack("<f", number))[0])


def _threefry(key: Key, *counters: Key) -> tuple[Key, Key]:
    """Two random words of each of two counters, which are computed at once.

    Source: Threefry-2x32 with 20 rounds; Salmon et al. 2011, "Parallel random numbers: as easy as
        1, 2, 3".
    """
    schedule = [_on_lanes(word, word) for word in (*key, key[0] ^ key[1] ^ PARITY)]
    left, right = (_on_lanes(*words) for words in zip(*counters, strict=True))
    left = (left + schedule[0]) & LANES
    right = (right + schedule[1]) & LANES
    for group in range(5):
        for turn in ROTATIONS[group % 2]:
            left = (left + right) & LANES
            right = ((right << turn | right >> (32 - turn)) & LANES) ^ left
        left = (left + schedule[(group + 1) % 3]) & LANES
        right = (right + schedule[(group + 2) % 3] + _on_lanes(group + 1, group + 1)) & LANES
    return (left & WORD, right & WORD), (left >> 64, right >> 64)


def _on_lanes(first: int, second: int) -> int:
    return first | second << 64
