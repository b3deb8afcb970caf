"""The order of the images in an epoch: a pseudorandom permutation of any size, without state.

It is grain's `index_shuffle`: the Simon block cipher with four rounds (Beaulieu et al. 2013,
eprint.iacr.org/2013/404), applied to a number until the result is an index. For a small data set
the cipher's block of 16 bits is much larger than the set, so a single index takes up to some
hundred rounds. The whole order is then computed at once, by arrays, and kept for the epoch.
"""

import functools

import numpy as np

_BLOCK = 2**16  # number of values of the cipher's smallest block
_ROUNDS = 4


def shuffled(place: int, size: int, seed: int) -> int:
    """Returns the index of the image at a place in the order of `size` images.

    Args:
      place: 0 to `size` - 1.
      size: number of images.
      seed: 0 to 2**32 - 1; other seeds give other orders.
    """
    if size <= _BLOCK:
        return int(order(size, seed)[place])
    import grain  # late: it imports jax and orbax, more than all else in a worker process

    return grain.experimental.index_shuffle(place, max_index=size - 1, seed=seed, rounds=_ROUNDS)


def shuffled_places(places: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Returns `shuffled` of many places."""
    if size <= _BLOCK:
        return order(size, seed)[places]
    return np.array([shuffled(int(place), size, seed) for place in places])


@functools.lru_cache(maxsize=8)
def order(size: int, seed: int) -> np.ndarray:
    """Returns (size,) uint16, the order of at most 65,536 images; cached, so do not change it."""
    encrypted = _encrypted(seed)
    # `onward` takes every value beyond the images a number of steps onward, 1, 2, 4 and so on, but
    # no further than to an image.
    onward = np.where(np.arange(_BLOCK) < size, np.arange(_BLOCK, dtype=np.uint16), encrypted)
    while (indices := onward[encrypted[:size]]).max() >= size:
        onward = onward[onward]
    return indices


def _encrypted(seed: int) -> np.ndarray:
    """Returns (65536,) uint16, the cipher of every value: two halves of 8 bits, four rounds."""
    half = np.arange(256, dtype=np.uint8)

    def turned(bits: int) -> np.ndarray:
        return (half << bits) | (half >> (8 - bits))

    mix = (turned(1) & half) ^ turned(2)  # Simon also turns by 8 bits, here a full turn
    value = np.arange(_BLOCK, dtype=np.uint16)
    left, right = (value >> 8).astype(np.uint8), value.astype(np.uint8)
    keys = _seed_sequence(seed, _ROUNDS)
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left ^= mix[right] ^ np.uint8(first & 0xFF)
        right ^= mix[left] ^ np.uint8(second & 0xFF)
    return (left.astype(np.uint16) << 8) | right


def _seed_sequence(seed: int, count: int) -> list[int]:
    """Returns the first numbers of C++'s std::seed_seq of one seed, for `count` up to 6."""
    mask = 0xFFFFFFFF

    def scramble(x: int) -> int:
        return (x ^ (x >> 27)) & mask

    words = [0x8B8B8B8B] * count
    t = (count - 1) // 2
    p = (count - t) // 2
    q = p + t
    rounds = max(2, count)
    for k in range(rounds):
        r1 = 1664525 * scramble(words[k % count] ^ words[(k + p) % count] ^ words[(k - 1) % count])
        r2 = r1 + (1 if k == 0 else k % count + (seed if k == 1 else 0))
        words[(k + p) % count] = (words[(k + p) % count] + r1) & mask
        words[(k + q) % count] = (words[(k + q) % count] + r2) & mask
        words[k % count] = r2 & mask
    for k in range(rounds, rounds + count):
        total = words[k % count] + words[(k + p) % count] + words[(k - 1) % count]
        r3 = 1566083941 * scramble(total & mask)
        r4 = r3 - k % count
        words[(k + p) % count] ^= r3 & mask
        words[(k + q) % count] ^= r4 & mask
        words[k % count] = r4 & mask
    return words
