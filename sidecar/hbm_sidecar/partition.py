"""What the sidecar is asked to do, and who may say so.

A `Partition` is the whole wish: mode, bounds, α, SLO, tick, refill budget, price of moves. It comes
from one `PartitionSource`: `LocalPartition` (flags, then whatever was last PUT, kept in the run
directory), `DeclaredPartition` (a file that somebody else writes), or `ClusterPartition` (an object
of the Kubernetes API). A source with an `owner` answers PUT with a refusal that names it.
"""

from __future__ import annotations

import math
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Protocol

import numpy as np
import xxhash
from hbm_policy import MoveConfig
from hbm_pool.contracts.records import INTENT, Mode
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core.core_schema import ValidationInfo

from hbm_sidecar.artefact import Artefact, Verdict

PARTITION_FILE: Final = "partition.json"
MAX_PARTITION_BYTES: Final = 64 * 1024


class SidecarError(Exception):
    """Base of what the sidecar raises on purpose; the text says what to change."""


class PartitionRefused(SidecarError):
    """A partition that somebody else owns was to be changed here."""


class PartitionInvalid(SidecarError):
    """A partition file holds something that is no partition."""


class ModeName(StrEnum):
    """Names of `Mode` on the command line, in files and in PUT."""

    HOLD = "hold"
    AUTO = "auto"
    RECOMMEND = "recommend"
    FIXED = "fixed"

    @property
    def mode(self) -> Mode:
        """The mode as the control block carries it."""
        return Mode[self.name]


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class Partition(MoveConfig):
    """The wish. All fields are checked against each other; an error names the field."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
    )

    mode: Annotated[ModeName, BeforeValidator(_lower)] = Field(
        ModeName.AUTO,
        description="auto: decide and apply; recommend: decide, publish, do not apply; "
        "fixed: keep alpha_fixed; hold: leave α as it is.",
    )
    alpha_min: float = Field(0.1, ge=0.0, le=1.0, description="Lower bound of α.")
    alpha_max: float = Field(0.9, ge=0.0, le=1.0, description="Upper bound of α.")
    alpha_fixed: float | None = Field(
        None, ge=0.0, le=1.0, description="α of mode fixed; within the bounds."
    )
    alpha_initial: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="α for a server that has had no command yet. None: its own.",
    )
    slo_ms: float = Field(
        0.0, ge=0.0, le=3.6e6, description="Latency goal, ms. 0: the server's own."
    )
    tick_ms: float = Field(250.0, ge=20.0, le=60_000.0, description="Time between decisions, ms.")
    refill_bytes_per_s: float = Field(
        float(256 << 20),
        ge=0.0,
        le=1e12,
        description="Budget of the background copy into newly won extents. 0: no refill.",
    )

    @field_validator("alpha_max")
    @classmethod
    def _bounds_in_order(cls, value: float, info: ValidationInfo) -> float:
        low = info.data.get("alpha_min")
        if low is not None and value < low:
            raise ValueError(
                f"alpha_max is {value:g}, below alpha_min ({low:g}); swap or widen them"
            )
        return value

    @field_validator("alpha_fixed")
    @classmethod
    def _fixed_within_bounds(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is None:
            if info.data.get("mode") is ModeName.FIXED:
                raise ValueError(
                    "mode fixed needs alpha_fixed; set it to a value within the bounds"
                )
            return value
        low, high = info.data.get("alpha_min"), info.data.get("alpha_max")
        if low is not None and high is not None and not low <= value <= high:
            raise ValueError(
                f"alpha_fixed is {value:g}, outside [{low:g}, {high:g}]; "
                "choose a value within alpha_min and alpha_max"
            )
        return value

    def policy_hash(self) -> int:
        """XXH3-64 of the canonical JSON: equal wishes have equal hashes."""
        return xxhash.xxh3_64_intdigest(self.model_dump_json().encode())

    def fill_intent(
        self, record: np.ndarray, generation: int, monotonic_ns: int, residual_hash: int = 0
    ) -> None:
        """Write the wish into a record of dtype INTENT. `alpha_fixed` is NaN when there is none."""
        record["residual_hash"] = residual_hash
        record["monotonic_ns"] = monotonic_ns
        record["generation"] = generation
        record["mode"] = int(self.mode.mode)
        record["alpha_min"] = self.alpha_min
        record["alpha_max"] = self.alpha_max
        record["alpha_fixed"] = math.nan if self.alpha_fixed is None else self.alpha_fixed
        record["slo_ms"] = self.slo_ms
        record["tick_ms"] = self.tick_ms
        record["refill_bytes_per_s"] = self.refill_bytes_per_s
        initial = self.alpha_initial
        record["alpha_initial"] = math.nan if initial is None else initial
        for name in MoveConfig.model_fields:
            record[name] = getattr(self, name)
        record["policy_hash"] = self.policy_hash()


class PartitionChange(BaseModel):
    """Body of PUT /v1/partition: fields left out are as the sidecar was started."""

    model_config = ConfigDict(extra="forbid")

    mode: str | None = None
    alpha_min: float | None = None
    alpha_max: float | None = None
    alpha_fixed: float | None = None
    alpha_initial: float | None = None
    slo_ms: float | None = None
    tick_ms: float | None = None
    refill_bytes_per_s: float | None = None
    move_fraction: float | None = None
    slew_per_s: float | None = None
    min_change: float | None = None
    dwell_ms: float | None = None


def new_intent() -> np.ndarray:
    """One zeroed record of dtype INTENT, shape `()`."""
    return np.zeros((), dtype=INTENT)


def read_partition(path: Path) -> Partition:
    """The partition in a JSON file.

    Raises `FileNotFoundError`, or `PartitionInvalid` with the file, the field and the reason.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_PARTITION_BYTES + 1)
    if len(raw) > MAX_PARTITION_BYTES:
        raise PartitionInvalid(
            f"{path} is larger than {MAX_PARTITION_BYTES} bytes; no partition is"
        )
    try:
        return Partition.model_validate_json(raw)
    except ValidationError as error:
        raise PartitionInvalid(f"{path}: {first_error(error)}") from error


