"""MLX's random state, and the draws of a text that mlx-lm's samplers make from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from struct import pack, unpack

import mlx.core as mx

from ..head.draw import BELOW_ONE

Key = tuple[int, int]  # the two words of a key, or of MLX's random state

WORD = 0xFFFFFFFF
AT_ONCE = 16  # numbers that are computed ahead
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
        while len(self._numbers) <= draw:  # some at once take little longer than one
            n = len(self._numbers)
            self._numbers += uniform_bits([self.key(n + i) for i in range(AT_ONCE)])
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
    first, second = _threefry([key, key], 1 << 64, 2 | 3 << 64)
    return (first[0], second[0]), (first[1], second[1])


def uniform_bits(keys: list[Key]) -> list[int]:
    """The bits of the float32 numbers ``mx.random.uniform(shape=(1,), key=key)`` of some keys.

    Source: ``random::uniform`` in MLX.
    """
    numbers = [min(word * 2.0**-32, BELOW_ONE) for word, _ in _threefry(keys)]
    # rounded to float32 as MLX rounds the words
    return list(unpack(f"<{len(numbers)}I", pack(f"<{len(numbers)}f", *numbers)))


def _threefry(keys: list[Key], left: int = 0, right: int = 0) -> list[Key]:
    """Two random words of each key, for a counter of two words.

    All are computed at once, as lanes of one whole number. ``left`` has the first words of the
    counters, ``right`` the second ones, likewise.

    Source: Threefry-2x32 with 20 rounds; Salmon et al. 2011, "Parallel random numbers: as easy as
        1, 2, 3".
    """
    ones = _ones(len(keys))
    mask = ones * WORD
    first_key = _lanes([first for first, _ in keys])
    second_key = _lanes([second for _, second in keys])
    schedule = (first_key, second_key, first_key ^ second_key ^ ones * PARITY)
    left = (left + first_key) & mask
    right = (right + second_key) & mask
    for group in range(5):
        for turn in ROTATIONS[group % 2]:
            left = (left + right) & mask
            right = ((right << turn | right >> (32 - turn)) & mask) ^ left
        left = (left + schedule[(group + 1) % 3]) & mask
        right = (right + schedule[(group + 2) % 3] + ones * (group + 1)) & mask
    return list(zip(_words(left, len(keys)), _words(right, len(keys)), strict=True))


@cache
def _ones(n: int) -> int:
    return _lanes([1] * n)


def _lanes(words: list[int]) -> int:
    """Words of 32 bits as one number, 64 bits apart."""
    return int.from_bytes(pack(f"<{len(words)}Q", *words), "little")


def _words(lanes: int, n: int) -> tuple[int, ...]:
    return unpack(f"<{n}Q", lanes.to_bytes(8 * n, "little"))
