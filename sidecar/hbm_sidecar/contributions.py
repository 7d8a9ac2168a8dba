"""What each layer added to a decision, in numbers and in words.

Layers in the order in which they speak: prices (adapter), anchor (twin), gate, residual, shield.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from hbm_policy import Phase, PriceState, Reason, describe
from hbm_pool.contracts.records import MAX_CLASSES

_PHASES: Final = {int(phase): phase.name.lower() for phase in Phase}
_STATES: Final = {
    int(PriceState.DECLARED): "as the server declares them",
    int(PriceState.LEARNED): "learned from measured batches",
    int(PriceState.HELD): "as learned, held while the burst gate is open",
}
_PRICES: Final = ("fixed_ms", "token_ms", "token_context_ms")
_SHIELD: Final = int(
    Reason.SMALL_GAIN
    | Reason.SMALL_CHANGE
    | Reason.DWELL
    | Reason.MOVE_STARTED
    | Reason.RAMPING
    | Reason.MOVE_FINISHED
    | Reason.MOVE_STOPPED
    | Reason.BOUNDED
    | Reason.SERVER_MOVING
    | Reason.SERVER_LIMITED
    | Reason.GATE_BARRED
    | Reason.RESIDUAL_WAITS
    | Reason.DROPPING
)
_ANCHOR: Final = int(
    Reason.CURVES_MISSING
    | Reason.CURVES_STALE
    | Reason.CURVES_INVALID
    | Reason.TWIN_COLD
    | Reason.ANCHOR_MOVED
    | Reason.ANCHOR_KEPT
)


def number(value: Any) -> float | None:
    """None for NaN and infinities: JSON has neither."""
    found = float(value)
    return found if math.isfinite(found) else None


def layers(record: npt.NDArray[np.void]) -> dict[str, dict[str, Any]]:
    """The layers of one decision, `()` of dtype DECISION; unknown numbers are None."""
    reasons = int(record["reasons"])
    phase = int(record["gate_phase"])
    wish, target = number(record["wish"]), number(record["target"])
    return {
        "anchor": {
            "anchor": number(record["anchor"]),
            "gain": number(record["gain"]),
            "text": _words(reasons & _ANCHOR),
        },
        "gate": {
            "phase": _PHASES.get(phase, str(phase)),
            "cost": number(record["gate_cost"]),
            "arrivals": number(record["gate_arrivals"]),
        },
        "residual": {
            "shift": number(record["shift"]),
            "fraction_scale": number(record["fraction_scale"]),
            "asked": bool(reasons & (Reason.RESIDUAL | Reason.RESIDUAL_INVALID)),
            "text": _words(reasons & int(Reason.RESIDUAL_WAITS | Reason.RESIDUAL_INVALID)),
        },
        "shield": {
            "wish": wish,
            "goal": number(record["goal"]),
            "target": target,
            "cut": None if wish is None or target is None else target - wish,
            "slew_scale": number(record["slew_scale"]),
            "text": _words(reasons & _SHIELD),
        },
    }


def prices(
    curves: npt.NDArray[np.void] | None, telemetry: npt.NDArray[np.void] | None
) -> dict[str, Any]:
    """What the twin prices with beside what the server declares; empty before either spoke.

    Args: records of dtype CURVES and TELEMETRY, `()`.
    """
    if curves is None or int(curves["monotonic_ns"]) == 0:
        return {}
    rows = curves["price_row_ms"].tolist()
    used = {name: float(curves[f"price_{name}"]) for name in _PRICES}
    used |= {f"row_{index}_ms": rows[index] for index in range(MAX_CLASSES)}
    declared: dict[str, float] = {}
    if telemetry is not None and int(telemetry["monotonic_ns"]) > 0:
        declared = {name: float(telemetry[f"cost_{name}"]) for name in _PRICES}
        rows = telemetry["cost_row_ms"].tolist()
        declared |= {f"row_{index}_ms": rows[index] for index in range(MAX_CLASSES)}
    state = int(curves["price_state"])
    return {
        "text": _STATES.get(state, f"unknown state {state}"),
        "batches": int(curves["price_batches"]),
        "constants": {
            name: {"used": number(value), "declared": number(declared.get(name, math.nan))}
            for name, value in used.items()
            if value > 0.0 or declared.get(name, 0.0) > 0.0
        },
    }


def block(decision: dict[str, Any], priced: dict[str, Any], residual: dict[str, Any]) -> list[str]:
    """Lines that say of one explained decision what each layer added."""
    found = decision["layers"]
    anchor, gate, learned, shield = (
        found[name] for name in ("anchor", "gate", "residual", "shield")
    )
    lines = [f"layers of tick {decision['tick']}:"]
    if priced:
        factors = ", ".join(
            _price(name.removesuffix("_ms").replace("_", " "), **pair)
            for name, pair in priced["constants"].items()
        )
        lines.append(f"  prices    {priced['text']} ({priced['batches']} batches); ms: {factors}")
    gain = anchor["gain"]
    saving = "" if not gain else f", {100 * gain:.2f}% cheaper than α {_of(decision['alpha'])}"
    lines.append(f"  anchor    α̂ {_of(anchor['anchor'])}{saving}: {anchor['text']}")
    lines.append(
        f"  gate      {gate['phase']}; evidence of another cost {_of(gate['cost'], 2)}, of other "
        f"arrivals {_of(gate['arrivals'], 2)} (opens at ±1)"
    )
    lines.append(f"  residual  {_residual(learned, residual)}")
    cut = "" if shield["cut"] is None else f" ({shield['cut']:+.3f} of the wish)"
    lines.append(
        f"  shield    wish {_of(shield['wish'])} -> move to {_of(shield['goal'])}, speed "
        f"x{_of(shield['slew_scale'], 2)}, command {_of(shield['target'])}{cut}: {shield['text']}"
    )
    return lines


def _residual(learned: dict[str, Any], status: dict[str, Any]) -> str:
    if not learned["asked"]:
        return status.get("why") or status.get("how") or "none"
    shift = "-" if learned["shift"] is None else f"{learned['shift']:+.4f}"
    words = f"shift {shift}, part of the way x{_of(learned['fraction_scale'], 2)}"
    return words + ("" if learned["text"] == "nothing" else f": {learned['text']}")


def _price(name: str, used: float | None, declared: float | None) -> str:
    text = f"{name} {'-' if used is None else f'{used:.3g}'}"
    if used is None or not declared:
        return text
    return f"{text} (x{used / declared:.2f} of declared)"


def _words(reasons: int) -> str:
    return "; ".join(describe(reasons)) or "nothing"


def _of(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
