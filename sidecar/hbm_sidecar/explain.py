"""Why the sidecar took its last decisions: from admin over its socket, else from the file."""

from __future__ import annotations

import datetime
import http.client
import json
import socket
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_policy import Reason, describe
from hbm_pool.contracts.control_block import ControlBlockError, ServerView, SidecarView
from hbm_pool.contracts.records import CURVES, TELEMETRY, Mode

from hbm_sidecar.artefact import read_status
from hbm_sidecar.config import ADMIN_SOCKET
from hbm_sidecar.contributions import layers, number, prices
from hbm_sidecar.partition import SidecarError

_TIMEOUT_S: Final = 2.0


class ExplainError(SidecarError):
    """There is nothing to explain from."""


class Explained(NamedTuple):
    """What `hbm explain` shows."""

    decisions: list[dict[str, Any]]  # oldest first
    policy: dict[str, Any]  # parameters of the decision by name; empty: no sidecar runs
    prices: dict[str, Any]  # what the twin prices with; empty: it has not said yet
    residual: dict[str, Any]  # what decide says of the learned residual


def explained(record: npt.NDArray[np.void], wall_offset_ns: int) -> dict[str, Any]:
    """One decision in words. `wall_offset_ns`: Unix time minus CLOCK_MONOTONIC."""
    reasons = int(record["reasons"])
    generation = int(record["generation"])
    mode = int(record["mode"])
    codes = reason_codes(reasons)
    when = (int(record["monotonic_ns"]) + wall_offset_ns) / 1e9
    return {
        "time": datetime.datetime.fromtimestamp(when, datetime.UTC).isoformat(
            timespec="milliseconds"
        ),
        "tick": int(record["tick"]),
        "generation": generation,
        "applied": generation > 0,
        "mode": Mode(mode).name.lower() if mode in Mode.__members__.values() else str(mode),
        "alpha": number(record["alpha"]),
        "anchor": number(record["anchor"]),
        "target": number(record["target"]),
        "gain": number(record["gain"]),
        "refill_bytes_per_s": number(record["refill_bytes_per_s"]),
        "reasons": codes,
        "text": "; ".join(describe(reasons)) or "nothing stands out",
        "latency_us": number(record["latency_us"]),
        "due_us": number(record["due_us"]),
        "layers": layers(record),
    }


def human_line(decision: dict[str, Any]) -> str:
    """One line: time, α, α̂, target, gain, reasons in words."""
    gain = decision["gain"]
    command = f"command {decision['generation']}" if decision["applied"] else "no command"
    return (
        f"{decision['time'][11:23]}Z {decision['mode']:<9} "
        f"α={_short(decision['alpha'])} α̂={_short(decision['anchor'])} "
        f"target={_short(decision['target'])} "
        f"gain={'-' if gain is None else f'{100 * gain:.2f}%'} "
        f"({command}, {_short(decision['latency_us'], 1)} µs): {decision['text']}"
    )


def reason_codes(reasons: int) -> list[str]:
    """Names of the bits that are set; an unknown bit is named by its number."""
    codes = []
    for bit in range(64):
        if reasons >> bit & 1:
            known = [reason.name for reason in Reason if reason.value == 1 << bit]
            codes.append(known[0] if known and known[0] else f"BIT_{bit}")
    return codes


def starts_move(record: npt.NDArray[np.void]) -> bool:
    """Whether a decision starts a move and commands it.

    One change of where α is to go is one move, however many ramp steps it takes.
    """
    return int(record["generation"]) > 0 and bool(int(record["reasons"]) & Reason.MOVE_STARTED)


def wall_offset_ns() -> int:
    """Unix time minus CLOCK_MONOTONIC, now."""
    return time.time_ns() - time.monotonic_ns()


def explain_view(view: SidecarView, last: int) -> list[dict[str, Any]]:
    """The last decisions of an open file, oldest first."""
    offset = wall_offset_ns()
    return [explained(record, offset) for record in view.read_decisions(last)]


def fetch_explained(run_dir: Path, last: int) -> Explained:
    """The last decisions: from admin, or where it does not answer from the file."""
    try:
        return _ask_admin(run_dir / ADMIN_SOCKET, last)
    except (OSError, http.client.HTTPException, ValueError):
        pass
    try:
        view = SidecarView.open(run_dir)
    except (ControlBlockError, OSError) as error:
        raise ExplainError(
            f"no sidecar answers in {run_dir} and its file cannot be read ({error}); "
            "is --run-dir that of the sidecar?"
        ) from error
    curves = np.zeros((), dtype=CURVES)
    view.read_curves(curves)
    return Explained(
        explain_view(view, last),
        {},
        prices(curves, _telemetry(run_dir)),
        read_status(run_dir),
    )


def _telemetry(run_dir: Path) -> npt.NDArray[np.void] | None:
    """The server's newest record; None when its file cannot be read."""
    telemetry = np.zeros((), dtype=TELEMETRY)
    try:
        ServerView.open(run_dir).read_telemetry(telemetry)
    except (ControlBlockError, OSError):
        return None
    return telemetry


def policy_line(policy: dict[str, Any]) -> str:
    """The parameters in one line."""
    return "policy: " + " ".join(f"{name}={value:g}" for name, value in policy.items())


def to_json(decisions: list[dict[str, Any]]) -> str:
    """A JSON array."""
    return json.dumps(decisions, ensure_ascii=False)


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout_s: float = _TIMEOUT_S) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _ask_admin(path: Path, last: int) -> Explained:
    connection = UnixConnection(path)
    try:
        connection.request("GET", f"/v1/explain?last={last}")
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise ValueError(f"admin answered {response.status}")
        answer = json.loads(body)
        return Explained(*(answer[name] for name in Explained._fields))
    finally:
        connection.close()


def _short(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
