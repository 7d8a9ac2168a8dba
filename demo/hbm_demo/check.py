"""`python -m hbm_demo.check SUMMARY`: what must hold of a demo, whatever the machine's speed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

MAX_ANCHOR_DISTANCE: Final = 0.1
MIN_SHIFT: Final = 0.2
_FIELDS: Final = (
    *("requests", "errors", "dropped", "mismatched_scores", "integrity_violations", "arms"),
    *("alpha", "refill_bytes", "decision_us", "evictions", "alpha_star", "alpha_star_shift"),
    *("versions", "seed"),
)
_REGIME_FIELDS: Final = (
    *("n", "p50_ms", "slo_attainment", "kv_hit_rate", "emb_hit_rate", "mean_alpha", "overlap"),
)


def problems(summary: dict[str, Any]) -> Iterator[str]:
    """What does not hold, one sentence each."""
    missing = [name for name in _FIELDS if name not in summary]
    if missing:
        yield f"fields are missing: {', '.join(missing)}"
        return
    for name in ("errors", "dropped", "mismatched_scores", "integrity_violations"):
        if summary[name] != 0:
            yield f"{name} is {summary[name]}, must be 0"
    if summary["requests"] == 0:
        yield "no request was sent"
    if summary.get("checked_scores", 0) == 0:
        yield "no score was checked"
    for name, arm in summary["arms"].items():
        for label, regime in arm["regimes"].items():
            yield from _regime_problems(f"{name}/{label}", regime)
    for side, evicted in summary["evictions"].items():
        if not evicted > 0:
            yield f"nothing was evicted: {side} is {evicted}"
    for way in ("moves_up", "moves_down"):
        if not summary["alpha"][way] > 0:
            yield f"α never moved that way: {way} is {summary['alpha'][way]}"
    shift = summary["alpha_star_shift"]
    if shift is None or shift < MIN_SHIFT:
        yield f"α* shifts by {shift} between regimes, less than {MIN_SHIFT}"
    for label, found in summary["alpha_star"].items():
        # Where the curve is flat, an α̂ on its plateau is as good as α* (docs/demo.md).
        distance = found["distance"]
        if distance is None or distance > MAX_ANCHOR_DISTANCE:
            yield (
                f"{label}: the settled α̂ {found['alpha_hat']} is {distance} from α* "
                f"{found['alpha_star']}, more than {MAX_ANCHOR_DISTANCE}"
            )


def _regime_problems(where: str, regime: dict[str, Any]) -> Iterator[str]:
    missing = [name for name in _REGIME_FIELDS if regime.get(name) is None]
    if missing:
        yield f"{where}: without {', '.join(missing)}"
        return
    tail = "p99_ms" if regime["n"] >= 1000 else "p95_ms"
    if regime.get(tail) is None:
        yield f"{where}: n is {regime['n']}, so {tail} is expected"


def main(arguments: list[str]) -> int:
    """Prints every problem; 0 when there is none."""
    if len(arguments) != 1:
        print("usage: python -m hbm_demo.check SUMMARY.json", file=sys.stderr)
        return 2
    try:
        summary = json.loads(Path(arguments[0]).read_text())
    except (OSError, ValueError) as error:
        print(f"{arguments[0]}: {error}", file=sys.stderr)
        return 2
    found = list(problems(summary))
    for problem in found:
        print(f"{arguments[0]}: {problem}", file=sys.stderr)
    if not found:
        print(f"{arguments[0]}: all of it holds")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
