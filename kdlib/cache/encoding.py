"""Compact codes for targets: the gaps between a position's ids, and weights and nats in one byte each.

The ids of a position are a set, so their order carries no information. Sorting them saves log2 n! bits for n ids, and the
gaps between neighbours are small. A gap g >= 1 is written as in an Elias-gamma code (Elias 1975, IEEE Trans. Inf. Theory
21): its *octave* floor(log2 g), then the octave bits below the leading one. Elias-gamma writes the octave in unary. Here
it is one byte, which a Huffman code later shortens to the entropy of the octaves (see :mod:`kdlib.cache.shards`). The
remaining bits are close to uniform, so they are packed without further coding.

Example: the ids 4, 9, 10 have the gaps 5, 5, 1, since the first gap counts from -1. 5 is 101 in binary: octave 2,
remainder 01. 1 has octave 0 and no remainder.

Pure NumPy. :func:`kdlib.cache.kinds.bytes_per_token` gives the size.
"""

import numpy as np

LARGEST_NATS = 64.0
# Weights that are not counts: 0, then 255 values evenly spaced in their logarithm. exp(-20) is less than a float32
# softmax can tell from 0 over a large vocabulary, and importance weights may exceed 1.
LOG_WEIGHTS = np.r_[0, np.exp(np.linspace(-20, 4, 255))].astype(np.float32)


def pack_ids(ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encode rows of ascending ids as gaps 2^octave + remainder; the first gap of a row is its first id + 1.

    Args:
        ids: [sum of lengths] below 2^25, row after row, strictly ascending within a row; lengths: [n].

    Returns:
        octaves: uint8 [sum of lengths]; remainders: a stream of bytes in which each remainder takes ``octave`` bits,
        lowest bit first.
    """
    gaps = np.diff(ids, prepend=-1)
    starts = (np.cumsum(lengths) - lengths)[lengths > 0]
    gaps[starts] = ids[starts] + 1
    # frexp writes a gap as m * 2^e with 0.5 <= m < 1, so e - 1 is floor(log2 gap): exact, unlike a rounded logarithm.
    octaves = np.frexp(gaps)[1].astype(np.uint8) - np.uint8(1)
    # [gaps, 32]: bit j of each gap in column j. The mask keeps the columns below the octave, which leaves out the leading
    # one (it is always set), and row-major order lays the remainders end to end.
    bits = np.unpackbits(gaps.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    return octaves, np.packbits(bits[np.arange(32) < octaves[:, None]], bitorder="little")


def unpack_ids(octaves: np.ndarray, remainders: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Decode the ids of whole rows from :func:`pack_ids`, uint32 [sum of lengths].

    Args:
        octaves: [sum of lengths] of these rows; lengths: [n].
        remainders: the bytes, followed by four bytes of any value.
        starts: uint32 [sum of lengths], the bit at which each remainder begins.
    """
    # words[b] is the little-endian 32-bit word at byte b: a view with a stride of one byte, so words overlap. A remainder
    # begins at one of the first 8 bits of its word and has at most 24 bits (ids are below 2^25): 7 + 24 bits fit.
    words = np.ndarray((max(0, len(remainders) - 3),), "<u4", remainders, strides=(1,))
    leading = np.uint32(1) << octaves
    gaps = words.take(starts >> np.uint32(3))
    gaps >>= starts & 7  # now the remainder is in the lowest bits
    gaps &= leading - np.uint32(1)  # without the bits of later remainders
    gaps |= leading  # 2^octave + remainder
    # An id is the sum of its row's gaps so far, less 1. One cumulative sum over all rows, minus its value before the row,
    # gives it; the sum may wrap around at 2^32, and the difference is still exact modulo 2^32.
    ends = np.cumsum(gaps, dtype=np.uint32)
    before = np.r_[np.uint32(0), ends][np.cumsum(lengths) - lengths]
    ends -= np.repeat(before + np.uint32(1), lengths)
    return ends


def round_weights(weights: np.ndarray, uniforms: np.ndarray | None = None) -> np.ndarray:
    """Round ``weights`` [n] to the values in ``LOG_WEIGHTS``, about 10 % apart, and return their codes, uint8 [n].

    Args:
        uniforms: [n] in [0, 1). If given, a weight between two values is rounded up with the probability that makes its
            expectation exact (stochastic rounding), so an unbiased target stays unbiased. Otherwise to the nearest value.

    Weights above the largest value, exp(4), are clipped to it, so their expectation is too small.
    """
    weights = np.minimum(weights, LOG_WEIGHTS[-1])
    low = np.clip(np.searchsorted(LOG_WEIGHTS, weights, side="right") - 1, 0, 254)
    share = (weights - LOG_WEIGHTS[low]) / (LOG_WEIGHTS[low + 1] - LOG_WEIGHTS[low])
    return (low + (share > (0.5 if uniforms is None else uniforms))).astype(np.uint8)


def code_nats(nats: np.ndarray) -> np.ndarray:
    """Quantise nats in 0..64 to one byte, uniformly in sqrt(nats): the error is at most sqrt(nats) / 31 + 0.0003."""
    return np.rint(255 * np.sqrt(np.clip(nats, 0, LARGEST_NATS) / LARGEST_NATS)).astype(np.uint8)


def decode_nats(codes: np.ndarray) -> np.ndarray:
    """Invert :func:`code_nats`, float32."""
    return (codes.astype(np.float32) / 255) ** 2 * np.float32(LARGEST_NATS)
