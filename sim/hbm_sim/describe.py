"""What a workload or a log is like, before anything is decided on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from hbm_sim.node_spec import NodeSpec
from hbm_sim.optimum import RegimeOptimum, StaticOptimum, static_optimum
from hbm_sim.reuse import ReuseCurve, row_curve, user_curve
from hbm_sim.stream import Stream

COUNT_WINDOW_S: Final = 1.0
SHARES: Final = (0.001, 0.01, 0.1)


@dataclasses.dataclass(frozen=True)
class RegimeCharacter:
    """One regime of a stream."""

    regime: str
    requests: int
    per_s: float
    dispersion: float
    """Variance over mean of the arrivals per second: 1 for a Poisson process."""
    history_median: float
    history_p90: float
    revisit_share: float
    """Requests of users who were there before."""
    hot_user_share: float
    """Requests of the most active 1 % of the users."""
    row_shares: dict[str, float]
    """Of the sampled lookups, those of the most popular .1, 1 and 10 % of the sampled rows."""
    kv_reuse: ReuseCurve
    row_reuse: ReuseCurve
    optimum: RegimeOptimum


@dataclasses.dataclass(frozen=True)
class Description:
    """A whole stream on one node."""

    name: str
    requests: int
    duration_s: float
    fingerprint: str
    alpha: npt.NDArray[np.float64]
    regimes: tuple[RegimeCharacter, ...]
    pooled: RegimeOptimum
    shift: float
    """How far apart the regimes' α* (by mean service time) are."""
    plateau_shift: float
    """How far apart their plateaus are: 0 when some α is within 1 % of the best everywhere."""
    static_regret: float
    """Extra mean service time of the best single α over each regime's own, as a share: what
    free and instant moves could save at most."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return _plain(dataclasses.asdict(self))  # type: ignore[no-any-return]


def describe(
    stream: Stream,
    spec: NodeSpec,
    *,
    jobs: int = 1,
    fine: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Description:
    """Characterises a stream on a node: arrivals, users, rows, reuse, and α* per regime."""
    optimum = static_optimum(stream, spec, fine=fine, jobs=jobs, progress=progress)
    info = spec.info
    token_bytes = info.extent_bytes / (info.page_tokens * info.pages_per_extent)
    regimes = tuple(
        characterise(stream, each, token_bytes, info.classes[0].row_bytes)
        for each in optimum.regimes
    )
    alphas = [each.by_service.alpha for each in optimum.regimes]
    low = max(each.by_service.plateau_low for each in optimum.regimes)
    high = min(each.by_service.plateau_high for each in optimum.regimes)
    return Description(
        name=stream.name,
        requests=int(stream.counted.sum()),
        duration_s=float(stream.arrival_s[-1] - stream.arrival_s[stream.warm_up]),
        fingerprint=stream.fingerprint(),
        alpha=optimum.alpha,
        regimes=regimes,
        pooled=optimum.pooled,
        shift=max(alphas) - min(alphas),
        plateau_shift=max(0.0, low - high),
        static_regret=_static_regret(stream, optimum),
    )


def _static_regret(stream: Stream, optimum: StaticOptimum) -> float:
    weights = np.array([stream.of_regime(each.regime).sum() for each in optimum.regimes])
    curves = np.stack([each.mean_service_ms for each in optimum.regimes])
    own = float((weights * curves.min(axis=1)).sum())
    return float((weights[:, None] * curves).sum(axis=0).min()) / own - 1.0


def characterise(
    stream: Stream, optimum: RegimeOptimum, token_bytes: float, row_bytes: float
) -> RegimeCharacter:
    """One regime, its α* found already."""
    mask = stream.of_regime(optimum.regime, settled=False)
    arrivals = stream.arrival_s[mask]
    users = stream.user[mask]
    seen = np.zeros(len(stream), np.bool_)
    seen[np.unique(stream.user, return_index=True)[1]] = True
    counts = np.sort(np.unique(users, return_counts=True)[1])[::-1]
    hottest = counts[: max(1, len(counts) // 100)]
    return RegimeCharacter(
        regime=optimum.regime,
        requests=int(mask.sum()),
        per_s=_rate(arrivals),
        dispersion=_dispersion(arrivals),
        history_median=float(np.median(stream.tokens[mask])),
        history_p90=float(np.percentile(stream.tokens[mask], 90)),
        revisit_share=float((~seen[mask]).mean()),
        hot_user_share=float(hottest.sum() / len(users)),
        row_shares=_row_shares(stream, mask),
        kv_reuse=user_curve(stream, mask, token_bytes),
        row_reuse=row_curve(stream, mask, row_bytes),
        optimum=optimum,
    )


def _rate(arrivals: npt.NDArray[np.float64]) -> float:
    """Per second, over the time in which the regime was there (it may come more than once)."""
    gaps = np.diff(arrivals)
    if len(gaps) == 0:
        return 0.0
    present = gaps[gaps <= 20.0 * max(float(np.median(gaps)), 1e-9)]
    return float(1.0 / present.mean()) if len(present) and present.mean() > 0.0 else 0.0


def _dispersion(arrivals: npt.NDArray[np.float64]) -> float:
    """Windows at the edges of the regime are left out, and those between its stretches."""
    counts = np.bincount(((arrivals - arrivals[0]) / COUNT_WINDOW_S).astype(np.int64))
    there = counts > 0
    inner = there[1:-1] & there[:-2] & there[2:]
    whole = counts[1:-1][inner]
    return float(whole.var() / whole.mean()) if len(whole) > 1 else float("nan")


def _row_shares(stream: Stream, mask: npt.NDArray[np.bool_]) -> dict[str, float]:
    taken = np.repeat(mask, np.diff(stream.history_at))
    wanted = np.repeat(mask, np.diff(stream.candidate_at))
    rows = np.concatenate([stream.history_rows[taken], stream.candidate_rows[wanted]])
    counts = np.sort(np.bincount(rows, minlength=len(stream.row_keys)))[::-1]
    total = max(int(counts.sum()), 1)
    return {
        f"{share:.1%}": float(counts[: max(1, round(share * len(counts)))].sum() / total)
        for share in SHARES
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        if hasattr(value, "_asdict"):
            return _plain(value._asdict())
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value
