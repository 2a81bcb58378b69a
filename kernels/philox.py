"""Philox4x32-10, the counter-based generator behind every random choice of a run.

A draw is a pure function of (seed, counter): nothing is stored, so a run resumes from one integer, gives
the same samples on any number of ranks, and a GPU kernel (`tl.philox`) draws the same bits as the CPU.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from typing import Any

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF

# The last counter word names what a draw is for, so that no two purposes share random bits.
STREAM_ORDER, STREAM_CROP, STREAM_FLIP, STREAM_COLOR, STREAM_MASK, STREAM_SUBSTITUTE, STREAM_DROP = range(7)
STREAM_BLOCK, STREAM_BLOCK_FILL, STREAM_GRID, STREAM_SUBSET, STREAM_AUGMENT, STREAM_MIX = range(7, 13)


def philox_4x32(seed: int, c0: Any, c1: Any, c2: Any, c3: Any, rounds: int = 10) -> tuple[Any, Any, Any, Any]:
    """Four random 32-bit words per counter.

    Works alike on NumPy and torch int64 arrays: a product of two 32-bit words may wrap int64, and the low 64
    bits, the only ones read here, are right all the same.

    Args:
        seed: 64-bit key.
        c0, c1, c2, c3: the four 32-bit counter words, int64 arrays or ints, that broadcast together.
        rounds: 10 is the published, crush-resistant count.

    Returns:
        Four int64 arrays of values in [0, 2**32); ints where all words are ints.
    """
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(rounds):
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((product_b >> 32) & _LOW) ^ c1 ^ k0
        c2 = ((product_a >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = product_b & _LOW, product_a & _LOW
        k0, k1 = (k0 + _WEYL_A) & _LOW, (k1 + _WEYL_B) & _LOW
    return c0, c1, c2, c3
