"""MLX's random state, and the draws of a text that mlx-lm's samplers make from it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from struct import pack, unpack

import mlx.core as mx

from ..head.draws.draw import Key
from ..head.draws.noise import BELOW_ONE

WORD = 0xFFFFFFFF
# Numbers that are computed ahead.
AT_ONCE = 16
PARITY = 0x1BD11BDA
# By how many bits the right words are turned, and what is left of 32.
ROTATIONS = (
    ((13, 19), (15, 17), (26, 6), (6, 26)),
    ((17, 15), (29, 3), (16, 16), (24, 8)),
)


def current_key() -> Key:
    """MLX's random state in this thread. Waits for it."""
    high, low = mx.random.state[0].tolist()  # type: ignore[index]
    return high, low


def set_key(key: Key) -> None:
    """Makes ``key`` MLX's random state in this thread."""
    mx.random.seed(key[0] << 32 | key[1])


@contextmanager
def random_key(key: Key) -> Iterator[None]:
    """A block in which MLX's random state is ``key``."""
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

    Args:
        first: The number of the first draw.
    """

    def __init__(self, first: int = 0):
        self._first = first
        # MLX's random state before each draw, the key of each draw, and the bits of its number.
        self._states = [current_key()]
        self._keys: list[Key] = []
        self._numbers: list[int] = []
        self._placed: mx.array | None = None

    def state(self, draw: int) -> Key:
        """MLX's random state before draw number ``draw``."""
        while len(self._states) <= draw - self._first:
            following, key = split(self._states[-1])
            self._states.append(following)
            self._keys.append(key)
        return self._states[draw - self._first]

    def number_bits(self, draw: int) -> int:
        """The bits of the uniform number by which that draw is made for one text."""
        n = len(self._numbers)
        # Some at once take little longer than one.
        if n <= draw - self._first:
            self.state(draw + AT_ONCE)
            self._numbers += uniform_bits(self._keys[n:])
        return self._numbers[draw - self._first]

    def move_to(self, draw: int) -> None:
        """Makes MLX's random state the one before ``draw``."""
        set_key(self.state(draw))
        self._placed = mx.random.state[0]  # type: ignore[index]

    @property
    def undisturbed(self) -> bool:
        """Whether nobody has drawn or seeded since :meth:`move_to`."""
        return self._placed is None or mx.random.state[0] is self._placed  # type: ignore[index]


def split(key: Key) -> tuple[Key, Key]:
    """``mx.random.split(key)`` without an array: MLX's next state, and the key of a draw.

    Source: ``random::bits`` of four words in MLX.
    """
    ones = 1 | 1 << 64
    left, right = _threefry(ones, ones * key[0], ones * key[1], 1 << 64, 2 | 3 << 64)
    return (left & WORD, left >> 64), (right & WORD, right >> 64)


def uniform_bits(keys: list[Key]) -> list[int]:
    """The bits of the float32 numbers ``mx.random.uniform(shape=(1,), key=key)`` of some keys.

    Source: ``random::uniform`` in MLX.
    """
    n = len(keys)
    first, second = zip(*keys, strict=True)
    left, _ = _threefry(_lanes([1] * n), _lanes(first), _lanes(second))
    words = unpack(f"<{n}Q", left.to_bytes(8 * n, "little"))
    numbers = [min(word * 2.0**-32, BELOW_ONE) for word in words]
    # They are rounded to float32 as MLX rounds the words.
    return list(unpack(f"<{n}I", pack(f"<{n}f", *numbers)))


def _threefry(
    ones: int, first_key: int, second_key: int, left: int = 0, right: int = 0
) -> tuple[int, int]:
    """Two random words of each of several keys, for a counter of two words.

    All are computed at once: each whole number holds a word of every key, in lanes of 64 bits.

    Source: Threefry-2x32 with 20 rounds; Salmon et al. 2011, "Parallel random numbers: as easy as
        1, 2, 3".

    Args:
        ones: 1 in each lane.
        first_key: The first words of the keys.
        second_key: The second words.
        left: The first words of the counters.
        right: The second words.

    Returns:
        The first words, and the second ones.
    """
    mask = ones * WORD
    schedule = (first_key, second_key, first_key ^ second_key ^ ones * PARITY)
    left += first_key
    right = (right + second_key) & mask
    for group in range(5):
        # What the left words carry stays in their lanes, above the words.
        for turn, back in ROTATIONS[group % 2]:
            left += right
            right = ((right << turn | right >> back) ^ left) & mask
        left += schedule[(group + 1) % 3]
        right = (right + schedule[(group + 2) % 3] + ones * (group + 1)) & mask
    return left & mask, right


def _lanes(words: Iterable[int]) -> int:
    """Words of 32 bits as one number, 64 bits apart."""
    words = list(words)
    return int.from_bytes(pack(f"<{len(words)}Q", *words), "little")
