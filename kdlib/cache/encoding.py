"""Numbers as few bits: a position's ids as the gaps between them, weights as one byte each, nats as one byte each.

Which ids a position holds matters, their order does not. In ascending order a gap is small, and of n ids log2 n! bits need
not be told. A gap is kept as its *octave* (how often it can be halved), whose few values a Huffman code makes short, and the
bits below the leading one, which are as good as random and packed as they are (an Elias gamma code, IEEE Trans. Inf. Theory
21, 1975, with the length coded by what is frequent).

Pure NumPy. :func:`kdlib.cache.kinds.bytes_per_token` adds up what each costs.
"""

import numpy as np

LARGEST_NATS = 64.0
# Weights that are not counts: 0, then 255 values evenly spaced in their logarithm. exp(-20) is less than a float32
# softmax can tell from 0 over a large vocabulary, and importance weights may exceed 1.
LOG_WEIGHTS = np.r_[0, np.exp(np.linspace(-20, 4, 255))].astype(np.float32)


def pack_ids(ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ascending ids as gaps: the first id + 1, then from one id to the next, each 2^octave + remainder.

    Args:
        ids: [sum of lengths] below 2^25, row after row, in a row ascending and none twice; lengths: [n].

    Returns:
        octaves: uint8 [sum of lengths]; remainders: bytes, each in ``octave`` bits, lowest bit first.
    """
    gaps = np.diff(ids, prepend=-1)
    starts = (np.cumsum(lengths) - lengths)[lengths > 0]
    gaps[starts] = ids[starts] + 1
    octaves = np.frexp(gaps)[1].astype(np.uint8) - np.uint8(1)
    # A gap's bits below its leading one: those of lower place than its octave.
    bits = np.unpackbits(gaps.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    return octaves, np.packbits(bits[np.arange(32) < octaves[:, None]], bitorder="little")


def unpack_ids(octaves: np.ndarray, remainders: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The ids of whole rows of what :func:`pack_ids` made, uint32 [sum of lengths].

    Args:
        octaves: [sum of lengths] of these rows; lengths: [n].
        remainders: the bytes, and four more of whatever value.
        starts: uint32 [sum of lengths], the bit at which each one's remainder begins.
    """
    # The four bytes from the one where a remainder begins hold all of it.
    words = np.ndarray((max(0, len(remainders) - 3),), "<u4", remainders, strides=(1,))
    leading = np.uint32(1) << octaves
    gaps = words.take(starts >> np.uint32(3))
    gaps >>= starts & 7
    gaps &= leading - np.uint32(1)
    gaps |= leading
    # Sums may pass 2^32: what is left when the sum before a row is taken away is right all the same.
    ends = np.cumsum(gaps, dtype=np.uint32)
    before = np.r_[np.uint32(0), ends][np.cumsum(lengths) - lengths]
    ends -= np.repeat(before + np.uint32(1), lengths)
    return ends


def round_weights(weights: np.ndarray, uniforms: np.ndarray | None = None) -> np.ndarray:
    """Codes [n] whose ``LOG_WEIGHTS`` stand for ``weights`` [n]; neighbours lie 10 % apart.

    Args:
        uniforms: [n] in [0, 1). With them a weight between two values takes the upper one with the probability that
            makes its expectation exact (stochastic rounding), so an unbiased target stays unbiased. Without, the nearer.

    Weights above the largest value (exp(4)) become it, and their expectation falls short.
    """
    weights = np.minimum(weights, LOG_WEIGHTS[-1])
    low = np.clip(np.searchsorted(LOG_WEIGHTS, weights, side="right") - 1, 0, 254)
    share = (weights - LOG_WEIGHTS[low]) / (LOG_WEIGHTS[low + 1] - LOG_WEIGHTS[low])
    return (low + (share > (0.5 if uniforms is None else uniforms))).astype(np.uint8)


def code_nats(nats: np.ndarray) -> np.ndarray:
    """Non-negative nats in one byte, finer where small: off by at most sqrt(nats) / 31 + 0.0003, 64 at most."""
    return np.rint(255 * np.sqrt(np.clip(nats, 0, LARGEST_NATS) / LARGEST_NATS)).astype(np.uint8)


def decode_nats(codes: np.ndarray) -> np.ndarray:
    """What :func:`code_nats` coded, float32."""
    return (codes.astype(np.float32) / 255) ** 2 * np.float32(LARGEST_NATS)
