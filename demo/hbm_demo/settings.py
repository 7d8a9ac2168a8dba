"""What a demo is told, checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

Device = Literal["auto", "cpu", "cuda"]

DEFAULT_SECONDS: Final = 210.0
MODEL_PRESET: Final = "demo"
ALPHA_START: Final = 0.5
TRACE_RATE_PER_S: Final = 72.0
"""Two nodes on two cores can serve this much of a log."""


class DemoSettings(BaseModel):
    """Flags of `hbm demo`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float = Field(DEFAULT_SECONDS, ge=6.0, le=86_400.0, allow_inf_nan=False)
    """Length of all load together, s; the arms share it equally."""
    nodes: int = Field(2, ge=1, le=16)
    device: Device = "auto"
    scenario: str = "demo"
    trace: Path | None = None
    columns: str = "time,user,items"
    rate: float = Field(TRACE_RATE_PER_S, ge=0.1, le=100_000.0, allow_inf_nan=False)
    """Most requests per second of a log; a longer log is cut."""
    compare: bool = True
    out: Path = Path("out/demo")
    as_json: bool = False
    seed: int = Field(1, ge=0, lt=1 << 31)

    @property
    def arm_seconds(self) -> float:
        """Length of the load of one arm, s."""
        return self.seconds / 2 if self.compare else self.seconds