def first_error(error: ValidationError) -> str:
    """The first error of a validation as one line: `field: reason (got value)`."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "content"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{field}: {reason}"
    given = repr(first.get("input"))
    return f"{field}: {reason} (got {given[:60]})"


class PartitionSource(Protocol):
    """Where the wish comes from."""

    @property
    def owner(self) -> str | None:
        """Who else governs it, as named to the caller of PUT; None: PUT is welcome."""

    @property
    def problem(self) -> str | None:
        """Why the newest content is not in force; None when it is."""

    def current(self) -> Partition:
        """The wish in force."""

    residual_hash: int
    """The learned residual to use (`INTENT.residual_hash`); 0: none."""

    def poll(self) -> bool:
        """Look for news; True when anything of the wish has changed. Never raises for bad
        content."""

    def put(self, partition: Partition) -> None:
        """Replace the wish and keep it over restarts. Raises `PartitionRefused`."""

    def reset(self) -> None:
        """Back to the wish the sidecar was started with. Raises `PartitionRefused`."""


class _LocalResidual:
    """The learned residual of a flag, beside a wish from elsewhere."""

    def __init__(self, artefact: Artefact | None) -> None:
        self.residual_hash = 0
        self.residual_verdict = Verdict("", "")
        self._artefact = artefact
        self._look()

    def _look(self) -> bool:
        """True when another one is to be used."""
        if self._artefact is None:
            return False
        self.residual_verdict = self._artefact.look()
        before, self.residual_hash = self.residual_hash, self._artefact.hash
        return before != self.residual_hash


class LocalPartition(_LocalResidual):
    """Flags, overridden by what was last PUT; the latter is kept in the run directory."""

    owner: None = None

    def __init__(self, started: Partition, run_dir: Path, artefact: Artefact | None = None) -> None:
        super().__init__(artefact)
        self.started = started
        self.problem: str | None = None
        self._path = run_dir / PARTITION_FILE
        self._current = started
        try:
            self._current = read_partition(self._path)
        except FileNotFoundError:
            pass
        except (PartitionInvalid, OSError) as error:
            self.problem = f"kept partition ignored, flags are in force: {error}"

    def current(self) -> Partition:
        """The wish in force."""
        return self._current

    def poll(self) -> bool:
        """Nobody else writes here; only the residual's file may come or go."""
        return self._look()

    def put(self, partition: Partition) -> None:
        """Replace the wish; on return it is on disk. `OSError` when it cannot be kept."""
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with temporary.open("w") as file:
            file.write(partition.model_dump_json(indent=1))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._path)
        self._current, self.problem = partition, None

    def reset(self) -> None:
        """Forget what was PUT."""
        self._path.unlink(missing_ok=True)
        self._current, self.problem = self.started, None


class DeclaredPartition(_LocalResidual):
    """A file that somebody else writes (mounted, or managed by hand); PUT is refused.

    Looked at on every `poll`; content that is not a partition leaves the one before in force.
    """

    def __init__(self, started: Partition, path: Path, artefact: Artefact | None = None) -> None:
        super().__init__(artefact)
        self.started = started
        self.problem: str | None = None
        self._path = path
        self._current = started
        self._seen: tuple[int, int, int] | None = None
        self.poll()

    @property
    def owner(self) -> str:
        """The file, by name."""
        return f"policy file {self._path}"

    def current(self) -> Partition:
        """The wish in force."""
        return self._current

    def poll(self) -> bool:
        """Read the file again if it is another one, or changed, since the last look."""
        changed = self._look()
        try:
            status = self._path.stat()
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            if stamp == self._seen:
                return changed
            self._seen = stamp
            found = read_partition(self._path)
        except (PartitionInvalid, OSError) as error:
            self.problem = str(error)
            return changed
        changed |= found != self._current
        self._current, self.problem = found, None
        return changed

    def put(self, partition: Partition) -> None:
        """Always refused."""
        raise PartitionRefused(f"α is governed by {self.owner}; change it there")

    def reset(self) -> None:
        """Always refused."""
        raise PartitionRefused(f"α is governed by {self.owner}; change it there")
