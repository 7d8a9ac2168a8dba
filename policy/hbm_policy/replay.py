"""A log of decisions that can be decided again, bit for bit.

Lines of JSON. A `start` line holds the parameters, which residual was in use and the whole state;
each line after it one reading and what was decided. Floats are written so that they read back to
the same bits, NaN and infinities as Python's JSON has them. A curve is written once and then
referred to: it is most of a reading and changes every few ticks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple
from zlib import crc32

from hbm_policy.config import PolicyConfig
from hbm_policy.decide import Policy
from hbm_policy.layers import Residual
from hbm_policy.reading import Curve, Decision, PolicyState, Reading, Traffic

LOG_VERSION: Final = 1
_CURVE_AT: Final = Reading._fields.index("curve")
_TRAFFIC_AT: Final = Reading._fields.index("traffic")
_STATE_AT: Final = Decision._fields.index("state")
_SAID: Final = tuple(name for name in Decision._fields if name != "state")


class ReplayError(ValueError):
    """A log that cannot be replayed; the text says where and why."""


class Recorder:
    """Turns decisions into lines."""

    def __init__(self) -> None:
        self._curve: Curve | None = None

    def start(self, config: PolicyConfig, residual: str, state: PolicyState) -> str:
        """The line that others follow. `residual`: first digits of its hash, empty for none."""
        self._curve = None
        return _line(
            {
                "start": LOG_VERSION,
                "policy": config.model_dump(mode="json"),
                "residual": residual,
                "reading": Reading._fields,
                "traffic": Traffic._fields,
                "curve": Curve._fields,
                "decision": _SAID,
                "state": state._asdict(),
            }
        )

    def tick(self, reading: Reading, decision: Decision) -> str:
        """One decision. The state that it leaves is in it as a checksum: replaying makes it."""
        seen: list[Any] = list(reading)
        said: list[Any] = list(decision)
        said[_STATE_AT : _STATE_AT + 1] = []
        line = {"reading": seen, "decision": said, "state": checksum(decision.state)}
        if reading.curve == self._curve:
            seen[_CURVE_AT] = reading.curve is not None
        else:
            self._curve = reading.curve
        return _line(line)


class Difference(NamedTuple):
    """Where a replay and its log part."""

    line: int  # of the log, from 1
    field: str  # of Decision
    recorded: object
    replayed: object


class Outcome(NamedTuple):
    """What a replay found."""

    decisions: int  # that were decided again and are the same
    difference: Difference | None


def checksum(state: PolicyState) -> int:
    """CRC-32 of a state, every bit of its numbers included."""
    return crc32(repr(state).encode())


def replay(lines: Iterable[str], residuals: Path | None = None) -> Outcome:
    """Decides a log again, up to the first difference.

    `residuals`: directory of `residual-HASH.onnx`, for logs in which one had a say.
    Raises ReplayError for a line that is no part of a log of this version.
    """
    policy, state, curve = Policy(), PolicyState(), None
    count, started = 0, False
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            # The process was killed while it wrote.
            break
        found = _parse(line, number)
        if "start" in found:
            policy, state = _begin(found, number, residuals)
            curve, started = None, True
            continue
        if not started:
            raise ReplayError(f"line {number}: the log does not begin with a start line")
        try:
            reading, curve = _reading(found["reading"], curve)
            recorded = _tuples(found["decision"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ReplayError(f"line {number} is no decision ({error!r})") from error
        decision = policy.decide(reading, state)
        difference = _compare(decision, recorded, found.get("state"), number)
        if difference is not None:
            return Outcome(count, difference)
        state = decision.state
        count += 1
    if not started:
        raise ReplayError("the log is empty: it has no start line")
    return Outcome(count, None)


def _begin(
    found: dict[str, Any], number: int, residuals: Path | None
) -> tuple[Policy, PolicyState]:
    if found["start"] != LOG_VERSION:
        raise ReplayError(
            f"line {number}: a log of version {found['start']}, this program replays {LOG_VERSION}"
        )
    for name, fields in (
        ("reading", Reading._fields),
        ("traffic", Traffic._fields),
        ("curve", Curve._fields),
        ("decision", _SAID),
    ):
        if tuple(found.get(name, ())) != fields:
            raise ReplayError(
                f"line {number}: the fields of a {name} are not those of this program; replay it "
                "with the version that wrote it"
            )
    try:
        config = PolicyConfig.model_validate(found["policy"])
        state = PolicyState(**{name: _tuples(value) for name, value in found["state"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ReplayError(f"line {number} is no start line ({reason})") from error
    return Policy(config, residual=_residual(str(found.get("residual", "")), residuals)), state


def _residual(digits: str, residuals: Path | None) -> Residual | None:
    if not digits:
        return None
    from hbm_policy.onnx_residual import OnnxResidual, ResidualError

    if residuals is None:
        raise ReplayError(
            f"a residual with hash {digits}… had a say; name the directory with its file"
        )
    try:
        return OnnxResidual(residuals / f"residual-{digits}.onnx", digits)
    except ResidualError as error:
        raise ReplayError(f"{error} (in {residuals})") from error


def _reading(values: list[Any], curve: Curve | None) -> tuple[Reading, Curve | None]:
    seen = list(values)
    written = seen[_CURVE_AT]
    if written is False:
        curve = None
    elif written is not True:
        curve = None if written is None else Curve(*_tuples(written))
    seen[_CURVE_AT] = curve
    seen[_TRAFFIC_AT] = Traffic(*seen[_TRAFFIC_AT])
    return Reading(*seen), curve


def _compare(
    decision: Decision, recorded: tuple[Any, ...], state: object, number: int
) -> Difference | None:
    said = [value for name, value in decision._asdict().items() if name != "state"]
    for name, ours, theirs in _paired(said, recorded):
        if not _same(ours, theirs):
            return Difference(number, name, theirs, ours)
    if checksum(decision.state) != state:
        return Difference(number, "state", state, checksum(decision.state))
    return None


def _paired(said: list[Any], recorded: tuple[Any, ...]) -> Iterator[tuple[str, Any, Any]]:
    for name, ours, theirs in zip(_SAID, said, recorded, strict=True):
        if isinstance(ours, tuple) and hasattr(ours, "_fields"):
            for inner, mine, written in zip(ours._fields, ours, theirs, strict=True):
                yield f"{name}.{inner}", mine, written
        else:
            yield name, ours, theirs


def _same(ours: object, theirs: object) -> bool:
    """Equal to the bit, but that all NaN are one."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, float) and isinstance(theirs, float):
        if math.isnan(ours):
            return math.isnan(theirs)
        return ours == theirs and math.copysign(1.0, ours) == math.copysign(1.0, theirs)
    return ours == theirs


def _parse(line: str, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ReplayError(f"line {number} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ReplayError(f"line {number} is no object")
    return found


def _tuples(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":")) + "\n"
