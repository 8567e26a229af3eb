"""Numbers as few bits: ids packed at ceil(log2 V) bits, weights as one byte each, nats as one byte each.

Pure NumPy. What each costs is written next to it; :func:`kdlib.cache.kinds.bytes_per_token` adds it up.
"""

import numpy as np

LARGEST_NATS = 64.0
# Weights that are not counts: 0, then 255 values evenly spaced in their logarithm. exp(-20) is less than a float32
# softmax can tell from 0 over a large vocabulary, and importance weights may exceed 1.
LOG_WEIGHTS = np.r_[0, np.exp(np.linspace(-20, 4, 255))].astype(np.float32)


def id_bits(vocabulary: int) -> int:
    """Bits of one id."""
    return max(1, int(vocabulary - 1).bit_length())


def pack_ids(ids: np.ndarray, bits: int) -> np.ndarray:
    """Ids [n], each in ``bits`` bits, lowest bit first, as bytes [ceil(n * bits / 8) + 4]: four zeros for the reader."""
    words = ids.astype("<u4").view(np.uint8).reshape(-1, 4)
    unpacked = np.unpackbits(words, axis=1, count=bits, bitorder="little")
    return np.r_[np.packbits(unpacked, bitorder="little"), np.zeros(4, np.uint8)]


def unpack_ids(packed: np.ndarray, starts: np.ndarray, bits: int) -> np.ndarray:
    """The ids that begin at the bits ``starts``, in any order, of what :func:`pack_ids` made (the i-th at i * bits); bits <= 25."""
    # The four bytes from the one where an id starts hold all of it, whatever bit it starts at.
    words = np.ndarray((len(packed) - 3,), "<u4", packed, strides=(1,))
    return (words[starts >> 3] >> (starts & 7).astype(np.uint32)) & np.uint32(2**bits - 1)


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


def differences(codes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Each row's first code, then the steps from one to the next, modulo 256: falling codes become small numbers.

    Args:
        codes: uint8 [sum of lengths], row after row; lengths: [n].
    """
    steps = np.diff(codes, prepend=np.uint8(0))
    starts = (np.cumsum(lengths) - lengths)[lengths > 0]
    steps[starts] = codes[starts]
    return steps


def sums(steps: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The codes that :func:`differences` came from."""
    total = np.cumsum(steps, dtype=np.uint8)
    before = np.r_[np.uint8(0), total][np.cumsum(lengths) - lengths]
    return total - np.repeat(before, lengths)
