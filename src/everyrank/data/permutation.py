"""The global permutation: one permutation of all samples for each (seed, epoch), computed position by position.

A permutation is usually a list that is shuffled, which costs time and memory in proportion to the number of samples on
every rank. Here it is a *function*: a keyed Feistel network over a domain slightly larger than the number of samples,
with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). Any position can be asked
for on its own, an epoch over 10^12 samples starts as fast as one over 10^3, and two ranks never need to talk to agree.

It is a shuffle for training, not a cipher: the statistical tests in ``tests/data`` are what it is held to.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from everyrank.errors import DataError

Indices = npt.NDArray[np.int64]
_Numbers = npt.NDArray[np.uint64]

# The order of a (seed, epoch, num_samples) is part of every checkpoint's meaning: change this only with a new version.
PERMUTATION_VERSION = 1
MAX_NUM_SAMPLES = 2**62

# Multipliers of the 64-bit finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014; variant 13 of D. Stafford).
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
# Rounds below and from this size on. Few samples leave little room for each round to stir, so they get more of them:
# 32 rounds bring four samples within 1e-6, and five or six within 1e-4, of all permutations being equally likely.
_FEW_SAMPLES = 4096
_NUM_ROUNDS_FEW = 32
_NUM_ROUNDS_MANY = 8
# Positions worked on at a time: the temporary arrays stay in the processor's cache and memory stays constant.
_BLOCK = 8192


class GlobalPermutation:
    """A permutation of ``0 .. num_samples - 1`` for every epoch, in constant time and memory per position.

    The permutation depends on ``(seed, epoch, num_samples)`` alone: not on the platform, the library versions, the rank
    or the world size.

    Args:
        num_samples: Number of samples, 1 to 2**62.
        seed: Any integer. Different seeds give unrelated orders.
        shuffle: If false, every epoch has the order 0, 1, 2, ...

    Raises:
        DataError: If ``num_samples`` is out of range.

    Example:
        >>> permutation = GlobalPermutation(10**12, seed=7)
        >>> 0 <= permutation.index(epoch=3, position=999_999_999_999) < 10**12
        True
    """

    def __init__(self, num_samples: int, seed: int = 0, shuffle: bool = True) -> None:
        if not 1 <= num_samples <= MAX_NUM_SAMPLES:
            raise DataError(
                f"num_samples={num_samples} was given for the permutation, but it must be between 1 and 2**62. "
                "Give the length of the dataset; if the dataset is empty, look at how its files or filters are set."
            )
        self.num_samples = int(num_samples)
        self.seed = int(seed)
        self.shuffle = bool(shuffle)
        # The Feistel network works on pairs (left, right) of the domain left_size x right_size, just above num_samples.
        # One side is even, because additions modulo two odd numbers could only ever make even permutations.
        left_size = math.isqrt(self.num_samples - 1) + 1
        self._left_size = left_size + left_size % 2
        self._right_size = -(-self.num_samples // self._left_size)

    def __repr__(self) -> str:
        return f"GlobalPermutation(num_samples={self.num_samples}, seed={self.seed}, shuffle={self.shuffle})"

    def index(self, epoch: int, position: int) -> int:
        """Return the sample at one position.

        Args:
            epoch: Number of the epoch, any integer.
            position: Position in the epoch, 0 to ``num_samples`` - 1.

        Raises:
            IndexError: If the position is outside the epoch.
        """
        return int(self.indices(epoch, position, position + 1)[0])

    def indices(self, epoch: int, start: int, stop: int) -> Indices:
        """Return the samples at positions ``start`` to ``stop`` - 1, many at a time.

        Args:
            epoch: Number of the epoch, any integer.
            start: First position.
            stop: One past the last position, at most ``num_samples``.

        Returns:
            Array of shape ``(stop - start,)`` and type int64.

        Raises:
            IndexError: If a position is outside the epoch.
        """
        if not 0 <= start <= stop <= self.num_samples:
            raise IndexError(f"positions {start} to {stop} are not within an epoch of {self.num_samples} samples")
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        keys = _round_keys(self.num_samples, self.seed, epoch)
        domain = self._left_size * self._right_size
        if domain <= min(_BLOCK, 2 * (stop - start)):
            # An epoch of few samples: what lies outside is then looked up, and need not be encrypted again.
            images = self._encrypt(np.arange(domain, dtype=np.uint64), keys)
            return self._walk(images[start:stop].copy(), lambda values: images[values]).astype(np.int64)
        out = np.empty(stop - start, dtype=np.int64)
        for begin in range(start, stop, _BLOCK):
            end = min(begin + _BLOCK, stop)
            values = self._encrypt(np.arange(begin, end, dtype=np.uint64), keys)
            # below 2**62, so the cast to int64 is exact
            out[begin - start : end - start] = self._walk(values, lambda values: self._encrypt(values, keys))
        return out

    def _walk(self, values: _Numbers, encrypt: Callable[[_Numbers], _Numbers]) -> _Numbers:
        """Encrypt again, in place, what is no sample's number, until it is one."""
        outside = np.flatnonzero(values >= np.uint64(self.num_samples))
        while outside.size:
            values[outside] = encrypt(values[outside])
            outside = outside[values[outside] >= np.uint64(self.num_samples)]
        return values

    def _encrypt(self, values: _Numbers, keys: tuple[int, ...]) -> _Numbers:
        left_size, right_size = np.uint64(self._left_size), np.uint64(self._right_size)
        left, right = np.divmod(values, right_size)
        for number in range(0, len(keys), 4):
            left += _mix(right, keys[number], keys[number + 1])
            left %= left_size
            right += _mix(left, keys[number + 2], keys[number + 3])
            right %= right_size
        left *= right_size
        left += right
        return left


@functools.lru_cache(maxsize=32)
def _round_keys(num_samples: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return two 64-bit keys a round, from SHAKE-256 of everything the order depends on."""
    num_rounds = _NUM_ROUNDS_FEW if num_samples < _FEW_SAMPLES else _NUM_ROUNDS_MANY
    message = f"everyrank order {PERMUTATION_VERSION}: {num_samples} samples, seed {seed}, epoch {epoch}"
    digest = hashlib.shake_256(message.encode()).digest(16 * num_rounds)
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def _mix(values: _Numbers, key: int, key_2: int) -> _Numbers:
    """Hash each element to 63 bits; the sum with the other half then never leaves 64 bits."""
    mixed = values ^ np.uint64(key)
    mixed *= np.uint64(_MULTIPLIER_1)
    mixed ^= (mixed >> np.uint64(32)) ^ np.uint64(key_2)
    mixed *= np.uint64(_MULTIPLIER_2)
    mixed ^= mixed >> np.uint64(29)
    mixed >>= np.uint64(1)
    return mixed
