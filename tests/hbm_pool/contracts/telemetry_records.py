"""Telemetry records whose every word is one number, so that a torn one shows."""

from __future__ import annotations

from typing import Any

import numpy as np
from hbm_pool.contracts.control_block import (
    ServerBlock,
)
from hbm_pool.contracts.records import (
    TELEMETRY,
)

# Fields that `publish_telemetry` fills itself.
STAMPED = ("monotonic_ns", "boot_epoch", "residency_sequence", "requests_lost")
PLAIN = np.ones(TELEMETRY.itemsize // 8, dtype=bool)
for _name in STAMPED:
    PLAIN[TELEMETRY.fields[_name][1] // 8] = False  # type: ignore[index]


def publish(block: ServerBlock, number: int) -> None:
    block.telemetry.reshape(1).view(np.uint64)[PLAIN] = number
    block.publish_telemetry()


def number_of(record: Any) -> int:
    words = record.reshape(1).view(np.uint64)[PLAIN]
    assert (words == words[0]).all(), "a torn record"
    return int(words[0])


def empty_telemetry() -> Any:
    return np.zeros((), TELEMETRY)
