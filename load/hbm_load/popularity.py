"""Zipf-Mandelbrot ranks over catalogues of any size, and which item holds a rank right now."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.identity import mix64_array


class ZipfMandelbrot:
    """Draws ranks 0 to n - 1 with probability proportional to (rank + 1 + q)^-s.

    Rejection-inversion (Hoermann and Derflinger, ACM TOMACS 1996) with the shift q of Mandelbrot:
    exact, O(1) memory, so that 5e7 items need no table. `s = 0` is uniform.
    """

    def __init__(self, n: int, s: float, q: float = 0.0) -> None:
        if n < 1:
            raise ValueError(f"a popularity needs at least one item, got {n}")
        self.n, self.s, self.q = n, s, q
        first = np.array([1.0])
        self._low = float(self._integral(first + 0.5)[0] - self._density(first)[0])
        self._high = float(self._integral(np.array([n + 0.5]))[0])

    def draw(self, random: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        """`count` ranks, `[count] int64`."""
        ranks = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            need = count - filled
            area = self._high + random.random(need) * (self._low - self._high)
            k = np.clip(np.floor(self._inverse(area) + 0.5), 1, self.n)
            accepted = k[area >= self._integral(k + 0.5) - self._density(k)]
            ranks[filled : filled + len(accepted)] = accepted.astype(np.int64) - 1
            filled += len(accepted)
        return ranks

    def _density(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.exp(-self.s * np.log(x + self.q))

    def _integral(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        power = 1.0 - self.s
        logarithm = np.log(x + self.q)
        return logarithm if abs(power) < 1e-9 else np.expm1(power * logarithm) / power

    def _inverse(self, area: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        power = 1.0 - self.s
        if abs(power) < 1e-9:
            return np.exp(area) - self.q
        return np.exp(np.log1p(np.maximum(area * power, -1.0 + 1e-15)) / power) - self.q


class RankedItems(NamedTuple):
    """Which item holds a rank, as popularity churns: a permutation that is replaced rank by rank.

    After `churned` rank changes in all, rank r has changed floor((churned + phase(r)) / n) times,
    with phases spread evenly. Two ranks of different age may fall on one item; with n ranks that
    is rare enough to leave the popularity as it is.
    """

    first: int
    """Lowest item id of this population."""
    n: int
    multiplier: int
    offset: int

    @classmethod
    def over(cls, first: int, n: int, salt: int) -> RankedItems:
        """`n` items from id `first` on; `salt` chooses the permutation."""
        random = np.random.default_rng([salt & 0x7FFFFFFF, n])
        multiplier = int(n * 0.6180339887498949) | 1
        while math.gcd(multiplier, n) != 1:
            multiplier += 2
        return cls(first, n, multiplier % n if n > 1 else 0, int(random.integers(n)))

    def items(
        self, ranks: npt.NDArray[np.int64], churned: int | npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Item ids of the ranks, `[n] int64 -> [n] int64`; `churned` may differ per rank."""
        slots = ranks
        if np.any(churned):
            phase = (mix64_array(ranks.astype(np.uint64)) % np.uint64(self.n)).astype(np.int64)
            age = (churned + phase) // self.n
            slots = (ranks + age * (self.n // 3 + 1)) % self.n
        return _multiply_mod(slots, self.multiplier, self.offset, self.n) + self.first


def _multiply_mod(
    values: npt.NDArray[np.int64], multiplier: int, offset: int, modulus: int
) -> npt.NDArray[np.int64]:
    """(values * multiplier + offset) mod modulus without overflow for a modulus below 2^40."""
    high, low = multiplier >> 20, multiplier & 0xFFFFF
    partial = (values * high % modulus) * (1 << 20) % modulus
    return (partial + values * low % modulus + offset) % modulus
