"""The draw of a token in numpy, written from its definition; see metal/flash_head/sample.h."""

import numpy as np

NONE = -1e30  # log_min_p without min_p


def threefry(key_0: np.ndarray, key_1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 with 20 rounds of the counter (0, 1).

    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
    """
    keys = [key_0, key_1, key_0 ^ key_1 ^ np.uint32(0x1BD11BDA)]
    x, y = keys[0] + np.uint32(0), keys[1] + np.uint32(1)
    for step in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[step % 2]:
            x = x + y
            y = ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn))) ^ x
        x = x + keys[(step + 1) % 3]
        y = y + keys[(step + 2) % 3] + np.uint32(step + 1)
    return x, y


def noise(ids: np.ndarray, key) -> np.ndarray:
    """Gumbel noise of token ids (K,) under the position's key (2,): float32."""
    ids, key = np.asarray(ids, np.uint32), np.asarray(key, np.uint32)
    with np.errstate(over="ignore", divide="ignore"):
        x, y = threefry(key[0] + ids // 2, np.full_like(ids, key[1]))
        bits = np.where(ids % 2 == 0, x, y).astype(np.float32)
        uniform = np.minimum(bits / np.float32(4294967295), np.float32(1 - 2.0**-24))
        return -np.log(-np.log(uniform))


def kept(logits: np.ndarray, tail: float, top_p: float, log_min_p: float, top_k: int):
    """Which of the scored tokens (K,) may be drawn: bool (K,). ``tail``: of the others, a log."""
    x = logits.astype(np.float64)
    mass = np.exp(x - x.max())
    every = mass.sum() + np.exp(tail - x.max())
    order = np.argsort(-x, kind="stable")
    place = np.searchsorted(-x[order], -x, side="left")  # how many are strictly above
    above = np.concatenate([[0], np.cumsum(mass[order])])[place]
    keep = logits >= np.float32(logits.max() + np.float32(log_min_p))
    if top_p < 1:
        keep &= above < top_p * every
    if top_k > 0:
        keep &= place < top_k
    return keep


def draw(ids: np.ndarray, logits: np.ndarray, tail: float, setting, top_k: int, key) -> int:
    """The token of one position: of the scored tokens (K,), without padded slots.

    ``tail`` is the logarithm of the others' mass, ``setting`` 1/temperature, top_p, log_min_p.
    """
    scale, top_p, log_min_p = map(np.float32, setting)
    if scale == 0 or np.isnan(logits).any():
        best = np.isnan(logits) if np.isnan(logits).any() else logits == logits.max()
        return int(ids[best].min())
    values = logits * scale + noise(ids, key)
    values[~kept(logits, tail, top_p, log_min_p, top_k)] = -np.inf
    return int(ids[values == values.max()].min())
