"""Which of the sampled rows a lookup asks for, as popularity churns and shelves of new rows open.

Only rows of the hash sample are ever drawn: in n lookups the number of sampled ones is binomial
with the sample's share of the popularity, and each is drawn from the sampled rows in proportion.
That is the same in distribution as drawing all rows and throwing 99 % of them away.

Popularity and churn are those of the load generator (`hbm_load.popularity`): rank r has weight
(r + 1 + q)^-s, and after c changed ranks in all, rank r has moved to another row
floor((c + phase(r)) / rows) times.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Final, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from hbm_load.scenario import Items
from hbm_policy.twin_users import mix
from hbm_pool.contracts.identity import mix64_array, row_keys, sample_threshold

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_HEAD: Final = 100_000


class Popularity(NamedTuple):
    """Sampled rows and their share, as an alias table (Walker 1977; Vose's construction)."""

    mass: float  # share of all lookups that ask for a sampled row
    accept: Floats  # [S]
    alias: npt.NDArray[np.int32]  # [S]
    rows: npt.NDArray[np.int32]  # [S] number of the sampled row


class SampledRows:
    """The hash sample of one table, numbered by row id."""

    def __init__(self, rows: int, rate: float, unsampled_top: int, seed: int) -> None:
        self.rows = rows
        self.rate = rate
        self._top = unsampled_top if rate < 1.0 else 0
        self.ids: Ints = sampled_ids(rows, rate)
        # The row of a rank: an affine bijection, so that hot rows lie anywhere; other seeds make
        # other rows hot, since one draw of sampled rows proves little.
        multiplier = int(rows * 0.6180339887498949) | 1
        while math.gcd(multiplier, rows) != 1:
            multiplier += 2
        offset = int(np.random.default_rng([seed, 31]).integers(rows))
        inverse = pow(multiplier, -1, rows)
        self._place: Ints = (self.ids - offset) % rows * inverse % rows

    @property
    def keys(self) -> npt.NDArray[np.uint64]:
        """Row keys by number, `[S] uint64`."""
        return row_keys(0, self.ids)

    def catalogue(self, items: Items, churned: int) -> Popularity:
        """Popularity of the whole table after so many changed ranks."""
        weights: Floats = np.zeros(len(self.ids))
        total = zipf_mass(self.rows, items.zipf_s, items.zipf_q)
        step = self.rows // 3 + 1
        # Phases are below one round, so that no rank is more than one change ahead of another.
        for age in (churned // self.rows, churned // self.rows + 1):
            ranks = (self._place - age * step) % self.rows
            if churned:
                phase = (mix64_array(ranks.astype(np.uint64)) % np.uint64(self.rows)).astype(
                    np.int64
                )
                here = (churned + phase) // self.rows == age
                weights[here] += self._weight(ranks[here], items)
            elif age == 0:
                weights = self._weight(ranks, items)
        everything = self.rate >= 1.0
        mass = 1.0 if everything else float(weights.sum() / total)
        return alias_table(weights, np.arange(len(weights), dtype=np.int32), mass)

    def shelf(self, items: Items) -> Popularity:
        """Popularity on the shelf: the last rows of the table."""
        first = self.rows - items.new_items
        numbers = np.flatnonzero(self.ids >= first)
        weights = np.asarray((self.ids[numbers] - first + 1.0) ** -items.new_zipf_s, np.float64)
        total = zipf_mass(items.new_items, items.new_zipf_s, 0.0)
        mass = 1.0 if self.rate >= 1.0 else float(weights.sum() / total)
        return alias_table(weights, numbers.astype(np.int32), mass)

    def _weight(self, ranks: Ints, items: Items) -> Floats:
        weights = np.asarray((ranks + (1.0 + items.zipf_q)) ** -items.zipf_s, np.float64)
        weights[ranks < self._top] = 0.0
        return weights


@functools.lru_cache(maxsize=4)
def sampled_ids(rows: int, rate: float) -> Ints:
    """Ids of the rows of table 0 that a server of that rate samples (`identity.sampled`)."""
    if rate >= 1.0:
        return np.arange(rows, dtype=np.int64)
    found = np.empty(round(rows * rate + 8.0 * (rows * rate) ** 0.5 + 64), np.int64)
    return found[: _collect(rows, np.uint64(sample_threshold(rate)), found)].copy()


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _collect(rows: int, threshold: np.uint64, found: Ints) -> int:
    count = 0
    for row in range(rows):
        if mix(row) < threshold and count < found.size:
            found[count] = row
            count += 1
    return count


NOTHING: Final = Popularity(
    0.0, np.empty(0, np.float64), np.empty(0, np.int32), np.empty(0, np.int32)
)


def zipf_mass(n: int, s: float, q: float) -> float:
    """Sum over ranks 0..n-1 of (r + 1 + q)^-s: the head exactly, the tail by its integral."""
    head = min(n, _HEAD)
    total = float(((np.arange(head) + (1.0 + q)) ** -s).sum())
    if n > head:
        low, high = head + 0.5 + q, n + 0.5 + q
        power = 1.0 - s
        total += math.log(high / low) if abs(power) < 1e-12 else (high**power - low**power) / power
    return total


def alias_table(weights: Floats, rows: npt.NDArray[np.int32], mass: float) -> Popularity:
    """Table that draws `rows[i]` with probability proportional to `weights[i]`."""
    if len(weights) == 0 or not weights.sum() > 0.0:
        return NOTHING
    accept = weights * (len(weights) / weights.sum())
    alias = np.zeros(len(weights), np.int32)
    _settle(accept, alias, np.empty(len(weights), np.int64))
    return Popularity(mass, accept, alias, rows)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _settle(accept: Floats, alias: npt.NDArray[np.int32], stack: Ints) -> None:
    """Small places are filled up by large ones; one array holds both stacks, from its two ends."""
    small, large = 0, stack.size
    for i in range(accept.size):
        if accept[i] < 1.0:
            stack[small] = i
            small += 1
        else:
            large -= 1
            stack[large] = i
    while small > 0 and large < stack.size:
        small -= 1
        few = stack[small]
        many = stack[large]
        alias[few] = many
        accept[many] -= 1.0 - accept[few]
        if accept[many] < 1.0:
            large += 1
            stack[small] = many
            small += 1
    for i in range(small):
        accept[stack[i]] = 1.0
    for i in range(large, stack.size):
        accept[stack[i]] = 1.0


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def uniform(seed: Any, counter: Any) -> float:
    """A number in [0, 1) by its place in a sequence (splitmix64), so that order changes nothing."""
    mixed = np.uint64(seed) + np.uint64(counter) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return np.float64(mixed >> np.uint64(11)) * (1.0 / 9007199254740992.0)
