"""How long a history is, when nobody says so: what is remembered per user, and a regression.

The router never parses bodies. The length of the history and the number of candidates come from,
in this order (the word in brackets is `source` in X-HBM-Decision):

1. the request headers X-HBM-History-Tokens and X-HBM-Candidates (`header`),
2. what the server said about this user's last request (`memory`; bounded, least recently used out),
3. a line fitted through (Content-Length, history tokens) of recent responses (`regression`),
4. the mean of recent responses, for chunked bodies (`mean`), or nothing at all (`none`).
"""

from __future__ import annotations

from typing import Final, NamedTuple

MAX_SHARDS: Final = 64


class Remembered(NamedTuple):
    """What a user's last response said."""

    history_tokens: int
    candidates: int
    shards: tuple[int, ...]
    """The user's most used EMB shards, most first; empty when nobody told."""


class UserMemory:
    """Bounded map user -> `Remembered`; the user not seen for longest leaves first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._users: dict[int, Remembered] = {}

    def __len__(self) -> int:
        return len(self._users)

    def get(self, user: int) -> Remembered | None:
        """What is known of the user; reading counts as use."""
        found = self._users.pop(user, None)
        if found is not None:
            self._users[user] = found
        return found

    def put(self, user: int, remembered: Remembered) -> None:
        """Replaces what is known of the user."""
        if self._capacity == 0:
            return
        self._users.pop(user, None)
        self._users[user] = remembered
        if len(self._users) > self._capacity:
            del self._users[next(iter(self._users))]


class LengthRegression:
    """Least squares with forgetting: history tokens = intercept + slope * Content-Length.

    Weights fall by `decay` per observation (0.995: about the last 200 count). Too few or too
    similar sizes give the mean. Predictions lie within the lengths seen so far.
    """

    def __init__(self, decay: float = 0.995) -> None:
        self._decay = decay
        self._weight = 0.0
        self._x = 0.0
        self._y = 0.0
        self._xx = 0.0
        self._xy = 0.0
        self._candidates = 0.0
        self._longest = 0

    @property
    def ready(self) -> bool:
        """Whether anything has been observed."""
        return self._weight > 0.0

    def observe(self, content_length: int | None, history_tokens: int, candidates: int) -> None:
        """One response that told its true length."""
        if content_length is None:
            return
        decay, x, y = self._decay, float(content_length), float(history_tokens)
        # Sums about the mean of x would be more exact; sizes below 2^28 leave doubles room enough.
        self._weight = self._weight * decay + 1.0
        self._x = self._x * decay + x
        self._y = self._y * decay + y
        self._xx = self._xx * decay + x * x
        self._xy = self._xy * decay + x * y
        self._candidates = self._candidates * decay + candidates
        self._longest = max(self._longest, history_tokens)

    def tokens(self, content_length: int) -> int:
        """Expected history tokens of a body of this size."""
        if not self.ready:
            return 0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        if variance <= 1e-9 * mean_x * mean_x + 1e-9:
            return round(mean_y)
        slope = (self._xy / self._weight - mean_x * mean_y) / variance
        expected = mean_y + slope * (content_length - mean_x)
        return round(min(max(expected, 0.0), float(self._longest)))

    def mean_tokens(self) -> int:
        """Mean history length of recent responses."""
        return round(self._y / self._weight) if self.ready else 0

    def mean_candidates(self) -> int:
        """Mean number of candidates of recent responses."""
        return round(self._candidates / self._weight) if self.ready else 0


class Speculation(NamedTuple):
    """Where a user was sent lately."""

    node: str
    tokens: int
    until_s: float


class SpeculativeResidency:
    """Users count as resident where they were just sent, before any digest can say so.

    Without it a burst of one user's requests inside one digest period would spread over the
    fleet, and each node would compute the same history. Entries expire after `ttl_s`, which is
    also when the digest has long had its say; they are kept in order of expiry, so that purging
    costs O(1) per entry.
    """

    def __init__(self, ttl_s: float, capacity: int = 100_000) -> None:
        self._ttl_s = ttl_s
        self._capacity = capacity
        self._users: dict[int, Speculation] = {}

    def __len__(self) -> int:
        return len(self._users)

    def get(self, key: int, now_s: float) -> Speculation | None:
        """The entry of a digest key while it is valid."""
        found = self._users.get(key)
        return found if found is not None and found.until_s > now_s else None

    def put(self, key: int, node: str, tokens: int, now_s: float) -> None:
        """The user has been sent to `node` with `tokens` of history."""
        if self._ttl_s == 0:
            return
        users = self._users
        users.pop(key, None)
        users[key] = Speculation(node, tokens, now_s + self._ttl_s)
        purged = 0
        while users and purged < 4:
            oldest = next(iter(users))
            if users[oldest].until_s > now_s and len(users) <= self._capacity:
                break
            del users[oldest]
            purged += 1

    def drop(self, key: int, node: str) -> None:
        """It did not come to pass there."""
        found = self._users.get(key)
        if found is not None and found.node == node:
            del self._users[key]
